"""f32 and bf16: rows as they are, the second with half of the bits.

One plane: dim numbers, little endian, 4 or 2 bytes each.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from truekv.core.lazy import torch
from truekv.formats.planes import as_bytes, as_numbers, finite

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat

# bfloat16 keeps 8 significant bits; below its smallest normal number the step is fixed.
_BF16_RELATIVE: Final = 2.0**-8
_BF16_MAX: Final = 3.3895313892515355e38
_BF16_STEP: Final = 2.0**-133


@dataclass(frozen=True, slots=True)
class Plain:
    """Rows stored as floating-point numbers of `code_bits` bits, without a frame of any kind."""

    name: str
    code_bits: Literal[32, 16]
    rotated: bool = False
    calibrated: bool = False
    idempotent: bool = True

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row: (dim * code_bits / 8,)."""
        return (dim * self.code_bits // 8,)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Round [..., dim] to nearest even and store it; numbers that bf16 cannot hold saturate."""
        rows = finite(rows)
        if self.code_bits == 32:
            return as_bytes(rows)
        return as_bytes(rows.clamp(-_BF16_MAX, _BF16_MAX).bfloat16())

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Read uint8 [..., planes] back as float32 [..., dim]."""
        dtype = torch.float32 if self.code_bits == 32 else torch.bfloat16
        return as_numbers(data[..., : self.planes(dim)[0]], dtype).float()

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Half a unit in the last place of each number; zero for f32."""
        if self.code_bits == 32:
            return torch.zeros_like(rows)
        return rows.abs() * _BF16_RELATIVE + _BF16_STEP


FORMATS: Final[tuple[CacheFormat, ...]] = (Plain("f32", 32), Plain("bf16", 16))
