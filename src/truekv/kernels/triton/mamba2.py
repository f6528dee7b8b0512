"""Mamba-2's rule on a CUDA device: see kernels/reference/mamba2.py, which says what it computes.

One program per row, head and block of the head's dims: it reads its part of the state once, carries it through the
row's tokens and writes it once. Long rows go in chunks (chunks.py), as Dao and Gu ("Transformers are SSMs") do.
"""

# Shape suffixes: N tokens of a chunk, P dims of a head, S numbers of the state for each.

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.chunks import (
    LINES,
    LONG,
    OPTIONS,
    fade,
    find_row,
    laid_all,
    most_long,
    read_columns,
    write_columns,
)
from truekv.kernels.triton.timeline import PARTS_OF_A_STEP, find_part, laid_at, lay_out

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
    rates, skips = (weights[name].float().contiguous() for name in ("A", "D"))
    drafts = log["conv"].shape[1]
    walk = (step.gather, step.count, step.certain, step.replay)
    lengths = (longest, mixed.shape[1], heads, shared // size)
    grid = (triton.cdiv(head_dim, dims), heads, rows)
    carry[grid](
        *(state["state"], mixed, gates, out_THP, rates, skips, *walk, step.slot, tokens, *lengths),
        DRAFTS=drafts,
        P=head_dim,
        S=size,
        DIMS=dims,
        SIZE=numbers,
        LONG=LONG,
    )
    if longest >= LONG:
        long, chunks = most_long(step, drafts, max(mixed.shape[1], heads * head_dim))
        constants = {"DRAFTS": drafts, "P": head_dim, "S": size, **OPTIONS}
        advance[*grid[:2], long](
            *(state["state"], mixed, gates, out_THP, rates, *walk, step.slot, tokens, rows, *lengths),
            DIMS=max(16, dims),
            num_stages=1,
            **{**constants, "LINES": LINES // 2},
        )
        answer[chunks, heads](
            mixed, gates, out_THP, rates, skips, *walk, tokens, rows, *lengths, num_warps=8, **constants
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


@triton.jit(do_not_specialize=["tokens", "longest"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
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
    LONG: tl.constexpr,
):
    """One program per block of a head's dims, head and row."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    old = tl.load(replays + row).to(tl.int32)
    count, certain = tl.load(counts + row).to(tl.int32), tl.load(certains + row).to(tl.int32)
    total, kept = old + count, old + certain
    if (total == 0) | ((count >= LONG) & (certain == count)):
        return
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


@triton.jit(do_not_specialize=["tokens", "rows", "longest"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
def advance(
    states,
    mixed,
    gates,
    out,
    rates,
    gathers,
    counts,
    certains,
    replays,
    slots,
    tokens,
    rows,
    longest,
    channels,
    heads,
    groups,
    DRAFTS: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    DIMS: tl.constexpr,
    LONG: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per block of a head's dims, head and row; leaves what tokens read of the state before their chunk."""
    first_dim, head = tl.program_id(0) * DIMS, tl.program_id(1)
    row = find_row(tl.program_id(2), counts, certains, replays, rows, LONG)
    if row < 0:
        return
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    rate, dim_P = tl.load(rates + head), first_dim + tl.arange(0, DIMS)
    states += (tl.load(slots + row) * heads + head) * P * S
    gather, replayed = gathers + row.to(tl.int64) * longest, tokens + row * DRAFTS
    b, c = heads * P + (head * groups // heads) * S, heads * P + (groups + head * groups // heads) * S
    for start in range(0, total, TOKENS):
        place_N = start + tl.arange(0, TOKENS)
        inside_N = place_N < total
        at_N = laid_all(gather, place_N, total, old, replayed)
        gate_N = at_N * heads + head
        dt_N = tl.load(gates + gate_N, mask=inside_N, other=0.0)
        _, begin_N, end_N = fade(dt_N * rate)
        left = tl.exp(tl.sum(dt_N * rate, 0))
        x_NP = read_columns(mixed + head * P, at_N * channels, inside_N, first_dim, P, DIMS) * (dt_N * end_N)[:, None]
        y_NP = tl.zeros((TOKENS, DIMS), tl.float32)
        for first in range(0, S, LINES):
            c_NS = read_columns(mixed + c, at_N * channels, inside_N, first, S, LINES)
            b_NS = read_columns(mixed + b, at_N * channels, inside_N, first, S, LINES)
            h_PS = read_columns(states, dim_P * S, dim_P < P, first, S, LINES)
            y_NP = tl.dot(c_NS, tl.trans(h_PS), y_NP, input_precision=PARTS)
            h_PS = tl.dot(tl.trans(x_NP), b_NS, h_PS * left, input_precision=PARTS)
            write_columns(states, h_PS, dim_P * S, dim_P < P, first, S, LINES)
        new_N = inside_N & (place_N >= old)
        write_columns(out, y_NP * begin_N[:, None], gate_N * P, new_N, first_dim, P, DIMS)
        # The next chunk's threads read what others have stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens", "rows", "longest"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
def answer(
    mixed,
    gates,
    out,
    rates,
    skips,
    gathers,
    counts,
    certains,
    replays,
    tokens,
    rows,
    longest,
    channels,
    heads,
    groups,
    DRAFTS: tl.constexpr,
    P: tl.constexpr,
    S: tl.constexpr,
    LONG: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per chunk, head and row: add what each token reads of the chunk's own."""
    head = tl.program_id(1)
    row, start = find_part(tl.program_id(0), counts, certains, replays, rows, TOKENS, LONG)
    if row < 0:
        return
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    place_N = start + tl.arange(0, TOKENS)
    inside_N = place_N < total
    at_N = laid_all(gathers + row.to(tl.int64) * longest, place_N, total, old, tokens + row * DRAFTS)
    b, c = heads * P + (head * groups // heads) * S, heads * P + (groups + head * groups // heads) * S
    score_NN = tl.zeros((TOKENS, TOKENS), tl.float32)
    for first in range(0, S, LINES):
        c_NS = read_columns(mixed + c, at_N * channels, inside_N, first, S, LINES)
        b_NS = read_columns(mixed + b, at_N * channels, inside_N, first, S, LINES)
        score_NN = tl.dot(c_NS, tl.trans(b_NS), score_NN, input_precision=PARTS)
    gate_N = at_N * heads + head
    dt_N = tl.load(gates + gate_N, mask=inside_N, other=0.0)
    left_NN, _, _ = fade(dt_N * tl.load(rates + head))
    score_NN *= left_NN * dt_N[None, :]
    score_NN += tl.where(place_N[:, None] == place_N[None, :], tl.load(skips + head), 0.0)
    new_N = inside_N & (place_N >= old)
    for first in range(0, P, LINES):
        x_NP = read_columns(mixed + head * P, at_N * channels, inside_N, first, P, LINES)
        y_NP = read_columns(out, gate_N * P, new_N, first, P, LINES)
        y_NP = tl.dot(score_NN, x_NP, y_NP, input_precision=PARTS)
        write_columns(out, y_NP, gate_N * P, new_N, first, P, LINES)


SCAN: Final[ScanKernel] = scan
