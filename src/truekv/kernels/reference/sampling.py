"""Drawing tokens in plain torch, row by row: the specification.

No vocabulary is sorted as long as few of it can be drawn: the largest of each 64 numbers is known after one pass at
the speed of memory, and what is wanted lies in few of those blocks.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Seq

    from truekv.core.sampling import Draw, Sampling

_BLOCK: Final = 64


class ReferenceSampling:
    """The operations of core/sampling.py."""

    def draw(self, draws: Seq[Draw]) -> list[int]:
        """Draw row after row."""
        return [self._token(draw) for draw in draws]

    def candidates(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (weights, tokens) after temperature and filters."""
        logits_V = draw.logits
        if draw.greedy:
            return torch.ones(1, dtype=torch.float64), torch.tensor([largest(logits_V)])
        top = logits_V.max()
        if draw.top_k:
            values_K, tokens_K = best(logits_V, draw.top_k)
            scaled_K = _scaled(values_K, top, draw.temperature)
            if draw.min_p:
                kept_K = _reach(scaled_K, draw.min_p)
                scaled_K, tokens_K = scaled_K[kept_K], tokens_K[kept_K]
            return _nucleus(torch.softmax(scaled_K, dim=0), tokens_K, draw.top_p)
        scaled_V = _scaled(logits_V, top, draw.temperature)
        if draw.min_p:
            tokens_K = _reach(scaled_V, draw.min_p).nonzero().flatten()
            return _nucleus(torch.softmax(scaled_V[tokens_K], dim=0), tokens_K, draw.top_p)
        return _nucleus(torch.softmax(scaled_V, dim=0), torch.arange(len(scaled_V)), draw.top_p)

    def logprobs(
        self, logits_NV: torch.Tensor, tokens: Seq[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return a log-softmax at the tokens and at the best ones."""
        logprobs_NV = torch.log_softmax(logits_NV.double(), dim=1).float()
        chosen_N = logprobs_NV.gather(1, torch.tensor(tokens, dtype=torch.int64)[:, None])[:, 0]
        places_NK = torch.stack([best(row_V, count)[1] for row_V in logits_NV])
        return chosen_N, places_NK, logprobs_NV.gather(1, places_NK)

    def _token(self, draw: Draw) -> int:
        if not bool(draw.logits.max().isfinite()):
            return -1
        weights_K, tokens_K = self.candidates(draw)
        cumulated_K = weights_K.cumsum(0)
        # Below the whole mass, so the first place beyond it exists and has a weight of its own.
        point = draw.point * float(cumulated_K[-1])
        return int(tokens_K[int(torch.searchsorted(cumulated_K, point, right=True))])


def _scaled(logits_K: torch.Tensor, top: torch.Tensor, temperature: float) -> torch.Tensor:
    """Return float64 logits over the temperature."""
    # The largest logit is taken off first: a tiny temperature then gives -inf and 0, never inf - inf.
    return (logits_K.double() - top) / temperature


def _reach(scaled_K: torch.Tensor, min_p: float) -> torch.Tensor:
    """Whether tokens are likely enough, relative to the best, which stands at 0 and always is."""
    return scaled_K >= math.log(min_p)


def _nucleus(weights_K: torch.Tensor, tokens_K: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Apply top-p to candidates."""
    if mass == 1:
        return weights_K, tokens_K
    weights_K, places_K = nucleus(weights_K, mass)
    return weights_K, tokens_K[places_K]


def largest(row_V: torch.Tensor) -> int:
    """Return the place of the largest of a row, of equal ones the first."""
    blocks = len(row_V) // _BLOCK
    if not blocks:
        return int(row_V.argmax())
    start = _BLOCK * int(_peaks(row_V).argmax())
    place = start + int(row_V[start : start + _BLOCK].argmax())
    rest_V = row_V[blocks * _BLOCK :]
    if len(rest_V) and bool(rest_V.max() > row_V[place]):
        return blocks * _BLOCK + int(rest_V.argmax())
    return place


def best(row_V: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest of a row (or all of a shorter one) and their places.

    The largest first, of equal ones the first.
    """
    places_N = torch.arange(len(row_V))
    if 0 < 2 * count < len(row_V) // _BLOCK:
        # A block whose largest number is not among the `count` largest of all blocks holds none of the wanted.
        rest_V = row_V[len(row_V) // _BLOCK * _BLOCK :]
        peaks_N = torch.cat([_peaks(row_V), rest_V.max()[None]]) if len(rest_V) else _peaks(row_V)
        places_N = at_least(row_V, float(peaks_N.topk(count).values[-1]))
    sorted_N, order_N = row_V[places_N].sort(descending=True, stable=True)
    return sorted_N[:count], places_N[order_N[:count]]


def at_least(row_V: torch.Tensor, bound: float) -> torch.Tensor:
    """Return the places of numbers that are not below a bound, in order."""
    places_N = _places((_peaks(row_V) >= bound).nonzero().flatten(), len(row_V))
    return places_N[row_V[places_N] >= bound]


def nucleus(weights_V: torch.Tensor, mass: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the smallest set of weights that sums to `mass` or more, largest first, and their places.

    The weights sum to 1. Of equal ones the first are taken.
    """
    for bound in _bounds(float(weights_V.max()), mass, len(weights_V)):
        places_N = at_least(weights_V, bound)
        if float(weights_V[places_N].sum()) >= mass:
            break
        if 8 * len(places_N) > len(weights_V):  # a sort costs no more than looking further
            places_N = torch.arange(len(weights_V))
            break
    else:
        places_N = torch.arange(len(weights_V))
    sorted_N, order_N = weights_V[places_N].sort(descending=True, stable=True)
    # A candidate stays while the mass before it is below the one asked for, so the best one always does.
    kept_N = (sorted_N.cumsum(0) - sorted_N) < mass
    return sorted_N[kept_N], places_N[order_N[kept_N]]


def _bounds(largest: float, mass: float, count: int) -> Iterator[float]:
    """Yield ever smaller weights; all that are below the last one cannot make up what `mass` leaves of 1."""
    last, bound = (1 - mass) / count, largest / 64
    while bound > last:
        yield bound
        bound /= 16
    yield last


def _peaks(row_V: torch.Tensor) -> torch.Tensor:
    return row_V[: len(row_V) // _BLOCK * _BLOCK].view(-1, _BLOCK).amax(1)


def _places(blocks_N: torch.Tensor, count: int) -> torch.Tensor:
    """Return the places of some blocks, and those beyond the last whole block."""
    whole = count // _BLOCK * _BLOCK
    inside = (blocks_N[:, None] * _BLOCK + torch.arange(_BLOCK)).flatten()
    return torch.cat([inside, torch.arange(whole, count)])


SAMPLING: Final[Sampling] = ReferenceSampling()
