"""One step: chunks of tokens in, rows of logits out. The only place where a model meets memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.errors import Corrupted
from truekv.core.lazy import torch
from truekv.core.sampling import Reading
from truekv.engine.settle import drawn, masses, settled

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from truekv.core.batch import Chunk, Step
    from truekv.core.batch import Sequence as Held
    from truekv.core.protocols import Model
    from truekv.memory.arena import Arena


@dataclass(frozen=True, slots=True)
class Ran:
    """What a forward pass made of a step whose tokens are still provisional."""

    hidden: torch.Tensor
    """[T, hidden_size] residuals of all tokens, chunk after chunk."""
    rows: list[torch.Tensor | Corrupted]
    """For each chunk the logits of its last wanted tokens, float32 on the host, or why not.

    [wanted, vocab]; none, [0, vocab], of a chunk of which nobody reads any or whose tokens are `drawn`; and where the
    best will do, those alone, filtered as `settle.py` says where the reading has filters.
    """
    places: list[torch.Tensor | None]
    """For each chunk of which the best logits alone are there, int64 [wanted, count]: which tokens they are."""
    likeliest: list[list[int]]
    """For each of them the place of its largest number, of equal ones the first."""
    drawn: list[list[int]]
    """For each chunk the tokens that its reading's points draw; none where it has none, or all logits are there."""


class Runner:
    """Runs steps of any mix of chunks: a prefill chunk, a single token and a verified draft are one thing."""

    def __init__(self, model: Model, arena: Arena, forward: Callable[[Step], torch.Tensor] | None = None) -> None:
        """Bind a model to the memory of its layers; `forward` replaces its pass by one that gives the same."""
        self.model = model
        self.arena = arena
        self.forward = forward or self._eager

    def run(self, chunks: Sequence[Chunk], wanted: Sequence[int], read: Sequence[Reading] | None = None) -> Ran:
        """Run one step; nothing in it is real until the caller advances each chunk's sequence.

        `read`: how much of each chunk's rows is to be there to read (all of them by default). Where numbers are not
        `apart` all are there if any is. A chunk whose numbers are not finite gets a Corrupted instead of logits;
        Corrupted is raised when the step failed and it is unknown whose fault it was.
        """
        read = self._readings(wanted, read)
        step = self.arena.reserve(list(chunks))
        total, count = step.tokens.shape[0], sum(wanted)
        with torch.inference_mode():
            # After the forward pass, copying it there would make the host wait until that is done.
            row_N = torch.tensor(_rows(chunks, wanted), device=step.tokens.device) if 0 < count < total else None
            hidden_TH = self.forward(step)
            logits_NV = self._logits(hidden_TH if row_N is None else hidden_TH.index_select(0, row_N), count)
            largest = self.arena.kernels.ops.largest
            # One pass over the numbers finds the largest and those that are none; the host waits for all at once.
            found = [largest(hidden_TH), largest(logits_NV), *_drawn(logits_NV, wanted, read)]
            peaks = cast("list[int]", torch.cat(found).tolist())
            tokens = _certain(peaks[total + count :], read)
            logits, places = self._to_host(logits_NV, wanted, read, tokens)
        ends = list(itertools.accumulate(wanted, initial=total))
        likeliest = [peaks[start:end] for start, end in itertools.pairwise(ends)]
        rows: list[torch.Tensor | Corrupted] = [*logits]
        if min(peaks[: total + count]) < 0:
            for index, (chunk, end) in enumerate(zip(chunks, _ends(chunks), strict=True)):
                if min(peaks[end - len(chunk.tokens) : end] + likeliest[index], default=0) < 0:
                    rows[index] = Corrupted(_sentence(chunk))
        return Ran(hidden_TH, rows, places, likeliest, tokens)

    def _readings(self, wanted: Sequence[int], read: Sequence[Reading] | None) -> Sequence[Reading]:
        """Return how much of each chunk's rows goes to the host: where numbers are there anyway, all or nothing."""
        vocab = self.model.spec.vocab_size
        if read is None:
            return [Reading(vocab)] * len(wanted)
        whole, nothing = Reading(vocab), Reading(0)
        return read if self.arena.kernels.ops.apart else [whole if one.most else nothing for one in read]

    def _logits(self, hidden_NH: torch.Tensor, count: int) -> torch.Tensor:
        """Return float32 [count, vocab] of `count` tokens, where the model is."""
        if not count:
            return hidden_NH.new_empty(0, self.model.spec.vocab_size, dtype=torch.float32)
        return self.model.logits(hidden_NH).float()

    def _to_host(
        self, logits_NV: torch.Tensor, wanted: Sequence[int], read: Sequence[Reading], tokens: Sequence[list[int]]
    ) -> tuple[list[torch.Tensor], list[torch.Tensor | None]]:
        """Return each chunk's logits as far as they are read, and their places where those are not all.

        What chunks read whole is one copy, and of the others what is left is another; those whose filters leave more
        than that are read whole afterwards. Of those whose `tokens` are known nothing is read.
        """
        vocab = logits_NV.shape[1]
        asked = [0 if known else one.most for one, known in zip(read, tokens, strict=True)]
        places: list[torch.Tensor | None] = [None] * len(wanted)
        if not any(asked):
            return [torch.empty(0, vocab)] * len(wanted), places
        whole = [count if most >= vocab else 0 for count, most in zip(wanted, asked, strict=True)]
        short = [count if 0 < most < vocab else 0 for count, most in zip(wanted, asked, strict=True)]
        logits = _split(_kept(logits_NV, wanted, whole).cpu(), whole)
        if any(short):
            # As many for all, so that all of them can be drawn from at once.
            most = max(most for most, count in zip(asked, short, strict=True) if count)
            rows_NV = _kept(logits_NV, wanted, short)
            best = self.arena.kernels.ops.best(rows_NV, most)
            masses_N = _masses(rows_NV, best[0], short, read)
            found = zip(*(_split(side.cpu(), short) for side in (*best, masses_N)), strict=True)
            for index, (best_NK, places_NK, mass_N) in enumerate(found):
                if not short[index]:
                    continue
                if kept := settled(best_NK, places_NK, read[index], mass_N):
                    logits[index], places[index] = kept
                else:
                    logits[index] = _split(logits_NV, wanted)[index].cpu()
        return logits, places

    def step(self, chunks: Sequence[Chunk], wanted: Sequence[int]) -> list[torch.Tensor | Corrupted]:
        """Run one step and make every healthy chunk without drafts real; return the logits of `run`.

        After a chunk with drafts the caller says with `arena.advance(sequence, n)` how many of its
        tokens are real: the certain ones and the accepted.
        """
        results = self.run(chunks, wanted).rows
        for chunk, result in zip(chunks, results, strict=True):
            if not chunk.drafts and not isinstance(result, Corrupted):
                self.arena.advance(chunk.sequence, len(chunk.tokens))
        return results

    def _eager(self, step: Step) -> torch.Tensor:
        return self.model.forward(step, self.arena.layers)

    def teacher_force(self, held: Held, tokens: Sequence[int], sizes: Iterator[int]) -> Iterator[torch.Tensor]:
        """Store tokens chunk by chunk and yield each chunk's logits [size, vocab]; Corrupted ends it."""
        from truekv.core.batch import Chunk

        start = 0
        while start < len(tokens):
            part = list(tokens[start : start + next(sizes)])
            (logits_QV,) = self.step([Chunk(held, part)], [len(part)])
            if isinstance(logits_QV, Corrupted):
                raise logits_QV
            yield logits_QV
            start += len(part)


