"""Capture: steps of a few fixed sizes, each recorded once and replayed with other contents.

Every decode or verify step, whatever its mix of rows, is laid into the next larger size; a step that fits none, such
as a long chunk of a prompt, runs as it is. Both come from the same metadata, so there is one path to be right.
"""

from __future__ import annotations

import logging
from bisect import bisect_left
from collections import OrderedDict
from typing import TYPE_CHECKING, Final

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.recording import recording
from truekv.engine.padding import PaddedStep, StepSize, buffers, nobody
from truekv.engine.recording import Recording, recorder
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.batch import Step
    from truekv.engine.recording import Recorder
    from truekv.memory.arena import Arena
    from truekv.memory.plan import MemoryPlan

    Forward = Callable[..., torch.Tensor]
    """A function of a Step and of tensors [T, ...] that returns [T, ...]."""

MOST_TOKENS: Final = {"cpu": 256, "cuda": 512}
"""Of a step that is captured: beyond, launching it is a small part of running it."""
MOST_CAPTURED: Final = 64
"""Sizes kept at once on a CPU, where recording one again is cheap; of more, those that were used last."""
KEPT: Final = 512 << 20
"""Bytes that all sizes may keep on a GPU beside what they share: wide page tables are large. Of more, likewise."""
NARROWEST: Final = 16
"""Pages in the narrowest table; each wider one has four times as many, up to what the longest sequence needs."""
WARMED_PAGES: Final = 256
"""Of the widest table whose sizes are recorded before they are needed: 8,192 tokens. Of wider ones one alone is."""


class Captured:
    """A forward recorded for one size, that of the step given."""

    def __init__(self, forward: Forward, step: Step, *tensors: torch.Tensor, record: Recorder = Recording) -> None:
        """Run `forward` on copies of `step` and `tensors`, recording every launch.

        The run is real: whatever it writes to memory is written, so give it nobody's or a scratch
        sequence. Later steps that are smaller leave rows of this one where they end.
        """
        self._padded = PaddedStep(step, tensors)
        self._size = StepSize.of(step)
        self._recording = record(lambda: forward(self._padded.step, *self._padded.tensors))

    @property
    def nbytes(self) -> int:
        """The most that is kept for this size alone."""
        return buffers(self._size) + self._recording.output.nbytes

    @property
    def host_reads(self) -> tuple[str, ...]:
        """Operations by which the host read what depends on data; a replay will not read it again."""
        return self._recording.host_reads

    def __call__(self, step: Step, *tensors: torch.Tensor) -> torch.Tensor:
        """Replay with another step's contents; Refused when it cannot be laid into the recorded size."""
        size = StepSize.of(step)
        if not self._size.holds(size):
            raise Refused(
                f"a step of {size} cannot be laid into one captured for {self._size}; capture one of its size"
            )
        with torch.inference_mode():
            self._padded.put(step, tensors)
            return self._recording.replay()[: size.tokens].clone()


class StepSizes:
    """The sizes that are captured: whatever steps the sequences of a plan may need, and few of them.

    A size has as many rows as tokens, up to all sequences, because rows without tokens cost nothing.
    """

    def __init__(self, plan: MemoryPlan, *, cpu: bool) -> None:
        """Derive them from the plan, whose last slot is for the scratch."""
        self._slots = plan.slots
        most = min(MOST_TOKENS["cpu" if cpu else "cuda"], (plan.slots - 1) * (1 + plan.drafts))
        self._tokens = _token_counts(most, cpu=cpu)
        self._longest = [1, 1 + plan.drafts] if plan.drafts else [1]
        # No wider than any step can be: on a GPU every span of a table has programs, and sums that they leave.
        widest = plan.pages_for(plan.longest + plan.drafts)
        self._pages = [min(NARROWEST, widest)]
        while self._pages[-1] < widest:
            self._pages.append(min(widest, 4 * self._pages[-1]))

    def holding(self, step: Step) -> StepSize | None:
        """Return the smallest size that holds a step."""
        asked = StepSize.of(step)
        tokens = bisect_left(self._tokens, asked.tokens)
        longest = bisect_left(self._longest, asked.longest)
        pages = bisect_left(self._pages, asked.pages)
        if tokens == len(self._tokens) or longest == len(self._longest) or pages == len(self._pages):
            return None
        size = self._size(self._tokens[tokens], self._longest[longest], self._pages[pages])
        return size if size.holds(asked) else None

    def within(self, pages: int) -> list[StepSize]:
        """Return every size up to the narrowest page table of at least so many pages, the largest first.

        And the smallest of the widest table, as attention to long rows takes a kernel more.
        """
        widths = self._pages[: bisect_left(self._pages, pages) + 1]
        sizes = [
            self._size(tokens, longest, width)
            for width in reversed(widths)
            for tokens in reversed(self._tokens)
            for longest in reversed(self._longest)
        ]
        return (
            sizes if widths == self._pages else [*sizes, self._size(self._tokens[0], self._longest[0], self._pages[-1])]
        )

    def _size(self, tokens: int, longest: int, pages: int) -> StepSize:
        return StepSize(tokens, min(tokens, self._slots), longest, pages)


