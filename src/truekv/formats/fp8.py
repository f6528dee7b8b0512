"""fp8_e4m3 and fp8_e5m2: a plain cast that saturates; the static scale lives in the frame.

One plane: codes fp8[dim]. These are the interchange formats of other engines. Without a measured scale
(a frame) the cast loses small rows to subnormals and clips large ones, so they only run calibrated.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Literal

from truekv.core.lazy import torch
from truekv.formats.planes import as_bytes, as_numbers, finite

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat


@dataclass(frozen=True, slots=True)
class Fp8:
    """Rows cast to an 8-bit floating-point number of the OCP kind (e4m3 without infinities, e5m2)."""

    name: str
    kind: Literal["float8_e4m3fn", "float8_e5m2"]
    top: float
    """Largest finite number."""
    significant: int
    """Significant bits, the hidden one included."""
    step: float
    """Distance between subnormal numbers."""
    code_bits: int = 8
    rotated: bool = False
    calibrated: bool = True
    idempotent: bool = True

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row: (dim,)."""
        return (dim,)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Clip float32 [..., dim] to the largest finite number and round to nearest even."""
        return as_bytes(finite(rows).clamp(-self.top, self.top).to(getattr(torch, self.kind)))

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Read uint8 [..., dim] back as float32."""
        return as_numbers(data[..., :dim], getattr(torch, self.kind)).float()

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Of each number: half a unit in the last place, half a subnormal step, and what is clipped."""
        size = rows.abs()
        return size * 2.0**-self.significant + self.step / 2 + (size - self.top).clamp(min=0)


FORMATS: Final[tuple[CacheFormat, ...]] = (
    Fp8("fp8_e4m3", "float8_e4m3fn", 448.0, 4, 2.0**-9),
    Fp8("fp8_e5m2", "float8_e5m2", 57344.0, 3, 2.0**-16),
)
ALIASES: Final[dict[str, str]] = {"fp8": "fp8_e4m3"}
"""Names users already know for a format of this folder."""
