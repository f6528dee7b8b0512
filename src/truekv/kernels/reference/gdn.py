"""The gated delta rule (GDN), token by token: Qwen3-Next's and Qwen3.5's linear attention.

S <- exp(g) S;  S <- S + k (beta (v - S^T k))^T;  out = S^T q.   (Yang et al., "Gated Delta Networks")

Legend: B rows, T new tokens, N places of a row's timeline, h key heads, H value heads, D dim of a
key, V dim of a value, C = 2 h D + H V convolved channels, K taps.
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

_EPSILON = 1e-6


def scan(
    layer: Recurrent,  # noqa: ARG001 (every size is read off the tensors)
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    log: Mapping[str, torch.Tensor],
    step: Step,
) -> torch.Tensor:
    """Return float32 [T, H, V].

    `inputs`: "conv" [T, C], the q | k | v channels before convolution, q and k as h heads of D and v
    as H heads of V; "beta" [T, H] after its sigmoid; "decay" [T, H], the log decay g <= 0. `weights`:
    "conv" [C, K]. `state`: "state" [slots, H, D, V] float32, "conv" [slots, C, K - 1]. `log`: the
    inputs of draft tokens, [slots, R, ...].
    """
    timeline = unroll(inputs, state["conv"], log, step)
    _, value_heads, key_dim, value_dim = state["state"].shape
    mixed_BNC = convolve(timeline, weights["conv"])
    keys = (mixed_BNC.shape[-1] - value_heads * value_dim) // 2
    q, k, v = torch.split(mixed_BNC, [keys, keys, value_heads * value_dim], -1)
    group = value_heads * key_dim // keys
    q_BNHD = _normalised(_heads(q, key_dim)).repeat_interleave(group, 2) * key_dim**-0.5
    k_BNHD = _normalised(_heads(k, key_dim)).repeat_interleave(group, 2)
    v_BNHV = _heads(v, value_dim)
    beta_BNH1 = timeline.inputs["beta"].float()[..., None]
    keep_BNH11 = timeline.inputs["decay"].float().exp()[..., None, None]

    s_BHDV = state["state"][step.slot]
    saved_BHDV = s_BHDV
    drafts = log["conv"].shape[1] > 0
    out: list[torch.Tensor] = []
    tokens = zip(
        *(x.unbind(1) for x in (q_BNHD[..., None], k_BNHD[..., None], v_BNHV, beta_BNH1, keep_BNH11)),
        timeline.folds(),
        strict=True,
    )
    # Products are multiplied and summed, not matmul'd: a matmul's rounding depends on the batch.
    for q_BHD1, k_BHD1, v_BHV, beta_BH1, keep_BH11, folds_B in tokens:
        s_BHDV = s_BHDV * keep_BH11
        error_BHV = (v_BHV - (s_BHDV * k_BHD1).sum(2)) * beta_BH1
        s_BHDV = s_BHDV + k_BHD1 * error_BHV[:, :, None]
        out.append((s_BHDV * q_BHD1).sum(2))
        if drafts:
            saved_BHDV = torch.where(folds_B[:, None, None, None], s_BHDV, saved_BHDV)
    state["state"][step.slot] = saved_BHDV if drafts else s_BHDV
    save_tail(timeline, state["conv"])
    save_drafts(timeline, log)
    return timeline.ragged(torch.stack(out, 1))


def _heads(x: torch.Tensor, dim: int) -> torch.Tensor:
    return x.reshape(*x.shape[:-1], -1, dim)


def _normalised(x: torch.Tensor) -> torch.Tensor:
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + _EPSILON)


SCAN: Final[ScanKernel] = scan
