"""How the rows of a field lie in its pages, as kernels are compiled for it.

A kernel sees a row as `columns` numbers in storage order: a byte that holds several codes is decoded into neighbouring
columns, so that no number moves between threads. Column c is part c % parts of place c // parts:

    f32 bf16 fp8_* int8 q8_0    1 part     dim c
    kv4                         2 parts    dim part * D/2 + place
    kv3                         8 parts    dim part * D/8 + place
    q5_* q4_* iq4_nl            2 parts    dim place // 16 * 32 + part * 16 + place % 16

Queries are taken to that order before they meet keys, and averages of values out of it.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.kernels.triton.codebook import LEVELS, STEPS, look_up_8, look_up_16

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Paged

LONGEST: Final = 1024
"""Numbers of a row: sums of so many on the grid of formats/planes.py are exact in float64."""
# Parts of a row that share bytes, and the bytes of headers and codes in a block of 32 numbers.
_PARTS: Final = {"kv4": 2, "kv3": 8, "q5_1": 2, "q5_0": 2, "q4_1": 2, "q4_0": 2, "iq4_nl": 2}
_BLOCKS: Final = {
    "q8_0": (2, 32),
    "q5_1": (4, 20),
    "q5_0": (2, 20),
    "q4_1": (4, 16),
    "q4_0": (2, 16),
    "iq4_nl": (2, 16),
}
_BITS: Final = {"f32": 32, "bf16": 16, "fp8_e4m3": 8, "fp8_e5m2": 8, "turboquant_fp8": 8, "int8": 8, "kv4": 4, "kv3": 3}
_SCALED: Final = ("turboquant_fp8", "int8", "kv4", "kv3")
_SAME_CODE: Final = {"turboquant_4bit": "kv4", "turboquant_3bit": "kv3"}


@dataclass(frozen=True)
class Row:
    """The layout of a field's rows: what is known when a kernel is compiled."""

    code: str
    dim: int
    page_tokens: int

    @property
    def parts(self) -> int:
        """Columns that are decoded from one place."""
        return _PARTS.get(self.code, 1)

    @property
    def blocks(self) -> int:
        """Blocks of 32 numbers with headers of their own; 0 for other codes."""
        return -(-self.dim // 32) if self.code in _BLOCKS else 0

    @property
    def places(self) -> int:
        """Places that hold numbers."""
        return (32 * self.blocks if self.blocks else self.dim) // self.parts

    @property
    def columns(self) -> int:
        """Columns of a tile: a power of two, of which the last places may hold nothing."""
        return self.parts * max(16 // self.parts, _power_of_two(self.places))

    @property
    def header_bytes(self) -> int:
        """Bytes in front of a block's codes."""
        return _BLOCKS[self.code][0] if self.blocks else 0

    @property
    def block_bytes(self) -> int:
        """Bytes of a block."""
        return sum(_BLOCKS[self.code]) if self.blocks else 0

    @property
    def code_bytes(self) -> int:
        """Bytes of a row in its first plane."""
        return self.blocks * self.block_bytes if self.blocks else self.dim * _BITS[self.code] // 8

    @property
    def scaled(self) -> bool:
        """Whether a second plane holds one fp16 scale per row."""
        return self.code in _SCALED

    @property
    def factored(self) -> bool:
        """Whether decoded numbers are in units of a factor of their row."""
        return self.scaled or self.blocks > 0

    @property
    def padded(self) -> bool:
        """Whether some columns hold nothing."""
        return self.columns != self.dim

    @property
    def head_bytes(self) -> int:
        """Bytes of one head in one page."""
        return self.page_tokens * (self.code_bytes + 2 * self.scaled)

    @property
    def levels(self) -> tuple[int, ...]:
        """What codes of a codebook stand for."""
        return LEVELS[self.code]

    @property
    def look_up(self) -> str:
        """PTX from codes to levels; see codebook.py."""
        return look_up_8(self.levels) if len(self.levels) == 8 else look_up_16(self.levels)

    @property
    def gain(self) -> float:
        """What a row of norm 1 is multiplied by to be on the scale of its levels."""
        return math.sqrt(self.dim) / STEPS[self.code]

    @property
    def unit(self) -> float:
        """What the numbers of a rotation are multiplied by."""
        return 1 / math.sqrt(self.dim)

    @property
    def plain(self) -> bool:
        """Whether numbers are stored as they are."""
        return self.code in {"f32", "bf16"}

    def dims(self) -> list[int]:
        """Return the dim of each column, and -1 for those that hold nothing."""
        found: list[int] = []
        for column in range(self.columns):
            place, part = divmod(column, self.parts)
            if self.blocks and self.parts == 2:
                dim = place // 16 * 32 + part * 16 + place % 16
            else:
                dim = part * (self.dim // self.parts) + place
            found.append(dim if place < self.places and dim < self.dim else -1)
        return found


def refusal(layer: Paged, formats: Seq[CacheFormat]) -> str | None:
    """Return why the rows of a layer have no Triton kernel, or None."""
    for item, chosen in zip(layer.fields, formats, strict=True):
        if _code(chosen) not in _BITS and _code(chosen) not in _BLOCKS:
            return f"the triton kernels do not know the format '{chosen.name}'; use the reference backend"
        if item.dim % 16 or item.dim > LONGEST:
            return (
                f"the triton kernels take rows of up to {LONGEST} numbers, a multiple of 16, but the field "
                f"'{item.name}' has {item.dim}; use the reference backend"
            )
    return None


def layout(stored: Stored) -> Row:
    """Return how the rows of a field lie in its pages."""
    return Row(_code(stored.format), stored.field.dim, stored.page_tokens)


def rotation(stored: Stored, row: Row, device: torch.device) -> torch.Tensor:
    """Return sqrt(dim) times the rotation of a field: int8 [dim, columns] of +1 and -1, and 0 where nothing is held."""
    # A step asks for every field of every layer, so looking one up must cost next to nothing.
    found = _rotations.get((row, device))
    if found is None:
        signs, paley = stored.frame.rotation(row.dim)
        sylvester = torch.ones(1, 1, dtype=torch.float64)
        for _ in range((row.dim // len(paley)).bit_length() - 1):
            sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
        full_DD = torch.kron(paley.cpu(), sylvester) * signs.cpu()
        dims = torch.tensor(row.dims())
        chosen_DC = torch.where(dims >= 0, full_DD[dims.clamp(min=0)].T, 0.0)
        found = _rotations[row, device] = chosen_DC.to(torch.int8).contiguous().to(device)
    return found


# Few: one for each code and row length of a model.
_rotations: dict[tuple[Row, torch.device], torch.Tensor] = {}


@functools.cache
def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _code(chosen: CacheFormat) -> str:
    # The rotation of NAME+hadamard is its frame's.
    name = chosen.name.removesuffix("+hadamard")
    return _SAME_CODE.get(name, name)
