"""Mamba-2's rule on a CUDA device: see kernels/reference/mamba2.py, which says what it computes.

One program per row, head and block of the head's dims: it reads its part of the state once, carries it through the
row's tokens and writes it once. Token by token also in a long prompt, so that a token's bits depend on no chunk.
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

DIMS: Final = 32
"""Most dims of a head in one program."""
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
    """Return float32 [T, H, P]; arguments and meaning are those of kernels/reference/mamba2.py."""
    mixed, gates = lay_out(inputs, weights, state["conv"], log, step, ("dt",))
    _, heads, head_dim, size = state["state"].shape
    tokens, (rows, longest) = len(inputs["conv"]), step.gather.shape
    shared = (mixed.shape[1] - heads * head_dim) // 2
    # Tokens of no row come out as zeros.
    out_THP = torch.zeros(tokens, heads, head_dim, dtype=torch.float32, device=mixed.device)
    numbers = triton.next_power_of_2(size)
    dims = min(DIMS, triton.next_power_of_2(head_dim), max(1, NUMBERS // numbers))
    carry[(triton.cdiv(head_dim, dims), heads, rows)](
        *(state["state"], mixed, gates, out_THP),
        *(weights[name].float().contiguous() for name in ("A", "D")),
        *(step.gather, step.count, step.certain, step.replay, step.slot),
        *(tokens, longest, mixed.shape[1], heads, shared // size),
        DRAFTS=log["conv"].shape[1],
        P=head_dim,
        S=size,
        DIMS=dims,
        SIZE=numbers,
    )
    return out_THP


@triton.jit
def _read(mixed, gates, at, channels, heads, groups, head, dim, state, P: tl.constexpr, S: tl.constexpr):
    """One token's x, B, C and dt, as they lie."""
    # One address in 64 bits, and the rest in 32, which take half the registers.
    row = mixed + at * channels
    group = heads * P + (head * groups // heads) * S + state
    x = tl.load(row + (head * P + dim), mask=dim < P, other=0.0)
    b = tl.load(row + group, mask=state < S, other=0.0)
    c = tl.load(row + (group + groups * S), mask=state < S, other=0.0)
    return x, b, c, tl.load(gates + at * heads + head)


@triton.jit(do_not_specialize=["tokens", "longest"])
def carry(
    states,
    mixed,
    gates,
    out,
    rates,
    skips,
    gathers,
    counts,
    certains,
    replays,
    slots,
    tokens,
    longest,
    channels,
    heads,
    groups,
    DRAFTS: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    DIMS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """One program per block of a head's dims, head and row."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    if total == 0:
        return
    kept = old + tl.load(certains + row).to(tl.int32)
    rate, skip = tl.load(rates + head), tl.load(skips + head)
    dim, state = block * DIMS + tl.arange(0, DIMS), tl.arange(0, SIZE)
    real = (dim < P)[:, None] & (state < S)[None, :]
    held = states + (tl.load(slots + row) * heads + head) * P * S + (dim[:, None] * S + state[None, :])
    h = tl.load(held, mask=real, other=0.0)
    gather, replayed = gathers + row * longest, tokens + row * DRAFTS
    at = laid_at(gather, 0, old, replayed)
    x, b, c, dt = _read(mixed, gates, at, channels, heads, groups, head, dim, state, P, S)
    for place in range(0, total):
        # The next token is on its way while this one is folded.
        next_at = laid_at(gather, tl.minimum(place + 1, total - 1), old, replayed)
        next_x, next_b, next_c, next_dt = _read(mixed, gates, next_at, channels, heads, groups, head, dim, state, P, S)
        if place == kept:
            tl.store(held, h, mask=real)
        h = h * tl.exp(dt * rate) + (dt * x)[:, None] * b[None, :]
        y = tl.sum(h * c[None, :], 1) + skip * x
        tl.store(out + (at * heads + head) * P + dim, y, mask=(dim < P) & (place >= old))
        at, x, b, c, dt = next_at, next_x, next_b, next_c, next_dt
    if kept == total:
        tl.store(held, h, mask=real)


SCAN: Final[ScanKernel] = scan
