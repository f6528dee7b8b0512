"""Which experts a token takes, in one launch: torch needs a dozen, in every layer of a step.

Of equal scores the first expert is taken. A score that is not a number is taken too, so whoever looks at the hidden
states afterwards sees it.
"""

# Shape suffixes: T tokens, E experts, K experts per token, G groups, S experts of a group.

from __future__ import annotations

from typing import TYPE_CHECKING

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.largest import NONE, ordered, place_of

if TYPE_CHECKING:
    from truekv.core.ops import Routing


def route(logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing) -> tuple[torch.Tensor, torch.Tensor]:
    """Choose experts by float32 logits [T, E]: weights [T, K] and indices int64 [T, K]; see core/ops.py."""
    logits = logits.contiguous()
    tokens, experts = logits.shape
    weights_TK = torch.empty(tokens, routing.per_token, dtype=torch.float32, device=logits.device)
    chosen_TK = torch.empty(tokens, routing.per_token, dtype=torch.int64, device=logits.device)
    if tokens:
        size = experts // routing.groups
        route_kernel[(tokens,)](
            *(logits, logits if bias is None else bias, weights_TK, chosen_TK, routing.scale),
            SOFTMAX=routing.score == "softmax",
            BIASED=bias is not None,
            NORMALISED=routing.normalised,
            GROUPS=routing.groups,
            SIZE=size,
            KEPT=routing.kept_groups,
            TAKEN=routing.per_token,
            BLOCK_G=triton.next_power_of_2(routing.groups),
            BLOCK_S=triton.next_power_of_2(size),
            BLOCK_K=triton.next_power_of_2(routing.per_token),
        )
    return weights_TK, chosen_TK


@triton.jit
def route_kernel(
    logits,
    bias,
    weights,
    chosen,
    scale,
    SOFTMAX: tl.constexpr,
    BIASED: tl.constexpr,
    NORMALISED: tl.constexpr,
    GROUPS: tl.constexpr,
    SIZE: tl.constexpr,
    KEPT: tl.constexpr,
    TAKEN: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_S: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """One token."""
    token = tl.program_id(0).to(tl.int64)
    group_G, in_group_S = tl.arange(0, BLOCK_G), tl.arange(0, BLOCK_S)
    place_GS = group_G[:, None] * SIZE + in_group_S[None, :]
    real_GS = (group_G < GROUPS)[:, None] & (in_group_S < SIZE)[None, :]
    logit_GS = tl.load(logits + token * (GROUPS * SIZE) + place_GS, mask=real_GS, other=float("-inf"))
    if SOFTMAX:
        score_GS = tl.exp(logit_GS - tl.max(tl.max(logit_GS, 1), 0))
        score_GS = score_GS / tl.sum(tl.sum(score_GS, 1), 0)
    else:
        score_GS = 1.0 / (1.0 + tl.exp(-logit_GS))
    choice_GS = score_GS
    if BIASED:
        choice_GS += tl.load(bias + place_GS, mask=real_GS, other=0.0)
    choice_GS = tl.where(real_GS, choice_GS, float("-inf"))
    if GROUPS > KEPT:
        best_G = tl.max(choice_GS, 1)
        if not SOFTMAX:
            # The two best; of equal ones the first is the best.
            first_G = tl.min(tl.where(choice_GS == best_G[:, None], in_group_S[None, :], SIZE), 1)
            others_GS = tl.where(in_group_S[None, :] == first_G[:, None], float("-inf"), choice_GS)
            best_G += tl.max(others_GS, 1)
        ahead_GG = (best_G[None, :] > best_G[:, None]) | (
            (best_G[None, :] == best_G[:, None]) & (group_G[None, :] < group_G[:, None])
        )
        kept_G = tl.sum(ahead_GG.to(tl.int32), 1) < KEPT
        choice_GS = tl.where(kept_G[:, None], choice_GS, float("-inf"))
    # What is not a number is taken before all others, whatever its sign. No two keys are equal.
    choice_GS = tl.where(choice_GS == choice_GS, choice_GS, float("nan"))  # noqa: PLR0124
    key_GS = tl.where(real_GS, ordered(choice_GS, place_GS, real_GS), NONE)
    taken_K = tl.arange(0, BLOCK_K)
    chosen_K, weight_K = tl.zeros((BLOCK_K,), tl.int64), tl.zeros((BLOCK_K,), tl.float32)
    for turn in range(TAKEN):
        place = place_of(tl.max(tl.max(key_GS, 1), 0))
        weight = tl.sum(tl.sum(tl.where(place_GS == place, score_GS, 0.0), 1), 0)
        chosen_K = tl.where(taken_K == turn, place, chosen_K)
        weight_K = tl.where(taken_K == turn, weight, weight_K)
        key_GS = tl.where(place_GS == place, NONE, key_GS)
    if NORMALISED:
        # The floor is transformers': it matters only where every chosen score underflows.
        weight_K = weight_K / (tl.sum(weight_K, 0) + 1e-20)
    at_K = token * TAKEN + taken_K
    tl.store(weights + at_K, weight_K * scale, mask=taken_K < TAKEN)
    tl.store(chosen + at_K, chosen_K, mask=taken_K < TAKEN)