def _token_counts(most: int, *, cpu: bool) -> list[int]:
    """Return the numbers of tokens that are captured, up to `most`.

    A GPU takes the same time for a few tokens more: eight, and beyond 64 a quarter of the power of two below. On a CPU
    every one costs its products, so no step is padded by more than an eighth.
    """
    counts = [1]
    while counts[-1] < most:
        last = counts[-1]
        wide = min(last, max(8, 1 << (last.bit_length() - 3))) if last > 4 else last
        counts.append(min(most, last + (max(1, last // 8) if cpu else wide)))
    return counts


class StepGraphs:
    """A forward whose small steps are replayed: it is called like the forward itself.

    `replays` and `eager` count the steps that went either way, `recorded` the sizes recorded for them.
    """

    def __init__(self, forward: Forward, arena: Arena, beside: StepGraphs | None = None) -> None:
        """Capture `forward(step, *tensors)`.

        The arena must have one slot and one page beyond those of its sequences, for the `scratch`
        sequence, which is opened here unless the capture is one `beside` another, whose scratch and memory it shares.
        Raises Refused for an arena that checks numbers on the host, and for a forward that reads them there. Recording
        writes to no sequence, so it may happen between any two steps.
        """
        layers = (*arena.layers, *arena.draft_layers)
        self._paged = [layer for layer in layers if isinstance(layer, PagedLayer)]
        if any(isinstance(layer, PagedLayer | StateLayer) and layer.check_finite for layer in layers):
            raise Refused(
                "a captured step cannot stop at numbers that are not finite; make its arena with check_finite=False, "
                "or turn capture off"
            )
        self.scratch = arena.open() if beside is None else beside.scratch
        """Reserved for one token that never becomes real."""
        if not self.scratch.pages:
            arena.reserve([Chunk(self.scratch, [0])])
        self.sizes = StepSizes(arena.plan, cpu=arena.device.type == "cpu")
        self.replays = self.recorded = self.eager = 0
        self._forward = forward
        self._device, self._cpu = arena.device, arena.device.type == "cpu"
        self.record: Recorder = recorder(arena.device) if beside is None else beside.record
        """Makes recordings, which share their memory."""
        self._captured: OrderedDict[tuple[object, ...], Captured | None] = OrderedDict()

    def __call__(self, step: Step, *tensors: torch.Tensor) -> torch.Tensor:
        """Return forward(step, *tensors); launch by launch where a layer's rows are looked at, which a replay hides."""
        size = self.sizes.holding(step)
        if size is not None and not any(layer.probe for layer in self._paged):
            captured = self._capture(size, *tensors)
            if captured is not None:
                self.replays += 1
                return captured(step, *tensors)
        self.eager += 1
        # As in a replay, no check stops between layers, for which a GPU would wait for the host: numbers that are not
        # finite show in what the forward returns.
        with recording():
            return self._forward(step, *tensors)

    def warm(self, pages: int, *tensors: torch.Tensor, progress: Callable[[int, int], None]) -> None:
        """Record every size up to page tables of at least `pages`, so that no step waits for it.

        The largest comes first, and what it lets go of is taken by the others. `tensors` [0, ...] stand for those that
        steps will bring. Calls `progress(done, total)`.
        """
        sizes = self.sizes.within(pages)
        for done, size in enumerate(sizes):
            progress(done, len(sizes))
            self._capture(size, *tensors)
        progress(len(sizes), len(sizes))
        if not self._cpu:
            # What runs on the stream aside have left there, no other stream can take.
            torch.cuda.empty_cache()

    def _capture(self, size: StepSize, *tensors: torch.Tensor) -> Captured | None:
        """Return what was recorded for a size, now if not before; None for one that has no room on the device."""
        key = (size, *((tensor.shape[1:], tensor.dtype) for tensor in tensors))
        if key not in self._captured:
            try:
                captured = self._recorded(size, tensors)
                self._make_room(captured.nbytes)
                self._captured[key] = captured
            except torch.OutOfMemoryError:
                # Nobody tries again: what is missing now is held by weights, rows and other sizes, which stay.
                self._captured[key] = None
                logging.getLogger("truekv").warning(
                    "steps of %s have no room on the device to be captured, so they run launch by launch, which takes "
                    "longer; give the cache less memory, or lower max_num_seqs",
                    size,
                )
        self._captured.move_to_end(key)
        return self._captured[key]

    def _make_room(self, nbytes: int) -> None:
        """Drop those that were used longest ago, on a GPU only for memory: recording one again holds up a request."""
        held = self._captured
        while held and (
            len(held) >= MOST_CAPTURED if self._cpu else sum(one.nbytes for one in held.values() if one) + nbytes > KEPT
        ):
            held.popitem(last=False)

    def _recorded(self, size: StepSize, tensors: tuple[torch.Tensor, ...]) -> Captured:
        empty = nobody(size, self.scratch.slot, self.scratch.pages[0], self._device)
        zeros = (tensor.new_zeros(size.tokens, *tensor.shape[1:]) for tensor in tensors)
        captured = Captured(self._forward, empty, *zeros, record=self.record)
        if captured.host_reads:
            reads = ", ".join(sorted(set(captured.host_reads)))
            raise Refused(
                f"a step of this model reads on the host what its numbers decide ({reads}), so it cannot be captured; "
                "turn capture off, or use the native kernels"
            )
        self.recorded += 1
        return captured
