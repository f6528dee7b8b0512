"""What top_p and min_p leave of a row of logits of which the best alone are known."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from truekv.core.lazy import torch
    from truekv.core.sampling import Reading

SLACK: Final = 1e-9
"""Of a mass that was added up elsewhere, in float64: exponentials and sums there may differ in their last bits."""


def masses(logits_NV: torch.Tensor, best_N: torch.Tensor, temperature_N: torch.Tensor) -> torch.Tensor:
    """Return each row's sum of weights relative to its largest logit, float64 [N], where the logits are."""
    scaled_NV = (logits_NV.double() - best_N.double()[:, None]) / temperature_N[:, None]
    return scaled_NV.exp_().sum(1)


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
