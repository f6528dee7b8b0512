"""The largest numbers of each row and their places: the token of a greedy row, and all that top_k leaves of another.

The rest of the logits need not leave the device. A row is cut into spans of a fixed size, one program each, because a
vocabulary's only row should keep more than one processor busy. What a span has is one integer that is larger the better
it is, so the order in which spans are compared changes nothing.
"""

# Shape suffixes: N rows, P spans of a row, B numbers of a block.

from __future__ import annotations

from typing import Final

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.rows import dense

BLOCK: Final = 1024
"""Numbers that a program reads at once."""
BLOCKS = tl.constexpr(4)
"""Of one program: all of their loads are under way together."""
SPAN: Final = BLOCK * 4
LAST: Final = 0x7FFFFFFF
"""Bits of a key that say the place, counted from the last one there could be."""
LEAST = tl.constexpr(-3.4028234663852886e38)
"""The least finite number, for places where there is none."""
NONE = tl.constexpr(-(1 << 63))
SPOILT = tl.constexpr((1 << 63) - 1)
"""Of a span with a number that is not finite, and beyond what any finite number gives."""


def largest(x: torch.Tensor) -> torch.Tensor:
    """Return where the largest number of each row of [N, D] is, int64 [N]; see core/ops.py.

    Of equal ones the first, and a zero of either sign is the same zero. -1 where a number is not finite.
    """
    x = dense(x)
    rows, dim = x.shape
    places_N = torch.empty(rows, dtype=torch.int64, device=x.device)
    spans = triton.cdiv(dim, SPAN)
    if rows:
        keys_NP = torch.empty(rows, spans, dtype=torch.int64, device=x.device) if spans > 1 else places_N
        span_kernel[(rows, spans)](x, keys_NP, dim, x.stride(0), spans, ALONE=spans == 1, BLOCK=BLOCK)
        if spans > 1:
            row_kernel[(rows,)](keys_NP, places_N, spans, BLOCK_P=triton.next_power_of_2(spans), num_warps=1)
    return places_N


def best(x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the `count` largest numbers of each row of [N, D] and their places; see core/ops.py.

    No two numbers of a row have the same key, so it does not matter how torch treats equal ones.
    """
    x = dense(x)
    rows, dim = x.shape
    keys_ND = torch.empty(rows, dim, dtype=torch.int64, device=x.device)
    if rows:
        key_kernel[(rows, triton.cdiv(dim, BLOCK))](x, keys_ND, dim, x.stride(0), BLOCK=BLOCK)
    keys_NK = keys_ND.topk(count, -1).values
    places_NK = LAST - (keys_NK & LAST)
    return x.gather(1, places_NK), places_NK


@triton.jit
def span_kernel(xs, outs, dim, stride, spans, ALONE: tl.constexpr, BLOCK: tl.constexpr):
    """One span of one row; grid: (rows, spans). Its key, or where it is the row's only one its place."""
    row = tl.program_id(0).to(tl.int64)
    first_B = tl.program_id(1) * (BLOCK * BLOCKS) + tl.arange(0, BLOCK)
    most_B = tl.full([BLOCK], float("-inf"), tl.float32)
    place_B = first_B
    sound_B = first_B >= 0
    for turn in tl.static_range(BLOCKS):
        at_B = first_B + turn * BLOCK
        real_B = at_B < dim
        x_B = tl.load(xs + row * stride + at_B, mask=real_B, other=0.0).to(tl.float32)
        x_B = tl.where(real_B, x_B, LEAST)
        sound_B = sound_B & (tl.abs(x_B) < float("inf"))
        # Of equal ones the one that was there before.
        more_B = x_B > most_B
        most_B, place_B = tl.where(more_B, x_B, most_B), tl.where(more_B, at_B, place_B)
    key = tl.max(ordered(most_B, place_B, sound_B), 0)
    if ALONE:
        tl.store(outs + row, place_of(key))
    else:
        tl.store(outs + row * spans + tl.program_id(1), key)


@triton.jit
def row_kernel(keys, places, spans, BLOCK_P: tl.constexpr):
    """One row; grid: (rows,)."""
    row = tl.program_id(0).to(tl.int64)
    span_P = tl.arange(0, BLOCK_P)
    key_P = tl.load(keys + row * spans + span_P, mask=span_P < spans, other=NONE)
    tl.store(places + row, place_of(tl.max(key_P, 0)))


@triton.jit
def key_kernel(xs, keys, dim, stride, BLOCK: tl.constexpr):
    """Write a block of the keys of one row; grid: (rows, blocks)."""
    row = tl.program_id(0).to(tl.int64)
    at_B = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    x_B = tl.load(xs + row * stride + at_B, mask=at_B < dim, other=0.0).to(tl.float32)
    tl.store(keys + row * dim + at_B, ordered(x_B, at_B, tl.abs(x_B) < float("inf")), mask=at_B < dim)


@triton.jit
def ordered(x, place, sound):
    """Integers in the order of (number, from the last place to the first): the number's bits above, the place below."""
    bits = x.to(tl.int32, bitcast=True)
    # Minus zero is zero. Below it, more bits mean less.
    bits = tl.where(x == 0.0, 0, bits)
    bits = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return tl.where(sound, (bits.to(tl.int64) << 32) | (0x7FFFFFFF - place).to(tl.int64), SPOILT)


@triton.jit
def place_of(key):
    """Say where the number of a key is, -1 for one that spoils its row."""
    return tl.where(key == SPOILT, -1, 0x7FFFFFFF - (key & 0x7FFFFFFF))
