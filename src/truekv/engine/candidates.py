"""The few tokens of a vocabulary that can be drawn, found without sorting all of them.

The largest of each 64 numbers is known after one pass at the speed of memory, and what is wanted lies in few of those
blocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

_BLOCK: Final = 64


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
    """Return the `count` largest of a row (or all of a shorter one), largest first, and their places."""
    blocks = len(row_V) // _BLOCK
    if blocks <= 2 * count:
        return row_V.topk(min(count, len(row_V)))
    # A block whose largest number is not among the `count` largest of all blocks holds none of the wanted.
    places_N = _places(_peaks(row_V).topk(count).indices, len(row_V))
    found = row_V[places_N].topk(count)
    return found.values, places_N[found.indices]


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