def _rows(chunks: Sequence[Chunk], wanted: Sequence[int]) -> list[int]:
    """Return the places of the wanted tokens among all tokens of the step."""
    return [place for end, count in zip(_ends(chunks), wanted, strict=True) for place in range(end - count, end)]


def _ends(chunks: Sequence[Chunk]) -> Iterator[int]:
    """Yield where the tokens of each chunk end among all tokens of the step."""
    return itertools.accumulate(len(chunk.tokens) for chunk in chunks)


def _kept(rows_NV: torch.Tensor, wanted: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
    """Return the first `counts` of each chunk's `wanted` rows; the same tensor if those are all."""
    if sum(counts) == len(rows_NV):
        return rows_NV
    parts = zip(itertools.accumulate(wanted), wanted, counts, strict=True)
    kept = [rows_NV[end - of : end - of + count] for end, of, count in parts if count]
    return torch.cat(kept) if kept else rows_NV[:0]


def _drawn(logits_NV: torch.Tensor, wanted: Sequence[int], read: Sequence[Reading]) -> Iterator[torch.Tensor]:
    """Yield the tokens of all readings' points, int64 [points], where the logits are; -1 where one is not certain."""
    pairs = [(one.temperature, point) for one in read for point in one.points]
    if not pairs:
        return
    temperature_N, point_N = torch.tensor(pairs, dtype=torch.float64).to(logits_NV.device, non_blocking=True).unbind(1)
    yield drawn(_kept(logits_NV, wanted, [len(one.points) for one in read]), temperature_N, point_N)


def _certain(tokens: list[int], read: Sequence[Reading]) -> list[list[int]]:
    """Return the tokens of each reading's points, none where one of them is not certain."""
    if not tokens:
        return [[]] * len(read)
    rest = iter(tokens)
    parts = [[next(rest) for _ in one.points] for one in read]
    return [part if min(part, default=0) >= 0 else [] for part in parts]


def _masses(
    rows_NV: torch.Tensor, best_NK: torch.Tensor, counts: Sequence[int], read: Sequence[Reading]
) -> torch.Tensor:
    """Return the masses of rows where a chunk's top_p is a share of them: float64 [N], zeros where nobody's is."""
    shares = [one.temperature if one.top_p < 1 and not one.min_p else 0.0 for one in read]
    if not any(count and share for count, share in zip(counts, shares, strict=True)):
        return torch.zeros(len(rows_NV), dtype=torch.float64)
    temperatures = [share or 1.0 for count, share in zip(counts, shares, strict=True) for _ in range(count)]
    temperature_N = torch.tensor(temperatures, dtype=torch.float64, device=rows_NV.device)
    return masses(rows_NV, best_NK[:, 0], temperature_N)


def _split(rows_NV: torch.Tensor, counts: Sequence[int]) -> list[torch.Tensor]:
    none = rows_NV[:0]
    ends = itertools.accumulate(counts)
    return [rows_NV[end - count : end] if count else none for end, count in zip(ends, counts, strict=True)]


def _sentence(chunk: Chunk) -> str:
    first = chunk.sequence.position
    return (
        f"the model's numbers at tokens {first} to {first + len(chunk.tokens) - 1} of this request are not finite; "
        "no token was made from them: check the weights, or run with --kv-cache-dtype bf16 to rule out the cache"
    )
