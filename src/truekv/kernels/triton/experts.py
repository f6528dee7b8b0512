"""Routed experts as two grouped products, without a number that the host would have to know.

Legend: T tokens, K experts per token, M = T K pairs of both, E experts, C features in and out, I inner features, F
outputs of the first map (2 I or I), G tiles.

Pairs are sorted by their expert, and each expert's are cut into tiles of as many rows as one program multiplies. How
many tiles there are depends on the choice, but never more than G, and the others end at once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, NamedTuple

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.rows import activate, narrow

if TYPE_CHECKING:
    from collections.abc import Iterable

    from truekv.core.ops import Activation, Expert

EMULATED = tl.constexpr(INTERPRETED)
"""The interpreter multiplies the bits of bfloat16 as if they were integers."""
TILES: Final = (16, 64)
"""Rows of a tile: few where experts have few tokens."""
COMPARED: Final = 4096
"""Most pairs whose order is found by comparing each with all."""
PAIRS: Final = 64
"""Of them that one program places."""
MIXED: Final = 1024
"""Columns that one program sums up."""
COLUMNS: Final = 64
DEPTH: Final = 64


class Tiles(NamedTuple):
    """Which pairs each program multiplies, int64."""

    rows: int
    """Of a tile."""
    pair: torch.Tensor
    """[M] the pairs, sorted by their expert."""
    expert: torch.Tensor
    """[G] whose weights a tile needs; E where there is none left."""
    first: torch.Tensor
    """[G] a tile's first place among the sorted pairs."""
    end: torch.Tensor
    """[G] the place after its expert's last one."""


def tile(chosen_TK: torch.Tensor, experts: int) -> Tiles:
    """Sort and cut; every size follows from the shapes alone."""
    pairs, device = chosen_TK.numel(), chosen_TK.device
    rows = TILES[0] if pairs <= TILES[1] * experts else TILES[1]
    most = triton.cdiv(pairs, rows) + min(experts, pairs)
    if pairs <= COMPARED:
        pair_M = torch.empty(pairs, dtype=torch.int64, device=device)
        tiles_3G = torch.empty(3, most, dtype=torch.int64, device=device)
        tile_kernel[(triton.cdiv(pairs, PAIRS) + 1,)](
            *(chosen_TK.contiguous(), pair_M, tiles_3G, pairs, experts, most),
            ROWS=rows,
            PAIRS=PAIRS,
            EXPERTS=triton.next_power_of_2(experts),
            num_warps=8,
        )
        return Tiles(rows, pair_M, *tiles_3G)
    return sort(chosen_TK, experts, rows, most)


