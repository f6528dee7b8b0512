"""From rows of logits to tokens: the seam between requests and the kernels that draw.

Shapes: N rows, V vocabulary, K candidates. Logits are float32 on the CPU, each row contiguous. A row is
ordered by falling logits, of equal ones the first comes first; each filter keeps a beginning of that order.
What is made of a row depends on nothing but the row.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.lazy import torch


class Draw(NamedTuple):
    """One token to be drawn; what the numbers mean and their bounds are SamplingParams'."""

    logits: torch.Tensor
    """[V], finite, or minus infinity for what must not be drawn."""
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    point: float
    """In [0, 1): which part of the candidates' mass, added up in their order, lies before the end of the token's."""

    @property
    def greedy(self) -> bool:
        """Whether the first of the largest logits is taken, whatever the point."""
        return self.temperature == 0 or self.top_k == 1


class Reading(NamedTuple):
    """How much of a row of logits somebody looks at.

    That is a token (of the largest, or the one drawn), the best few, or all. A token drawn and what filters leave are
    found where the logits lie, and only if it is certain that whole rows would give the same: else those are looked at.
    """

    most: int
    """So many of the best and their places; none where the place of the largest will do."""
    temperature: float = 0.0
    top_p: float = 1.0
    min_p: float = 0.0
    """Filters that must leave fewer than `most`. 1 and 0: there are none."""
    points: tuple[float, ...] = ()
    """`Draw.point` of each row, if the token that temperature alone draws will do."""

    @property
    def filters(self) -> bool:
        """Whether the best may turn out not to be enough."""
        return self.top_p < 1 or self.min_p > 0


class Sampling(Protocol):
    """What a backend offers: `sampling.py` of its folder, under the name SAMPLING."""

    def draw(self, draws: Seq[Draw]) -> list[int]:
        """Return one token for each, -1 for a row with NaN or without a finite largest logit.

        Candidates' weights are added up in the order of `candidates`; the first sum beyond `point` times
        the last one is the token's.
        """
        ...

    def candidates(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Return weights in proportion to the probabilities, float64 [K], and tokens, int64 [K].

        In the order of the row where top_k or top_p ask for it, else as the vocabulary goes. Tokens of no
        weight may be among them.
        """
        ...

    def logprobs(
        self, logits_NV: torch.Tensor, tokens: Seq[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities of a token of each row and of its `count` most likely ones (of all, if fewer).

        Float32 [N], int64 [N, count] and float32 [N, count], the most likely first.
        """
        ...
