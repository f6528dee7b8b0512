"""Pages and slots, and four verbs. There is no rollback: what is not advanced over is not real."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.batch import Sequence, Step
from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.spec import Paged, Recurrent, Stateless
from truekv.formats.frame import frame_for
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Chunk
    from truekv.core.protocols import LayerMemory
    from truekv.core.spec import LayerSpec, ModelSpec
    from truekv.formats.frame import Frame
    from truekv.kernels.table import Kernels
    from truekv.memory.plan import LayerPlan, MemoryPlan

    Frames = Mapping[tuple[int, str], Frame]


class OutOfPages(Refused):
    """A step needs more pages than are free; nothing was changed, so another sequence can be closed first."""


class OutOfSlots(Refused):
    """Every slot has a sequence; nothing was changed."""


@dataclass(slots=True, eq=False)
class _Lease:
    """What the arena knows of a slot's sequence, to notice when the sequence says otherwise."""

    sequence: Sequence
    position: int = 0
    replay: int = 0
    pages: tuple[int, ...] = ()
    reserved: tuple[int, int] | None = None

    def note(self) -> None:
        """Take over what the arena has just written into the sequence."""
        sequence = self.sequence
        self.position, self.replay = sequence.position, sequence.replay
        self.pages, self.reserved = tuple(sequence.pages), sequence.reserved


