"""The selective state space rule of Mamba-2, token by token (Dao and Gu, "Transformers are SSMs").

h <- exp(dt A) h + dt B x;  y = C h + D x.

Legend: B rows, T new tokens, N places of a row's timeline, H heads, P dim of a head, G groups that
share B and C, S state size, E = H P + 2 G S convolved channels, K taps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.kernels.reference.timeline import convolve, save_drafts, save_tail, unroll

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step
    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent


def scan(
    layer: Recurrent,  # noqa: ARG001 (every size is read off the tensors)
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    log: Mapping[str, torch.Tensor],
    step: Step,
) -> torch.Tensor:
    """Return float32 [T, H, P].

    `inputs`: "conv" [T, E], the x | B | C channels before convolution; "dt" [T, H], after bias,
    softplus and clamp. `weights`: "conv" [E, K], optionally "conv_bias" [E], "A" [H] (negative), "D"
    [H]. `state`: "state" [slots, H, P, S] float32, "conv" [slots, E, K - 1]. `log`: the inputs of
    draft tokens, [slots, R, ...].
    """
    timeline = unroll(inputs, state["conv"], log, step)
    _, heads, head_dim, size = state["state"].shape
    mixed_BNE = convolve(timeline, weights["conv"], weights.get("conv_bias"))
    shared = (mixed_BNE.shape[-1] - heads * head_dim) // 2
    x, b, c = torch.split(mixed_BNE, [heads * head_dim, shared, shared], -1)
    group = heads * size // shared
    x_BNHP = x.reshape(*x.shape[:-1], heads, head_dim)
    b_BNHS = b.reshape(*b.shape[:-1], -1, size).repeat_interleave(group, 2)
    c_BNHS = c.reshape(*c.shape[:-1], -1, size).repeat_interleave(group, 2)
    dt_BNH = timeline.inputs["dt"].float()
    # dt = 0 beyond a row's tokens: nothing decays and nothing enters.
    keep_BNH11 = (dt_BNH * weights["A"].float()).exp()[..., None, None]
    entering_BNHP1 = (dt_BNH[..., None] * x_BNHP)[..., None]

    h_BHPS = state["state"][step.slot]
    saved_BHPS = h_BHPS
    drafts = log["conv"].shape[1] > 0
    out: list[torch.Tensor] = []
    tokens = zip(
        *(t.unbind(1) for t in (entering_BNHP1, b_BNHS[..., None, :], c_BNHS[..., None, :], keep_BNH11)),
        timeline.folds(),
        strict=True,
    )
    # Products are multiplied and summed, not matmul'd: a matmul's rounding depends on the batch.
    for entering_BHP1, b_BH1S, c_BH1S, keep_BH11, folds_B in tokens:
        h_BHPS = h_BHPS * keep_BH11 + entering_BHP1 * b_BH1S
        out.append((h_BHPS * c_BH1S).sum(-1))
        if drafts:
            saved_BHPS = torch.where(folds_B[:, None, None, None], h_BHPS, saved_BHPS)
    state["state"][step.slot] = saved_BHPS if drafts else h_BHPS
    save_tail(timeline, state["conv"])
    save_drafts(timeline, log)
    y_BNHP = torch.stack(out, 1) + weights["D"].float()[:, None] * x_BNHP
    return timeline.ragged(y_BNHP)


SCAN: Final[ScanKernel] = scan
