"""int8: 127 steps either side of zero, one fp16 scale per row and head.

Planes: codes int8[dim] | scale fp16[1].

    scale = fp16(amax / 127), rounded down        code = round_half_even(x / scale), clipped to +-127

Rounding the scale down makes the largest number of a row land on code 127, always: the next encoding
therefore finds the same scale, and re-encoding changes no byte. The clipping costs at most
127 * 2^-10 = 0.12 of a step, less than the half step that rounding costs anyway.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.formats.planes import HALF_MAX, HALF_STEP, as_bytes, as_numbers, finite, half_down

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat

_TOP: Final = 127.0


@dataclass(frozen=True, slots=True)
class Int8:
    """Symmetric 8-bit codes with one scale per row; the rotation spreads outliers over the row."""

    name: str = "int8"
    code_bits: int = 8
    rotated: bool = True
    calibrated: bool = False
    idempotent: bool = True

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row: (dim codes, 2 of scale)."""
        return dim, 2

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [..., dim] as uint8 [..., dim + 2]."""
        rows = finite(rows)
        amax = rows.abs().amax(-1, keepdim=True)
        # Divided by a tensor: by a Python number, a GPU multiplies with the rounded reciprocal instead.
        scale = half_down(amax / torch.full_like(amax, _TOP))
        # Rows whose scale is below fp16's smallest number are stored as zeros.
        step = torch.where(scale > 0, scale.float(), 1.0)
        codes = torch.where(scale > 0, rows / step, 0.0).round().clamp(-_TOP, _TOP).to(torch.int8)
        return torch.cat((as_bytes(codes), as_bytes(scale)), -1)

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Decode uint8 [..., dim + 2] to float32 [..., dim]: code * scale, exact in float32."""
        scale = as_numbers(data[..., dim : dim + 2], torch.float16).float()
        return as_numbers(data[..., :dim], torch.int8).float() * scale

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Per row [..., 1]: half a step, the coarseness of tiny scales, and what fp16 cannot scale."""
        amax = rows.abs().amax(-1, keepdim=True)
        step = amax / _TOP
        # Half a step covers the clipping of normal scales; a subnormal one clips up to 127 of its own units.
        # Float32 division may err by its last bit, hence the 1 + 2^-20.
        tiny = torch.where(step < 2.0**-14, _TOP * HALF_STEP, 0.0)
        return step * (0.5 * (1 + 2.0**-20)) + tiny + (amax - _TOP * HALF_MAX).clamp(min=0)


FORMATS: Final[tuple[CacheFormat, ...]] = (Int8(),)
