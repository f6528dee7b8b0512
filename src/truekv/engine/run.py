"""One step: chunks of tokens in, rows of logits out. The only place where a model meets memory."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.errors import Corrupted
from truekv.core.lazy import torch

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
    """For each chunk the logits of its last wanted tokens, float32 [wanted, vocab] on the host, or why not."""
    likeliest: list[list[int]]
    """For each of them the place of its largest number, of equal ones the first."""


class Runner:
    """Runs steps of any mix of chunks: a prefill chunk, a single token and a verified draft are one thing."""

    def __init__(self, model: Model, arena: Arena, forward: Callable[[Step], torch.Tensor] | None = None) -> None:
        """Bind a model to the memory of its layers; `forward` replaces its pass by one that gives the same."""
        self.model = model
        self.arena = arena
        self.forward = forward or self._eager

    def run(self, chunks: Sequence[Chunk], wanted: Sequence[int]) -> Ran:
        """Run one step; nothing in it is real until the caller advances each chunk's sequence.

        A chunk whose numbers are not finite gets a Corrupted instead of logits; Corrupted is raised
        when the step failed and it is unknown whose fault it was.
        """
        step = self.arena.reserve(list(chunks))
        with torch.inference_mode():
            hidden_TH = self.forward(step)
            rows, largest = _rows(chunks, wanted), self.arena.kernels.ops.largest
            read_NH = hidden_TH if len(rows) == len(hidden_TH) else hidden_TH[rows]
            logits_NV = self.model.logits(read_NH).float() if rows else torch.empty(0, 1)
            # One pass over the numbers finds the largest and those that are none.
            peaks_T = cast("list[int]", largest(hidden_TH).tolist())
            peaks_N = cast("list[int]", largest(logits_NV).tolist())
            logits_NV = logits_NV.cpu()
        results: list[torch.Tensor | Corrupted] = []
        likeliest: list[list[int]] = []
        token = row = 0
        for chunk, count in zip(chunks, wanted, strict=True):
            likeliest.append(peaks_N[row : row + count])
            sound = min(peaks_T[token : token + len(chunk.tokens)] + likeliest[-1], default=0) >= 0
            results.append(logits_NV[row : row + count] if sound else Corrupted(_sentence(chunk)))
            token += len(chunk.tokens)
            row += count
        return Ran(hidden_TH, results, likeliest)

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
    rows: list[int] = []
    end = 0
    for chunk, count in zip(chunks, wanted, strict=True):
        end += len(chunk.tokens)
        rows.extend(range(end - count, end))
    return rows


def _sentence(chunk: Chunk) -> str:
    first = chunk.sequence.position
    return (
        f"the model's numbers at tokens {first} to {first + len(chunk.tokens) - 1} of this request are not finite; "
        "no token was made from them: check the weights, or run with --kv-cache-dtype bf16 to rule out the cache"
    )
