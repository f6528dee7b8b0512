"""The gated delta rule on a CUDA device: see kernels/reference/gdn.py, which says what it computes.

One program per row, head and block of value dims: it reads its part of the state once, carries it through the row's
tokens and writes it once. Token by token also in a long prompt, so that a token's bits depend on no chunk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.timeline import laid_at, lay_out

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step
    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent

VALUES: Final = 32
"""Most value dims of one program: whole cache lines of the state."""
NUMBERS: Final = 4096
"""Most numbers of the state in one program; never chosen by the batch, which would change the bits."""


def scan(
    layer: Recurrent,  # noqa: ARG001 (every size is read off the tensors)
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    log: Mapping[str, torch.Tensor],
    step: Step,
) -> torch.Tensor:
    """Return float32 [T, H, V]; arguments and meaning are those of kernels/reference/gdn.py."""
    mixed, gates = lay_out(inputs, weights, state["conv"], log, step, ("beta", "decay"))
    _, heads, key_dim, value_dim = state["state"].shape
    tokens, (rows, longest) = len(inputs["conv"]), step.gather.shape
    keys = (mixed.shape[1] - heads * value_dim) // 2
    # Tokens of no row come out as zeros.
    out_THV = torch.zeros(tokens, heads, value_dim, dtype=torch.float32, device=mixed.device)
    dims = triton.next_power_of_2(key_dim)
    values = min(VALUES, triton.next_power_of_2(value_dim), max(1, NUMBERS // dims))
    carry[(triton.cdiv(value_dim, values), heads, rows)](
        *(state["state"], mixed, gates, out_THV),
        *(step.gather, step.count, step.certain, step.replay, step.slot),
        *(tokens, longest, len(mixed), mixed.shape[1], heads),
        keys // key_dim,
        key_dim**-0.5,
        DRAFTS=log["conv"].shape[1],
        D=key_dim,
        V=value_dim,
        KEYS=dims,
        VALUES=values,
    )
    return out_THV


@triton.jit
def _read(mixed, gates, at, places, channels, heads, key_heads, head, key, value, D: tl.constexpr, V: tl.constexpr):
    """One token's query, key, value, beta and decay, as they lie."""
    # One address in 64 bits, and the rest in 32, which take half the registers.
    row = mixed + at * channels
    at_head = row + ((head * key_heads // heads) * D + key)
    q = tl.load(at_head, mask=key < D, other=0.0)
    k = tl.load(at_head + key_heads * D, mask=key < D, other=0.0)
    v = tl.load(row + (2 * key_heads * D + head * V + value), mask=value < V, other=0.0)
    beta = tl.load(gates + at * heads + head)
    decay = tl.load(gates + (places + at) * heads + head)
    return q, k, v, beta, decay


@triton.jit
def _fold(s, q, k, v, beta, decay, scale):
    """Carry the state [KEYS, VALUES] over one token; returns it and the token's output [VALUES]."""
    q = q * (1.0 / tl.sqrt(tl.sum(q * q, 0) + 1e-6)) * scale
    k = k * (1.0 / tl.sqrt(tl.sum(k * k, 0) + 1e-6))
    s = s * tl.exp(decay)
    error = (v - tl.sum(s * k[:, None], 0)) * beta
    s = s + k[:, None] * error[None, :]
    return s, tl.sum(s * q[:, None], 0)


@triton.jit(do_not_specialize=["tokens", "longest", "places"])
def carry(
    states,
    mixed,
    gates,
    out,
    gathers,
    counts,
    certains,
    replays,
    slots,
    tokens,
    longest,
    places,
    channels,
    heads,
    key_heads,
    scale,
    DRAFTS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    KEYS: tl.constexpr,
    VALUES: tl.constexpr,
):
    """One program per block of value dims, head and row."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    if total == 0:
        return
    kept = old + tl.load(certains + row).to(tl.int32)
    key, value = tl.arange(0, KEYS), block * VALUES + tl.arange(0, VALUES)
    real = (key < D)[:, None] & (value < V)[None, :]
    held = states + (tl.load(slots + row) * heads + head) * D * V + (key[:, None] * V + value[None, :])
    s = tl.load(held, mask=real, other=0.0)
    gather, replayed = gathers + row * longest, tokens + row * DRAFTS
    at = laid_at(gather, 0, old, replayed)
    q, k, v, beta, decay = _read(mixed, gates, at, places, channels, heads, key_heads, head, key, value, D, V)
    for place in range(0, total):
        # The next token is on its way while this one is folded.
        next_at = laid_at(gather, tl.minimum(place + 1, total - 1), old, replayed)
        next_q, next_k, next_v, next_beta, next_decay = _read(
            mixed, gates, next_at, places, channels, heads, key_heads, head, key, value, D, V
        )
        if place == kept:
            tl.store(held, s, mask=real)
        s, o = _fold(s, q, k, v, beta, decay, scale)
        tl.store(out + (at * heads + head) * V + value, o, mask=(value < V) & (place >= old))
        at, q, k, v, beta, decay = next_at, next_q, next_k, next_v, next_beta, next_decay
    if kept == total:
        tl.store(held, s, mask=real)


SCAN: Final[ScanKernel] = scan
