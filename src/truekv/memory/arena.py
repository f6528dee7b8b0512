"""Pages and slots, and four verbs. There is no rollback: what is not advanced over is not real."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING

from truekv.core.batch import Sequence
from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.memory.allocate import allocate
from truekv.memory.layout import lay_out
from truekv.memory.lease import Lease
from truekv.memory.pages import POISON, PagedLayer
from truekv.memory.prefix import UNLIMITED, PrefixCache, PrefixStats
from truekv.memory.states import StateLayer
from truekv.memory.tree import Tree

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Chunk, Step
    from truekv.core.spec import ModelSpec
    from truekv.kernels.table import Kernels
    from truekv.memory.allocate import Frames
    from truekv.memory.plan import MemoryPlan


class OutOfPages(Refused):
    """A step needs more pages than are free; nothing was changed, so another sequence can be closed first."""


class OutOfSlots(Refused):
    """Every slot has a sequence; nothing was changed."""


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
        prefix_interval: int | None = None,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate what was planned, no more.

        `frames` holds what was measured on the model, by (layer index, field name), draft layers
        after the others; formats that need no measurement run without. With `poison` every byte
        that holds no real token is NaN.
        `check_finite` stops rows, inputs and states that are not finite, at the price of one
        host synchronisation per layer and step. With `prefix_interval` complete pages stay after
        their sequence for others that begin alike, and a prompt leaves a recurrent state every so
        many tokens; with recurrent layers that takes a plan with checkpoints.
        """
        self.plan = plan
        self.kernels = kernels
        self.poison = poison
        self.device = torch.device(device)
        self.layers, self.draft_layers = allocate(
            spec, plan, kernels, frames or {}, poison=poison, check_finite=check_finite, device=self.device
        )
        self._free_pages = list(range(plan.pages - 1, -1, -1))
        self._free_slots = list(range(plan.slots - 1, -1, -1))
        self._leases: dict[int, Lease] = {}
        self._serial = 0
        self._cache = self._prefix_cache(prefix_interval)

    @property
    def free_pages(self) -> int:
        """Pages that hold nothing."""
        return len(self._free_pages)

    @property
    def free_slots(self) -> int:
        """Slots that no sequence holds."""
        return len(self._free_slots)

    @property
    def held_pages(self) -> int:
        """Pages that open sequences hold; one that several read counts once."""
        return len({page for lease in self._leases.values() for page in lease.pages})

    @property
    def cached_pages(self) -> int:
        """Pages that the prefix cache alone holds."""
        return self._cache.tree.idle if self._cache else 0

    @property
    def available_pages(self) -> int:
        """Pages that a step could get: those that are free, and those that only the prefix cache holds."""
        return self.free_pages + self.cached_pages

    @property
    def prefix(self) -> PrefixStats:
        """What the prefix cache did and holds; all zero without one."""
        return self._cache.stats if self._cache else PrefixStats()

    @property
    def nbytes(self) -> int:
        """Bytes that were allocated."""
        return sum(tensor.nbytes for layer in (*self._paged(), *self._states()) for tensor in layer.tensors())

    def open(self, tokens: Seq[int] = (), *, salt: str = "", reuse: bool = True) -> Sequence:
        """Start a sequence that will hold `tokens` and more; its position says how many it holds already.

        Those come from the prefix cache, of sequences with the same salt only, and at least one
        token is left to compute. Without `reuse` all are computed. Raises OutOfSlots.
        """
        if not self._free_slots:
            raise OutOfSlots(
                f"all {self.plan.slots} sequence slots are in use; close a sequence first, or raise max_num_seqs"
            )
        self._serial += 1
        sequence = Sequence(slot=self._free_slots.pop())
        lease = self._leases[sequence.slot] = Lease(sequence, self._serial, salt=salt, planned=len(tokens))
        if self._cache and reuse and tokens:
            self._start_from_cache(self._cache, lease, tokens)
        for layer in self._states():
            if sequence.position:
                layer.copy(lease.nodes[-1].checkpoint, sequence.slot)
            else:
                layer.open(sequence.slot)
        return sequence

    def new_pages(self, tokens: Seq[int], *, salt: str = "") -> int:
        """How many of the available pages a sequence of these tokens and one more would take."""
        shared = self._cache.shared(salt, tokens) if self._cache else 0
        return self.plan.pages_for(len(tokens) + 1) - shared

    def certain_limit(self, sequence: Sequence) -> int:
        """Most certain tokens that the next chunk may bring, so that a state worth keeping is not passed.

        A longer chunk is as right, but leaves less for others to start from.
        """
        return self._cache.certain_limit(self._lease(sequence, moved=True)) if self._cache else UNLIMITED

    def draft_limit(self, sequence: Sequence) -> int:
        """Most drafts after the one certain token of the next chunk; likewise."""
        return self._cache.draft_limit(self._lease(sequence, moved=True)) if self._cache else UNLIMITED

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
        if sum(missing) > self.available_pages:
            raise OutOfPages(
                f"the step needs {sum(missing)} more pages of {self.plan.page_tokens} tokens, but "
                f"{self.available_pages} of {self.plan.pages} are free; close a sequence first"
            )
        for chunk, count in zip(chunks, missing, strict=True):
            sequence, lease = chunk.sequence, self._leases[chunk.sequence.slot]
            if count > 0:
                sequence.pages.extend(self._take(count))
            sequence.reserved = (len(chunk.tokens), chunk.drafts)
            lease.pending = list(chunk.tokens)
            lease.note()
        rows = [(item.sequence, item.sequence.position, item.tokens, item.drafts) for item in chunks]
        return lay_out(rows, self.plan.page_tokens, self.device)

    def draft_step(self, rows: Seq[tuple[Sequence, int, list[int]]], drafts: Seq[int] = ()) -> Step:
        """Describe a pass of the draft head: tokens for rows from a position on, inside what is reserved.

        Its rows are as provisional as the step's own: those that are not advanced over are overwritten.
        `drafts`: of each row how many will be made from it. Passes over all of them but the last write to the
        lines that follow.
        """
        for (sequence, start, tokens), made in zip(rows, drafts or [0] * len(rows), strict=True):
            lease, size = self._lease(sequence), self.plan.page_tokens
            own = range(len(lease.nodes) * size, len(sequence.pages) * size + 1)
            end = start + len(tokens) + max(0, made - 1)
            if lease.reserved is None or start not in own or end not in own:
                raise Refused(
                    f"draft rows {start} to {end - 1} lie outside of what is reserved for a sequence "
                    f"of {sequence.position} tokens; reserve the step with more room"
                )
        described = [(sequence, start, tokens, 0) for sequence, start, tokens in rows]
        return lay_out(described, self.plan.page_tokens, self.device)

    def advance(self, sequence: Sequence, count: int) -> None:
        """Make the first `count` tokens of the reserved chunk real: the only place where tokens become real.

        The certain ones are in the recurrent state already; the accepted drafts stay in the log and
        the next step folds them in. Pages beyond the last real token are free again, and complete
        ones become visible to others: every layer's rows must be written by now, draft layers included.
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
        folded = sequence.position + tokens - drafts
        due = self._cache is not None and self._cache.due(lease, folded)
        if due:
            for layer in self._states():
                layer.expect(sequence.slot, folded)
        sequence.position += count
        sequence.replay = count - (tokens - drafts)
        sequence.reserved = None
        kept = self.plan.pages_for(sequence.position)
        if kept < len(sequence.pages):
            self._release(sequence.pages[kept:])
            del sequence.pages[kept:]
        if self._cache:
            lease.tokens += lease.pending[:count]
            self._cache.publish(lease, sequence.pages)
        if self._cache and due:
            self._cache.save(lease, folded, lambda row: self._copy_state(sequence.slot, row))
        lease.note()
        if self.poison:
            self._erase_rejected(sequence)

    def close(self, sequence: Sequence, *, suspect: bool = False) -> None:
        """Give a sequence's pages and slot back, at any time, also with a step under way.

        The prefix cache keeps what is real of it. Of a `suspect` nothing stays to be started from, nor
        of those that started from it, and its pages are wiped before anything else is written to them.
        """
        # Whatever the sequence claims, what comes back is what its lease says was handed out.
        lease = self._lease(sequence, moved=True)
        own = lease.pages[len(lease.nodes) :]
        if self._cache and suspect:
            self._cache.expel(lease, [other for other in self._leases.values() if other is not lease])
        elif self._cache and self._cache.close(lease, own[0] if own else None):
            # A step that was under way wrote behind the last real token.
            self._erase_lines(own[0], lease.position % self.plan.page_tokens)
            own = own[1:]
        self._release(own, wipe=suspect)
        if self.poison:
            for layer in self._states():
                layer.erase(sequence.slot)
        self._free_slots.append(sequence.slot)
        del self._leases[sequence.slot]
        sequence.pages, sequence.slot, sequence.reserved, sequence.replay = array("q"), -1, None, 0

    def drop_cache(self) -> None:
        """Empty the prefix cache. Sequences that are open go on, and leave nothing to others any more."""
        if self._cache:
            self._cache.tree.clear()

    def check(self) -> None:
        """Raise Corrupted unless every page and slot is free, held or cached, and counted as what it is."""
        own = [page for lease in self._leases.values() for page in lease.pages[len(lease.nodes) :]]
        shared = self._cache.check(self._leases.values()) if self._cache else []
        slots = [*self._free_slots, *self._leases]
        for what, found, total in (
            ("pages", [*self._free_pages, *own, *shared], self.plan.pages),
            ("slots", slots, self.plan.slots),
        ):
            if sorted(found) != list(range(total)):
                raise Corrupted(
                    f"{len(found)} {what} are free, held or cached, of which {len(set(found))} differ, not {total}"
                )
        for lease in self._leases.values():
            self._lease(lease.sequence)

    def _prefix_cache(self, interval: int | None) -> PrefixCache | None:
        recurrent, first = bool(self._states()), self.plan.slots
        if interval is None or (recurrent and not self.plan.checkpoints):
            return None
        rows = range(first, first + self.plan.checkpoints)
        tree = Tree(rows, recurrent=recurrent, free_pages=self._release, free_row=self._erase_state)
        return PrefixCache(tree, page_tokens=self.plan.page_tokens, interval=interval, recurrent=recurrent)

    def _start_from_cache(self, cache: PrefixCache, lease: Lease, tokens: Seq[int]) -> None:
        source, lines = cache.open(lease, tokens, self.free_pages)
        sequence = lease.sequence
        sequence.pages = array("q", [node.page for node in lease.nodes])
        if source is not None:
            (page,) = self._take(1)
            for layer in self._paged():
                layer.copy(source.page, page)
            self._erase_lines(page, lines)
            cache.tree.release(source)
            sequence.pages.append(page)
        sequence.position = len(lease.tokens)
        lease.note()

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

    def _lease(self, sequence: Sequence, *, moved: bool = False) -> Lease:
        """Return what the slot really holds, or raise Corrupted when that is not what the sequence says.

        With `moved` the two may disagree on numbers, but still not on whose slot it is.
        """
        lease = self._leases.get(sequence.slot)
        if lease is None or lease.sequence is not sequence:
            state = "is closed" if sequence.slot < 0 else f"does not own slot {sequence.slot}"
            raise Corrupted(f"a sequence of {sequence.position} tokens {state}; open a new one and compute it again")
        if not moved:
            lease.verify()
        return lease

    def _take(self, count: int) -> list[int]:
        """Hand out free pages, after making some; the caller knows that there are enough."""
        if self._cache and count > self.free_pages:
            self._cache.tree.evict(count - self.free_pages)
        return [self._free_pages.pop() for _ in range(count)]

    def _release(self, pages: Seq[int], *, wipe: bool = False) -> None:
        self._free_pages += pages
        if pages and (self.poison or wipe):
            for layer in self._paged():
                layer.erase(pages, POISON if self.poison else 0)

    def _copy_state(self, source: int, target: int) -> None:
        for layer in self._states():
            layer.copy(source, target)

    def _erase_state(self, row: int) -> None:
        if self.poison:
            for layer in self._states():
                layer.erase(row)

    def _erase_lines(self, page: int, line: int) -> None:
        if self.poison:
            for layer in self._paged():
                layer.erase_lines(page, line)

    def _erase_rejected(self, sequence: Sequence) -> None:
        if line := sequence.position % self.plan.page_tokens:
            self._erase_lines(sequence.pages[-1], line)
        for layer in self._states():
            layer.erase_log(sequence.slot, sequence.replay)
