"""What is certain about rows of logits that lie elsewhere.

Which of them top_p and min_p leave, if the best alone are known, and which token temperature alone draws. Weights are
e^((x - largest) / temperature) in float64, there as on the host.
"""

# Shape suffixes: N rows, V vocabulary, S spans of a row, B weights of a span, K best logits.

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from truekv.core.sampling import Reading

SLACK: Final = 1e-9
"""Of a mass that was added up elsewhere, in float64: exponentials and sums there may differ in their last bits.

One after the other, 150,000 weights come to 2e-11 at the most, and exponentials to less.
"""
SPAN: Final = 512
"""Weights of which the sum is looked at before they are."""
ROOM: Final = 64 << 20
"""Bytes of weights that are there at once."""


def masses(logits_NV: torch.Tensor, best_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """Return each row's sum of weights relative to its largest logit, float64 [N], where the logits are."""
    return torch.cat([_weights(*part).sum((1, 2)) for part in _parts(logits_NV, best_N, temperature_N)])


def drawn(logits_NV: torch.Tensor, temperature_N: torch.Tensor, point_N: torch.Tensor) -> torch.Tensor:
    """Return the tokens that `Sampling.draw` draws from rows by temperature alone, int64 [N], where the logits are.

    -1 where that is not certain: where the point lies within `SLACK` of the mass at an edge of the token's share of it,
    and of rows without a distribution. Temperatures and points are float64 [N]. The host waits for nothing.
    """
    return torch.cat([_drawn(*part) for part in _parts(logits_NV, temperature_N, point_N)])


def settled(
    best_NK: torch.Tensor, places_NK: torch.Tensor, reading: Reading, mass_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return logits and places to draw from as from whole rows; None where more than the best could be drawn.

    Without filters they are those given. What is filtered out becomes minus infinity. `best_NK` falls, of equal ones
    the first comes first; `mass_N` is that of `masses`, looked at without min_p only. After min_p rows are in the order
    of the vocabulary, and top_p is left to the draw, which then knows all that it is a share of; without it they fall,
    and top_p is done.
    """
    if not reading.filters:
        return best_NK, places_NK
    scaled_NK = (best_NK.double() - best_NK.double()[:, :1]) / reading.temperature
    if reading.min_p:
        kept_NK = scaled_NK >= math.log(reading.min_p)
        if bool(kept_NK[:, -1].any()):
            return None
        places_NK, order_NK = places_NK.sort(1)
        return best_NK.masked_fill(~kept_NK, -math.inf).gather(1, order_NK), places_NK
    weights_NK = scaled_NK.exp()
    before_NK = weights_NK.cumsum(1) - weights_NK
    # A candidate stays while the mass before it is below the one asked for.
    wanted_N = reading.top_p * mass_N[:, None]
    kept_NK = before_NK < wanted_N * (1 - SLACK)
    if bool((kept_NK != (before_NK < wanted_N * (1 + SLACK))).any()) or bool(kept_NK[:, -1].any()):
        return None
    return best_NK.masked_fill(~kept_NK, -math.inf), places_NK


def _parts(logits_NV: torch.Tensor, *others_N: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield rows part by part, so many that there is room for their weights."""
    rows = max(1, ROOM // (8 * SPAN * _spans(logits_NV)))
    for start in range(0, len(logits_NV), rows):
        yield tuple(side[start : start + rows] for side in (logits_NV, *others_N))


def _spans(logits_NV: torch.Tensor) -> int:
    return -(-logits_NV.shape[1] // SPAN)


def _weights(logits_NV: torch.Tensor, best_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """Return float64 [N, S, B]: the weights of rows in their order, zeros behind them."""
    spans = _spans(logits_NV)
    weights_NSB = logits_NV.new_zeros(len(logits_NV), spans, SPAN, dtype=torch.float64)
    weights_NV = weights_NSB.view(-1, spans * SPAN)[:, : logits_NV.shape[1]]
    torch.sub(logits_NV, best_N.double()[:, None], out=weights_NV).div_(temperature_N[:, None]).exp_()
    return weights_NSB


def _drawn(logits_NV: torch.Tensor, temperature_N: torch.Tensor, point_N: torch.Tensor) -> torch.Tensor:
    weights_NSB = _weights(logits_NV, logits_NV.amax(1), temperature_N)
    sums_NS = weights_NSB.sum(2)
    ends_NS = sums_NS.cumsum(1)
    mass_N1 = ends_NS[:, -1:]
    point_N1, slack_N1 = point_N[:, None] * mass_N1, SLACK * mass_N1
    span_N1, start_N1, _ = _reached(sums_NS, ends_NS, point_N1)
    weights_NB = weights_NSB.gather(1, span_N1[:, :, None].expand(-1, -1, SPAN))[:, 0]
    place_N1, start_N1, end_N1 = _reached(weights_NB, start_N1 + weights_NB.cumsum(1), point_N1)
    # Nothing of it is true of NaN.
    certain_N1 = (start_N1 + slack_N1 < point_N1) & (point_N1 < end_N1 - slack_N1)
    return (span_N1 * SPAN + place_N1).where(certain_N1, -1)[:, 0]


def _reached(
    parts_NK: torch.Tensor, ends_NK: torch.Tensor, point_N1: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the first part of a mass that ends beyond a point, else the last one, and where it starts and ends."""
    place_N1 = (ends_NK <= point_N1).sum(1, keepdim=True).clamp_(max=parts_NK.shape[1] - 1)
    end_N1 = ends_NK.gather(1, place_N1)
    return place_N1, end_N1 - parts_NK.gather(1, place_N1), end_N1
