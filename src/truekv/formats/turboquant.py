"""The TurboQuant presets under the names vLLM gave them, in the same bytes per row or fewer.

    turboquant_4bit, turboquant_3bit   planes as kv4 and kv3: codes | norm-corrected scale fp16[1]
    turboquant_fp8                     planes: codes fp8 e4m3[dim] | scale fp16[1]

As published (2504.19874): random-sign rotation, Lloyd-Max codes, norm correction; no centre and no
per-channel scale unless a frame was measured. Two differences from vLLM's rows, both inside its bytes:
values are rotated and coded like keys (vLLM rounds them between minimum and maximum, unrotated, so one
outlier channel takes the bits of all others), and the fp8 keys of k8v4 have a scale per row, since an
unscaled cast clips keys beyond 448.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.formats.lm import FOUR_BITS, THREE_BITS, LloydMax
from truekv.formats.planes import HALF_MAX, HALF_STEP, as_bytes, as_numbers, finite, half_down

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat

_TOP: Final = 448.0


@dataclass(frozen=True, slots=True)
class RowScaledFp8:
    """fp8 e4m3 codes whose largest is 448, with one scale per row."""

    name: str = "turboquant_fp8"
    code_bits: int = 8
    rotated: bool = False
    calibrated: bool = False
    idempotent: bool = True

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row: (dim codes, 2 of scale)."""
        return dim, 2

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [..., dim] as uint8 [..., dim + 2]; the scale is rounded down, as in int8."""
        rows = finite(rows)
        amax = rows.abs().amax(-1, keepdim=True)
        scale = half_down(amax / torch.full_like(amax, _TOP))
        step = torch.where(scale > 0, scale.float(), 1.0)
        codes = torch.where(scale > 0, rows / step, 0.0).clamp(-_TOP, _TOP).to(torch.float8_e4m3fn)
        return torch.cat((as_bytes(codes), as_bytes(scale)), -1)

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Decode uint8 [..., dim + 2] to float32 [..., dim]."""
        scale = as_numbers(data[..., dim : dim + 2], torch.float16).float()
        return as_numbers(data[..., :dim], torch.float8_e4m3fn).float() * scale

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Of each number: half a unit in the last place, half a subnormal step, the scale's own limits."""
        size = rows.abs()
        amax = size.amax(-1, keepdim=True)
        scale = amax / _TOP
        tiny = torch.where(scale < 2.0**-14, _TOP * HALF_STEP, 0.0)
        return size * 2.0**-4 * (1 + 2.0**-20) + scale * 2.0**-10 + tiny + (amax - _TOP * HALF_MAX).clamp(min=0)


FORMATS: Final[tuple[CacheFormat, ...]] = (
    RowScaledFp8(),
    LloydMax("turboquant_4bit", FOUR_BITS, calibrated=False),
    LloydMax("turboquant_3bit", THREE_BITS, calibrated=False),
)
PAIRS: Final[dict[str, tuple[str, str]]] = {
    "turboquant_k8v4": ("turboquant_fp8", "turboquant_4bit"),
    "turboquant_4bit_nc": ("turboquant_4bit", "turboquant_4bit"),
    "turboquant_k3v4_nc": ("turboquant_3bit", "turboquant_4bit"),
    "turboquant_3bit_nc": ("turboquant_3bit", "turboquant_3bit"),
}
