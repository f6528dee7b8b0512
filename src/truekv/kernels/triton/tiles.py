"""What a program of the attention kernel takes at once, and in which numbers it computes: chosen by layouts alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.interpreter import INTERPRETED

if TYPE_CHECKING:
    from truekv.kernels.triton.layout import Row

SPAN: Final = 512
"""Keys of one program where the new tokens of a row fit into one tile; fixed, because it fixes the order of sums."""
_QUERIES: Final = (8, 16, 32, 64)


@dataclass(frozen=True, slots=True)
class Options:
    """How the attention kernel is compiled for the rows of a layer."""

    keys: int
    """Keys of a block."""
    warps: int
    stages: int
    """Blocks of keys under way at once."""


def attend_options(keys: Row, rope: Row | None, values: Row) -> Options:
    """Choose by the columns of the widest field."""
    columns = max(keys.columns, values.columns, rope.columns if rope else 0)
    if columns <= 128:
        return Options(128, 4, 3)
    return Options(64, 4, 3) if columns <= 256 else Options(32, 4, 2)


def query_tile(queries: int) -> int:
    """Query rows of a program, where so many share a kv head: rows of 16 have the same bits in every tile."""
    return next((size for size in _QUERIES if size >= queries), _QUERIES[-1])


def span_keys(tiles: int) -> int:
    """Keys of a program; more for more tiles of queries, so that what is merged stays about as large as what is read."""
    return SPAN * triton.next_power_of_2(tiles)


def operand(row: Row) -> tl.dtype:
    """Return the type of a field's numbers in products: fp16 holds every code but those that are as wide or wider."""
    # The interpreter computes with the bits of a bfloat16 as if they were an integer.
    if INTERPRETED or row.code == "f32":
        return tl.float32
    return tl.bfloat16 if row.code == "bf16" else tl.float16


def torch_operand(row: Row) -> torch.dtype:
    """Return the same as torch calls it."""
    return {tl.float32: torch.float32, tl.bfloat16: torch.bfloat16, tl.float16: torch.float16}[operand(row)]


def arch(device: torch.device) -> int:
    """Return the compute capability of an NVIDIA GPU as two digits, 0 for anything else."""
    if INTERPRETED or device.type != "cuda" or torch.version.hip:
        return 0
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor
