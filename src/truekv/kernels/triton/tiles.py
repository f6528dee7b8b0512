"""What a program of the attention kernel takes at once, and in which numbers it computes: chosen by layouts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.interpreter import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.kernels.triton.layout import Row

SPAN: Final = 512
"""Keys of one program where the new tokens of a row fit into one tile; fixed, as it is part of the order of sums."""
FOLD: Final = 4
"""Spans whose sums are folded into one first, by one program that has all of them or by what merges them: fixed too."""
_MANY: Final = 2048
"""Programs that keep all processors busy where some of them end at once, as tables are up to 4 times too wide."""
_QUERIES: Final = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Options:
    """How the attention kernel is compiled for the rows of a layer."""

    queries: int
    """Query rows of a tile, which share one kv head."""
    keys: int
    """Keys of a block: whole pages."""
    warps: int
    stages: int
    """Blocks of keys under way at once."""

    folds: bool
    """Whether a program has registers for the sums of several spans."""

    @property
    def across(self) -> bool:
        """Whether queries are the columns of scores: products take 8 columns, but 16 rows at least."""
        return self.queries < 16


def attend_options(rows: Seq[Row], queries: int, capability: int) -> Options:
    """Choose for fields of these layouts, so many query rows that share a kv head, and a compute capability; see arch.

    Each is the largest block that the compiler keeps in registers, all of it.
    """
    # Capability 9.0 has shared memory for two blocks under way, beside the one that is multiplied.
    deep = capability >= 90
    blocks, columns = any(row.blocks for row in rows), max(row.columns for row in rows)
    # Products of float32 take no tensor cores; blocks of 32 keep their headers in registers too.
    tall = 64 if deep and columns <= 256 else 32
    most = 8 if any(row.code == "f32" for row in rows) else 16 if blocks else 32 if columns > 256 else tall
    tile = next((size for size in _QUERIES if size >= min(queries, most)), most)
    packed = blocks or any(row.parts > 1 for row in rows)
    if most == 8:
        keys, warps, stages = 32, 4, 2
    elif columns > 256:
        long = deep and (tile > 16 or rows[0].scaled)
        keys, warps, stages = 64 if long else 32, 8 if long or packed or tile > 16 else 4, 2
    elif blocks:
        keys, warps, stages = 32, 4, 3
    elif tile == 8:
        narrow = deep and all(row.code == "bf16" for row in rows) and columns > 64
        stages = 5 if deep else 3 if columns <= 128 else 2
        keys, warps = (64 if columns > 128 else 128) // (2 if narrow else 1), 4
    elif columns > 128:
        keys, warps, stages = 32, 4, 3
    elif tile == 16:
        keys, warps, stages = 128, 4, 3
    else:
        keys, warps, stages = 64, 4, 2 if deep else 3
    # The interpreter has no registers to run out of.
    folds = (deep or not capability) and tile <= 16 and columns <= 256
    return Options(tile, max(keys, rows[0].page_tokens), warps, stages, folds)


def span_keys(tiles: int) -> int:
    """Return the keys of a program: more for more tiles of queries, so that what is merged does not grow with them."""
    return SPAN * triton.next_power_of_2(tiles)


def spans_of_a_program(spans: int) -> int:
    """Return how many spans a program takes, of so many in all: FOLD where that leaves enough programs, else 1.

    Fewer programs wait less for their first rows, and leave less that is written and read again. It changes no bit.
    """
    return FOLD if spans >= FOLD * _MANY else 1


def operand(row: Row) -> tl.dtype:
    """Return the type of a field's numbers in products: fp16 holds every code but those that are as wide or wider."""
    # The interpreter computes with the bits of a bfloat16 as if they were an integer.
    if INTERPRETED or row.code == "f32":
        return tl.float32
    return tl.bfloat16 if row.code == "bf16" else tl.float16


def torch_operand(row: Row) -> torch.dtype:
    """Return the same as torch calls it."""
    return {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}[operand(row)]


def arch() -> int:
    """Return the compute capability that Triton compiles for as two digits, 0 for anything but an NVIDIA GPU."""
    if INTERPRETED:
        return 0
    target = triton.runtime.driver.active.get_current_target()
    return target.arch if target.backend == "cuda" else 0