def sort(chosen_TK: torch.Tensor, experts: int, rows: int, most: int) -> Tiles:
    """Do what tile_kernel does in some fifteen of torch's: less work where pairs are many."""
    device = chosen_TK.device
    sorted_M, pair_M = chosen_TK.flatten().sort(stable=True)
    starts = torch.searchsorted(sorted_M, torch.arange(experts + 1, device=device))
    ends_E = ((starts[1:] - starts[:-1] + rows - 1) // rows).cumsum(0)
    tile_G = torch.arange(most, device=device)
    expert_G = torch.searchsorted(ends_E, tile_G, right=True)
    known_G = expert_G.clamp(max=experts - 1)
    before_G = torch.where(known_G > 0, ends_E[known_G - 1], 0)
    return Tiles(rows, pair_M, expert_G, starts[known_G] + (tile_G - before_G) * rows, starts[known_G + 1])


class TritonExperts:
    """The experts' weights stacked, and their products."""

    def __init__(self, count: int, experts: Iterable[Expert], activation: Activation) -> None:
        """Stack [E, F, C] and [E, C, I], one expert after the other."""
        for index, expert in enumerate(experts):
            first = expert.first[0] if len(expert.first) == 1 else torch.cat(expert.first)
            if not index:
                self.first_EFC, self.down_ECI = (part.new_empty(count, *part.shape) for part in (first, expert.down))
            self.first_EFC[index] = first
            self.down_ECI[index] = expert.down
        self.activation: Activation = activation

    def __call__(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Sum each token's chosen experts: [T, C]."""
        tokens, per_token = chosen_TK.shape
        tiles = tile(chosen_TK, len(self.first_EFC))
        x_TC = x_TC.contiguous()
        inner = torch.empty(tokens * per_token, self.first_EFC.shape[1], dtype=x_TC.dtype, device=x_TC.device)
        out = torch.empty(tokens * per_token, x_TC.shape[1], dtype=torch.float32, device=x_TC.device)
        _grouped(x_TC, self.first_EFC, inner, tiles, per_token)
        _grouped(activate(inner, self.activation), self.down_ECI, out, tiles, 1)
        mixed_TC = torch.empty_like(x_TC)
        if out.numel():
            columns = x_TC.shape[1]
            block = min(MIXED, triton.next_power_of_2(columns))
            mix[(tokens, triton.cdiv(columns, block))](
                out, weights_TK.contiguous(), mixed_TC, per_token, columns, BLOCK=block
            )
        return mixed_TC


def _grouped(x: torch.Tensor, weights: torch.Tensor, out: torch.Tensor, tiles: Tiles, sharing: int) -> None:
    """Write row p of `out`, for every pair p: row p // `sharing` of x times the weight of the pair's expert."""
    if not out.numel():
        return
    experts, columns, depth = weights.shape
    multiply[(triton.cdiv(columns, COLUMNS), len(tiles.expert))](
        *(x, weights, out, tiles.pair, tiles.expert, tiles.first, tiles.end, experts, columns, depth),
        SHARING=sharing,
        ROWS=tiles.rows,
        COLUMNS=COLUMNS,
        DEPTH=min(DEPTH, max(16, triton.next_power_of_2(depth))),
        WHOLE=depth % DEPTH == 0,
    )


@triton.jit(do_not_specialize=["pairs", "most"])
def tile_kernel(
    chosen, pairs_out, tiles_out, pairs, experts, most, ROWS: tl.constexpr, PAIRS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Place some pairs in each program, and count the experts' tokens in the last one."""
    OTHERS: tl.constexpr = 16
    other_O = tl.arange(0, OTHERS)
    first = tl.program_id(0) * PAIRS
    if first < pairs:
        pair_B = first + tl.arange(0, PAIRS)
        expert_B = tl.load(chosen + pair_B, mask=pair_B < pairs, other=0).to(tl.int32)
        place_B = tl.zeros((PAIRS,), tl.int32)
        for start in range(0, pairs, OTHERS):
            at_O = start + other_O
            expert_O = tl.load(chosen + at_O, mask=at_O < pairs, other=EXPERTS).to(tl.int32)
            same_BO = (expert_O[None, :] == expert_B[:, None]) & (at_O[None, :] < pair_B[:, None])
            place_B += tl.sum(((expert_O[None, :] < expert_B[:, None]) | same_BO).to(tl.int32), 1)
        tl.store(pairs_out + place_B, pair_B, mask=pair_B < pairs)
        return
    expert_E = tl.arange(0, EXPERTS)
    count_E = tl.zeros((EXPERTS,), tl.int32)
    for start in range(0, pairs, OTHERS):
        at_O = start + other_O
        expert_O = tl.load(chosen + at_O, mask=at_O < pairs, other=EXPERTS).to(tl.int32)
        count_E += tl.sum((expert_O[None, :] == expert_E[:, None]).to(tl.int32), 1)
    end_E = tl.cumsum(count_E, 0)
    tiles_E = tl.cdiv(count_E, ROWS)
    tile_E = tl.cumsum(tiles_E, 0) - tiles_E
    for turn in range(0, tl.max(tiles_E, 0)):
        there_E = turn < tiles_E
        tl.store(tiles_out + tile_E + turn, expert_E, mask=there_E)
        tl.store(tiles_out + most + tile_E + turn, end_E - count_E + turn * ROWS, mask=there_E)
        tl.store(tiles_out + 2 * most + tile_E + turn, end_E, mask=there_E)
    for start in range(tl.sum(tiles_E, 0), most, EXPERTS):
        tl.store(tiles_out + start + expert_E, experts, mask=start + expert_E < most)


@triton.jit
def mix(parts, weights, outs, per_token, columns, BLOCK: tl.constexpr):
    """Sum one token's answers up, times their weights, for one block of columns."""
    token, column = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for chosen in range(0, per_token):
        at = token * per_token + chosen
        total += tl.load(parts + at * columns + column, mask=column < columns, other=0.0) * tl.load(weights + at)
    tl.store(outs + token * columns + column, narrow(total, outs), mask=column < columns)


@triton.jit
def multiply(
    xs,
    weights,
    outs,
    pairs,
    tile_experts,
    firsts,
    ends,
    experts,
    columns,
    depth,
    SHARING: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """One tile of pairs and one block of columns."""
    expert = tl.load(tile_experts + tl.program_id(1))
    if expert >= experts:
        return
    row = tl.load(firsts + tl.program_id(1)) + tl.arange(0, ROWS)
    real = row < tl.load(ends + tl.program_id(1))
    pair = tl.load(pairs + row, mask=real, other=0)
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    there = column < columns
    place = tl.arange(0, DEPTH)
    x_at = xs + (pair // SHARING * depth)[:, None] + place[None, :]
    w_at = weights + expert * columns * depth + (column[None, :] * depth + place[:, None])
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for start in range(0, depth, DEPTH):
        if WHOLE:
            x = tl.load(x_at + start, mask=real[:, None], other=0.0)
            w = tl.load(w_at + start, mask=there[None, :], other=0.0)
        else:
            inside = start + place < depth
            x = tl.load(x_at + start, mask=real[:, None] & inside[None, :], other=0.0)
            w = tl.load(w_at + start, mask=there[None, :] & inside[:, None], other=0.0)
        if EMULATED:
            x, w = x.to(tl.float32), w.to(tl.float32)
        total = tl.dot(x, w, total, input_precision="ieee")
    out = outs + (pair * columns)[:, None] + column[None, :]
    tl.store(out, narrow(total, outs), mask=real[:, None] & there[None, :])