class Arena:
    """Owns every byte that outlives a step, and the free lists that hand them out."""

    def __init__(
        self,
        spec: ModelSpec,
        plan: MemoryPlan,
        kernels: Kernels,
        frames: Frames | None = None,
        *,
        poison: bool = False,
        check_finite: bool = True,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate what was planned, no more.

        `frames` holds what was measured on the model, by (layer index, field name), draft layers
        after the others; formats that need no measurement run without. With `poison` every byte
        that holds no real token is NaN.
        `check_finite` stops rows, inputs and states that are not finite, at the price of one
        host synchronisation per layer and step.
        """
        self.plan = plan
        self.kernels = kernels
        self.poison = poison
        self.device = torch.device(device)
        self._check_finite = check_finite
        measured = frames or {}
        self.layers = self._allocate(spec.layers, plan.layers, measured, 0)
        draft_layers = spec.draft_layers if plan.draft_layers else ()
        self.draft_layers = self._allocate(draft_layers, plan.draft_layers, measured, len(spec.layers))
        self._free_pages = list(range(plan.pages - 1, -1, -1))
        self._free_slots = list(range(plan.slots - 1, -1, -1))
        self._leases: dict[int, _Lease] = {}

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free_pages)

    @property
    def free_slots(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free_slots)

    @property
    def held_pages(self) -> int:
        """Pages that open sequences hold."""
        return sum(len(lease.pages) for lease in self._leases.values())

    @property
    def nbytes(self) -> int:
        """Bytes that were allocated."""
        return sum(tensor.nbytes for layer in (*self._paged(), *self._states()) for tensor in layer.tensors())

    def open(self) -> Sequence:
        """Start a sequence: a slot with the zero state and no pages. Raises OutOfSlots."""
        if not self._free_slots:
            raise OutOfSlots(
                f"all {self.plan.slots} sequence slots are in use; close a sequence first, or raise max_num_seqs"
            )
        slot = self._free_slots.pop()
        for layer in self._states():
            layer.open(slot)
        sequence = Sequence(slot=slot)
        self._leases[slot] = _Lease(sequence)
        return sequence

    def reserve(self, chunks: Seq[Chunk]) -> Step:
        """Make room for each chunk after its sequence's tokens, and describe the step.

        Raises OutOfPages, Refused (a chunk this plan has no room for) or Corrupted (a sequence that
        is not what its slot holds), each before anything is changed. Every chunk's sequence must be
        advanced or closed before it is reserved again.
        """
        self._admit(chunks)
        missing = [
            self.plan.pages_for(chunk.sequence.position + len(chunk.tokens) + chunk.room) - len(chunk.sequence.pages)
            for chunk in chunks
        ]
        if sum(missing) > len(self._free_pages):
            raise OutOfPages(
                f"the step needs {sum(missing)} more pages of {self.plan.page_tokens} tokens, but "
                f"{len(self._free_pages)} of {self.plan.pages} are free; close a sequence first"
            )
        for chunk, count in zip(chunks, missing, strict=True):
            sequence, lease = chunk.sequence, self._leases[chunk.sequence.slot]
            sequence.pages += [self._free_pages.pop() for _ in range(count)]
            sequence.reserved = (len(chunk.tokens), chunk.drafts)
            lease.note()
        return self._step([(item.sequence, item.sequence.position, item.tokens, item.drafts) for item in chunks])

    def draft_step(self, rows: Seq[tuple[Sequence, int, list[int]]]) -> Step:
        """Describe a pass of the draft head: tokens for rows from a position on, inside what is reserved.

        Its rows are as provisional as the step's own: those that are not advanced over are overwritten.
        """
        for sequence, start, tokens in rows:
            lease = self._lease(sequence)
            if lease.reserved is None or start + len(tokens) > len(sequence.pages) * self.plan.page_tokens:
                raise Refused(
                    f"draft rows {start} to {start + len(tokens) - 1} lie outside of what is reserved for a sequence "
                    f"of {sequence.position} tokens; reserve the step with more room"
                )
        return self._step([(sequence, start, tokens, 0) for sequence, start, tokens in rows])

    def advance(self, sequence: Sequence, count: int) -> None:
        """Make the first `count` tokens of the reserved chunk real: the only place where tokens become real.

        The certain ones are in the recurrent state already; the accepted drafts stay in the log and
        the next step folds them in. Pages beyond the last real token are free again.
        """
        lease = self._lease(sequence)
        if lease.reserved is None:
            raise Refused("a sequence was advanced without a reserved step; reserve and run one first")
        tokens, drafts = lease.reserved
        if not tokens - drafts <= count <= tokens:
            raise Refused(
                f"a step of {tokens} tokens, {drafts} of them drafts, was advanced by {count}; "
                f"it can be advanced by {tokens - drafts} to {tokens}"
            )
        sequence.position += count
        sequence.replay = count - (tokens - drafts)
        sequence.reserved = None
        kept = self.plan.pages_for(sequence.position)
        self._release(sequence.pages[kept:])
        del sequence.pages[kept:]
        lease.note()
        if self.poison:
            self._erase_rejected(sequence)

    def close(self, sequence: Sequence) -> None:
        """Give a sequence's pages and slot back, at any time, also with a step under way."""
        # Whatever the sequence claims, what comes back is what its lease says was handed out.
        self._release(self._lease(sequence, moved=True).pages)
        if self.poison:
            for layer in self._states():
                layer.erase(sequence.slot)
        self._free_slots.append(sequence.slot)
        del self._leases[sequence.slot]
        sequence.pages, sequence.slot, sequence.reserved, sequence.replay = [], -1, None, 0

    def check(self) -> None:
        """Raise Corrupted unless every page and slot is either free or held exactly once."""
        held = [page for lease in self._leases.values() for page in lease.pages]
        slots = [*self._free_slots, *self._leases]
        for what, found, total in (
            ("pages", [*self._free_pages, *held], self.plan.pages),
            ("slots", slots, self.plan.slots),
        ):
            if sorted(found) != list(range(total)):
                raise Corrupted(f"{len(found)} {what} are free or held, of which {len(set(found))} differ, not {total}")
        for lease in self._leases.values():
            self._lease(lease.sequence)

    def _allocate(
        self, specs: Seq[LayerSpec], plans: Seq[LayerPlan], measured: Frames, first: int
    ) -> tuple[LayerMemory, ...]:
        pairs = zip(specs, plans, strict=True)
        return tuple(
            self._layer(index, layer, planned, measured) for index, (layer, planned) in enumerate(pairs, first)
        )

    def _layer(self, index: int, layer: LayerSpec, planned: LayerPlan, measured: Frames) -> LayerMemory:
        name = f"layer {index}"
        match layer:
            case Paged(fields=fields):
                frames = tuple(
                    frame_for(chosen, measured.get((index, field.name))).to(self.device)
                    for field, chosen in zip(fields, planned.formats, strict=True)
                )
                return PagedLayer(
                    name,
                    layer,
                    planned.formats,
                    frames,
                    self.kernels,
                    pages=self.plan.pages,
                    page_tokens=self.plan.page_tokens,
                    poison=self.poison,
                    check_finite=self._check_finite,
                    device=self.device,
                )
            case Recurrent():
                return StateLayer(
                    name,
                    layer,
                    self.kernels,
                    slots=self.plan.slots,
                    drafts=self.plan.drafts,
                    dtype=self.plan.dtype,
                    poison=self.poison,
                    check_finite=self._check_finite,
                    device=self.device,
                )
            case Stateless():
                return None

    def _paged(self) -> list[PagedLayer]:
        return [layer for layer in (*self.layers, *self.draft_layers) if isinstance(layer, PagedLayer)]

    def _states(self) -> list[StateLayer]:
        return [layer for layer in (*self.layers, *self.draft_layers) if isinstance(layer, StateLayer)]

    def _admit(self, chunks: Seq[Chunk]) -> None:
        """Check every chunk before the first page moves."""
        if not any(chunk.tokens for chunk in chunks):
            raise Refused("a step was reserved without any token; give at least one")
        if len({chunk.sequence.slot for chunk in chunks}) != len(chunks):
            raise Refused("a step was reserved with two chunks of one sequence; join their tokens into one chunk")
        for chunk in chunks:
            sequence, tokens, drafts = chunk.sequence, len(chunk.tokens), chunk.drafts
            lease = self._lease(sequence)
            if lease.reserved is not None:
                raise Refused("a sequence was reserved again before its last step was advanced; advance or close it")
            if not 0 <= drafts <= min(self.plan.drafts, tokens):
                raise Refused(
                    f"a chunk of {tokens} tokens has {drafts} drafts, but the plan logs at most {self.plan.drafts}; "
                    "raise num_speculative_tokens or propose fewer"
                )
            if sequence.position + tokens > self.plan.longest:
                raise Refused(
                    f"a sequence of {sequence.position} tokens cannot take {tokens} more: the context ends at "
                    f"{self.plan.longest}; shorten the prompt or raise max_model_len"
                )

    def _lease(self, sequence: Sequence, *, moved: bool = False) -> _Lease:
        """Return what the slot really holds, or raise Corrupted when that is not what the sequence says.

        With `moved` the two may disagree on numbers, but still not on whose slot it is.
        """
        lease = self._leases.get(sequence.slot)
        if lease is None or lease.sequence is not sequence:
            state = "is closed" if sequence.slot < 0 else f"does not own slot {sequence.slot}"
            raise Corrupted(f"a sequence of {sequence.position} tokens {state}; open a new one and compute it again")
        claimed = (sequence.position, sequence.replay, tuple(sequence.pages), sequence.reserved)
        known = (lease.position, lease.replay, lease.pages, lease.reserved)
        if claimed != known and not moved:
            names = ("position", "replay", "pages", "reserved")
            wrong = next(row for row in zip(names, claimed, known, strict=True) if row[1] != row[2])
            raise Corrupted(
                f"the sequence in slot {sequence.slot} says {wrong[0]} = {wrong[1]}, but its memory holds {wrong[2]}; "
                "only the arena may change that: close it and compute it again"
            )
        return lease

    def _release(self, pages: Seq[int]) -> None:
        self._free_pages += pages
        if self.poison and pages:
            for layer in self._paged():
                layer.erase(pages)

    def _erase_rejected(self, sequence: Sequence) -> None:
        line = sequence.position % self.plan.page_tokens
        for layer in self._paged():
            if line:
                layer.erase_lines(sequence.pages[-1], line)
        for layer in self._states():
            layer.erase_log(sequence.slot, sequence.replay)

    def _step(self, rows: Seq[tuple[Sequence, int, list[int], int]]) -> Step:
        """Lay out (sequence, first position, tokens, drafts) of each row."""
        counts = [len(tokens) for _, _, tokens, _ in rows]
        sequences = [sequence for sequence, *_ in rows]
        total, longest, width = sum(counts), max(counts), max(len(item.pages) for item in sequences)
        starts = [sum(counts[:row]) for row in range(len(counts))]
        positions = [range(first, first + count) for (_, first, _, _), count in zip(rows, counts, strict=True)]
        # A row of the table must hold real pages to its end, so that a gather never leaves memory.
        table = [item.pages + [item.pages[-1] if item.pages else 0] * (width - len(item.pages)) for item in sequences]
        return Step(
            tokens=self._tensor([token for _, _, tokens, _ in rows for token in tokens]),
            positions=self._tensor([position for row in positions for position in row]),
            owner=self._tensor([row for row, count in enumerate(counts) for _ in range(count)]),
            offset=self._tensor([place for count in counts for place in range(count)]),
            gather=self._tensor(
                [
                    [min(start + min(place, max(count - 1, 0)), total - 1) for place in range(longest)]
                    for start, count in zip(starts, counts, strict=True)
                ]
            ),
            position=self._tensor([first for _, first, _, _ in rows]),
            count=self._tensor(counts),
            certain=self._tensor([len(tokens) - drafts for _, _, tokens, drafts in rows]),
            replay=self._tensor([item.replay for item in sequences]),
            slot=self._tensor([item.slot for item in sequences]),
            pages=self._tensor(table),
            page=self._tensor(
                [
                    item.pages[position // self.plan.page_tokens]
                    for item, row in zip(sequences, positions, strict=True)
                    for position in row
                ]
            ),
            line=self._tensor([position % self.plan.page_tokens for row in positions for position in row]),
        )

    def _tensor(self, values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=self.device)
