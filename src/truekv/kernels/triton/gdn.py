"""The gated delta rule on a CUDA device: see kernels/reference/gdn.py, which says what it computes.

One program per row, head and block of value dims: it reads its part of the state once, carries it through the row's
tokens and writes it once. Long rows go in chunks (chunks.py), in the form that Yang et al. ("Parallelizing Linear
Transformers with the Delta Rule over Sequence Length") give: what a token writes depends on what those before it in the
chunk have written, which is a triangular system, and its inverse needs no state.
"""

# Shape suffixes: N tokens of a chunk, D dims of a key, V of a value.

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
    drafts = log["conv"].shape[1]
    walk = (step.gather, step.count, step.certain, step.replay)
    sizes = (longest, len(mixed), mixed.shape[1], heads, keys // key_dim)
    scale = key_dim**-0.5
    grid = (triton.cdiv(value_dim, values), heads, rows)
    carry[grid](
        *(state["state"], mixed, gates, out_THV, *walk, step.slot, tokens, *sizes, scale),
        DRAFTS=drafts,
        D=key_dim,
        V=value_dim,
        KEYS=dims,
        VALUES=values,
        LONG=LONG,
    )
    if longest >= LONG:
        long, chunks = most_long(step, drafts, max(mixed.shape[1], heads * max(key_dim, value_dim)))
        shapes = (len(mixed), heads, key_dim), (len(mixed), heads, value_dim), (2, len(mixed), heads)
        reads, writes, factors = (gates.new_empty(shape) for shape in shapes)
        constants = {"DRAFTS": drafts, "D": key_dim, "V": value_dim, **OPTIONS}
        solve[chunks, heads](
            *(mixed, gates, reads, writes, factors, *walk, tokens, rows, *sizes),
            num_stages=2,
            **{**constants, "LINES": LINES // 2},
        )
        advance[*grid[:2], long](
            *(state["state"], mixed, reads, writes, factors, out_THV, *walk, step.slot, tokens, rows, *sizes),
            VALUES=max(16, values),
            num_stages=1,
            **constants,
        )
        answer[chunks, heads](
            mixed, gates, writes, out_THV, *walk, tokens, rows, *sizes, scale, num_warps=8, **constants
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


@triton.jit(do_not_specialize=["tokens", "longest", "places"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
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
    LONG: tl.constexpr,
):
    """One program per block of value dims, head and row."""
    block, head, row = tl.program_id(0), tl.program_id(1), tl.program_id(2).to(tl.int64)
    old = tl.load(replays + row).to(tl.int32)
    count, certain = tl.load(counts + row).to(tl.int32), tl.load(certains + row).to(tl.int32)
    total, kept = old + count, old + certain
    if (total == 0) | ((count >= LONG) & (certain == count)):
        return
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


@triton.jit
def _invert(lower_LL, BLOCK: tl.constexpr, PARTS: tl.constexpr):
    """Invert the identity plus a strictly lower triangle of two blocks.

    The blocks on the diagonal line by line, both of them at once; then what lies between by two products.
    """
    block_B, line_L = tl.arange(0, 2), tl.arange(0, BLOCK)
    same_B1B1 = (block_B[:, None] == block_B[None, :])[:, None, :, None]
    lower_BLBL = tl.reshape(lower_LL, (2, BLOCK, 2, BLOCK))
    lower_BLL = tl.sum(tl.where(same_B1B1, lower_BLBL, 0.0), 2)
    inverse_BLL = tl.zeros((2, BLOCK, BLOCK), tl.float32) + (line_L[:, None] == line_L[None, :])[None, :, :]
    for line in range(1, BLOCK):
        at_1L1 = (line_L == line)[None, :, None]
        # Lines above this one are done, and it refers to no others.
        row_BL = tl.sum(tl.where(at_1L1, lower_BLL, 0.0), 1)
        done_BL = tl.sum(row_BL[:, :, None] * inverse_BLL, 1)
        inverse_BLL = tl.where(at_1L1, inverse_BLL - done_BL[:, None, :], inverse_BLL)
    inverse_LL = tl.reshape(tl.where(same_B1B1, inverse_BLL[:, :, None, :], 0.0), (2 * BLOCK, 2 * BLOCK))
    both_L = tl.arange(0, 2 * BLOCK)
    between_LL = tl.where((both_L[:, None] >= BLOCK) & (both_L[None, :] < BLOCK), lower_LL, 0.0)
    between_LL = tl.dot(between_LL, inverse_LL, input_precision=PARTS)
    return inverse_LL - tl.dot(inverse_LL, between_LL, input_precision=PARTS)


@triton.jit(do_not_specialize=["tokens", "rows", "longest", "places"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
def solve(  # noqa: PLR0915 (two halves, and the second needs all of the first)
    mixed,
    gates,
    reads,
    writes,
    factors,
    gathers,
    counts,
    certains,
    replays,
    tokens,
    rows,
    longest,
    places,
    channels,
    heads,
    key_heads,
    DRAFTS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    LONG: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per chunk, head and row: what its tokens write, as far as that needs no state.

    Token by token a write is w = beta (v - S^T k), and later tokens of the chunk find it in S. Solved for all of them:
    w = writes - reads S, with the state before the chunk.
    """
    head = tl.program_id(1)
    row, start = find_part(tl.program_id(0), counts, certains, replays, rows, TOKENS, LONG)
    if row < 0:
        return
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    # In two halves: the second one finds what the first has written.
    HALF: tl.constexpr = TOKENS // 2
    gather, replayed = gathers + row.to(tl.int64) * longest, tokens + row * DRAFTS
    place1_L = start + tl.arange(0, HALF)
    place2_L = place1_L + HALF
    inside1_L, inside2_L = place1_L < total, place2_L < total
    at1_L = laid_all(gather, place1_L, total, old, replayed)
    at2_L = laid_all(gather, place2_L, total, old, replayed)
    gate1_L, gate2_L = at1_L * heads + head, at2_L * heads + head
    decays, ends = gates + places * heads, factors + places * heads
    left11_LL, begin1_L, end1_L = fade(tl.load(decays + gate1_L, mask=inside1_L, other=0.0))
    left22_LL, begin2_L, end2_L = fade(tl.load(decays + gate2_L, mask=inside2_L, other=0.0))
    after_LL = place1_L[:, None] > place1_L[None, :]
    key, value = (key_heads + head * key_heads // heads) * D, 2 * key_heads * D + head * V

    row1_L, row2_L = at1_L * channels, at2_L * channels
    product_LL, squares1_L = _products(mixed + key, row1_L, inside1_L, row1_L, inside1_L, D, LINES, PARTS)
    norm1_L = 1.0 / tl.sqrt(squares1_L + 1e-6)
    tl.store(factors + gate1_L, begin1_L, mask=inside1_L)
    tl.store(ends + gate1_L, norm1_L * end1_L * _last(begin2_L), mask=inside1_L)
    beta_L = tl.load(gates + gate1_L, mask=inside1_L, other=0.0)
    product_LL *= left11_LL * (norm1_L * beta_L)[:, None] * norm1_L[None, :]
    inverse_LL = _invert(tl.where(after_LL, product_LL, 0.0), HALF // 2, PARTS) * beta_L[None, :]
    for first in range(0, V, LINES):
        v_LV = read_columns(mixed + value, row1_L, inside1_L, first, V, LINES)
        v_LV = tl.dot(inverse_LL, v_LV, input_precision=PARTS)
        write_columns(writes, v_LV, gate1_L * V, inside1_L, first, V, LINES)
    inverse_LL *= (norm1_L * begin1_L)[None, :]
    for first in range(0, D, LINES):
        k_LD = read_columns(mixed + key, row1_L, inside1_L, first, D, LINES)
        k_LD = tl.dot(inverse_LL, k_LD, input_precision=PARTS)
        write_columns(reads, k_LD, gate1_L * D, inside1_L, first, D, LINES)
    # Other threads read what these have stored.
    tl.debug_barrier()

    product_LL, squares2_L = _products(mixed + key, row2_L, inside2_L, row2_L, inside2_L, D, LINES, PARTS)
    between_LL, _ = _products(mixed + key, row2_L, inside2_L, row1_L, inside1_L, D, LINES, PARTS)
    norm2_L = 1.0 / tl.sqrt(squares2_L + 1e-6)
    tl.store(factors + gate2_L, _last(begin1_L) * begin2_L, mask=inside2_L)
    tl.store(ends + gate2_L, norm2_L * end2_L, mask=inside2_L)
    beta_L = tl.load(gates + gate2_L, mask=inside2_L, other=0.0)
    between_LL *= (norm2_L * begin2_L)[:, None] * (norm1_L * end1_L)[None, :]
    product_LL *= left22_LL * (norm2_L * beta_L)[:, None] * norm2_L[None, :]
    inverse_LL = _invert(tl.where(after_LL, product_LL, 0.0), HALF // 2, PARTS) * beta_L[None, :]
    for first in range(0, V, LINES):
        v_LV = read_columns(mixed + value, row2_L, inside2_L, first, V, LINES)
        written_LV = read_columns(writes, gate1_L * V, inside1_L, first, V, LINES)
        v_LV -= tl.dot(between_LL, written_LV, input_precision=PARTS)
        v_LV = tl.dot(inverse_LL, v_LV, input_precision=PARTS)
        write_columns(writes, v_LV, gate2_L * V, inside2_L, first, V, LINES)
    factor_L = norm2_L * _last(begin1_L) * begin2_L
    for first in range(0, D, LINES):
        k_LD = read_columns(mixed + key, row2_L, inside2_L, first, D, LINES) * factor_L[:, None]
        read_LD = read_columns(reads, gate1_L * D, inside1_L, first, D, LINES)
        k_LD -= tl.dot(between_LL, read_LD, input_precision=PARTS)
        k_LD = tl.dot(inverse_LL, k_LD, input_precision=PARTS)
        write_columns(reads, k_LD, gate2_L * D, inside2_L, first, D, LINES)


@triton.jit
def _products(x, row_L, inside_L, other_L, inside_other_L, D: tl.constexpr, LINES: tl.constexpr, PARTS: tl.constexpr):
    """Multiply rows by other rows; also returns the squares of their lengths."""
    product_LL = tl.zeros((row_L.shape[0], other_L.shape[0]), tl.float32)
    squares_L = tl.zeros((row_L.shape[0],), tl.float32)
    for first in range(0, D, LINES):
        x_LD = read_columns(x, row_L, inside_L, first, D, LINES)
        other_LD = read_columns(x, other_L, inside_other_L, first, D, LINES)
        squares_L += tl.sum(x_LD * x_LD, 1)
        product_LL = tl.dot(x_LD, tl.trans(other_LD), product_LL, input_precision=PARTS)
    return product_LL, squares_L


@triton.jit
def _last(x_L):
    """Return the last of a few numbers."""
    return tl.sum(tl.where(tl.arange(0, x_L.shape[0]) == x_L.shape[0] - 1, x_L, 0.0), 0)


@triton.jit(do_not_specialize=["tokens", "rows", "longest", "places"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
def advance(
    states,
    mixed,
    reads,
    writes,
    factors,
    out,
    gathers,
    counts,
    certains,
    replays,
    slots,
    tokens,
    rows,
    longest,
    places,
    channels,
    heads,
    key_heads,
    DRAFTS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    VALUES: tl.constexpr,
    LONG: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per block of value dims, head and row; leaves what is written, and what queries read of the state."""
    first_value, head = tl.program_id(0) * VALUES, tl.program_id(1)
    row = find_row(tl.program_id(2), counts, certains, replays, rows, LONG)
    if row < 0:
        return
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    line_D = tl.arange(0, LINES)
    states += (tl.load(slots + row) * heads + head) * D * V
    gather, replayed = gathers + row.to(tl.int64) * longest, tokens + row * DRAFTS
    query, key = (head * key_heads // heads) * D, (key_heads + head * key_heads // heads) * D
    for start in range(0, total, TOKENS):
        place_N = start + tl.arange(0, TOKENS)
        inside_N = place_N < total
        at_N = laid_all(gather, place_N, total, old, replayed)
        gate_N = at_N * heads + head
        seen_NV = tl.zeros((TOKENS, VALUES), tl.float32)
        o_NV = tl.zeros((TOKENS, VALUES), tl.float32)
        for first in range(0, D, LINES):
            q_ND = read_columns(mixed + query, at_N * channels, inside_N, first, D, LINES)
            r_ND = read_columns(reads, gate_N * D, inside_N, first, D, LINES)
            s_DV = read_columns(states, (first + line_D) * V, first + line_D < D, first_value, V, VALUES)
            seen_NV = tl.dot(r_ND, s_DV, seen_NV, input_precision=PARTS)
            o_NV = tl.dot(q_ND, s_DV, o_NV, input_precision=PARTS)
        begin_N = tl.load(factors + gate_N, mask=inside_N, other=0.0)
        end_N = tl.load(factors + (places * heads + gate_N), mask=inside_N, other=0.0)
        w_NV = read_columns(writes, gate_N * V, inside_N, first_value, V, VALUES) - seen_NV
        write_columns(writes, w_NV, gate_N * V, inside_N, first_value, V, VALUES)
        write_columns(out, o_NV * begin_N[:, None], gate_N * V, inside_N & (place_N >= old), first_value, V, VALUES)
        left = tl.sum(tl.where(place_N == tl.minimum(start + TOKENS, total) - 1, begin_N, 0.0), 0)
        w_NV *= end_N[:, None]
        for first in range(0, D, LINES):
            k_ND = read_columns(mixed + key, at_N * channels, inside_N, first, D, LINES)
            s_DV = read_columns(states, (first + line_D) * V, first + line_D < D, first_value, V, VALUES) * left
            s_DV = tl.dot(tl.trans(k_ND), w_NV, s_DV, input_precision=PARTS)
            write_columns(states, s_DV, (first + line_D) * V, first + line_D < D, first_value, V, VALUES)
        # The next chunk's threads read what others have stored.
        tl.debug_barrier()


@triton.jit(do_not_specialize=["tokens", "rows", "longest", "places"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
def answer(
    mixed,
    gates,
    writes,
    out,
    gathers,
    counts,
    certains,
    replays,
    tokens,
    rows,
    longest,
    places,
    channels,
    heads,
    key_heads,
    scale,
    DRAFTS: tl.constexpr,
    D: tl.constexpr,
    V: tl.constexpr,
    LONG: tl.constexpr,
    TOKENS: tl.constexpr,
    LINES: tl.constexpr,
    PARTS: tl.constexpr,
):
    """One program per chunk, head and row: add what queries read of the chunk's writes; make unit vectors of them."""
    head = tl.program_id(1)
    row, start = find_part(tl.program_id(0), counts, certains, replays, rows, TOKENS, LONG)
    if row < 0:
        return
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    place_N = start + tl.arange(0, TOKENS)
    inside_N = place_N < total
    at_N = laid_all(gathers + row.to(tl.int64) * longest, place_N, total, old, tokens + row * DRAFTS)
    query, key = (head * key_heads // heads) * D, (key_heads + head * key_heads // heads) * D
    query_squares_N = tl.zeros((TOKENS,), tl.float32)
    squares_N = tl.zeros((TOKENS,), tl.float32)
    score_NN = tl.zeros((TOKENS, TOKENS), tl.float32)
    for first in range(0, D, LINES):
        q_ND = read_columns(mixed + query, at_N * channels, inside_N, first, D, LINES)
        k_ND = read_columns(mixed + key, at_N * channels, inside_N, first, D, LINES)
        query_squares_N += tl.sum(q_ND * q_ND, 1)
        squares_N += tl.sum(k_ND * k_ND, 1)
        score_NN = tl.dot(q_ND, tl.trans(k_ND), score_NN, input_precision=PARTS)
    gate_N = at_N * heads + head
    left_NN, _, _ = fade(tl.load(gates + (places * heads + gate_N), mask=inside_N, other=0.0))
    score_NN *= left_NN * (1.0 / tl.sqrt(squares_N + 1e-6))[None, :]
    query_norm_N = 1.0 / tl.sqrt(query_squares_N + 1e-6) * scale
    new_N = inside_N & (place_N >= old)
    for first in range(0, V, LINES):
        w_NV = read_columns(writes, gate_N * V, inside_N, first, V, LINES)
        o_NV = read_columns(out, gate_N * V, new_N, first, V, LINES)
        o_NV = tl.dot(score_NN, w_NV, o_NV, input_precision=PARTS) * query_norm_N[:, None]
        write_columns(out, o_NV, gate_N * V, new_N, first, V, LINES)


SCAN: Final[ScanKernel] = scan
