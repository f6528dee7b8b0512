"""llama.cpp's block-32 family: q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl, byte for byte, and each with a rotation.

One plane: ceil(dim / 32) blocks, each its scale (and minimum) followed by its codes:

    q8_0    d fp16 | codes int8[32]                               34 bytes
    q5_1    d fp16 | m fp16 | high bits u32 | nibbles[16]         24
    q5_0    d fp16 | high bits u32 | nibbles[16]                  22
    q4_1    d fp16 | m fp16 | nibbles[16]                         20
    q4_0    d fp16 | nibbles[16]                                  18
    iq4_nl  d fp16 | nibbles[16]                                  18

    nibble byte j: element j in bits 0-3, element j + 16 in bits 4-7; high bit i: bit 4 of element i

These are compatible baselines: bytes equal those of the gguf package's quantizers (of iq4_nl, whose
quantizer it lacks, those of llama.cpp's CPU reference up to the order of one sum). A row whose length
is no multiple of 32 ends with zeros. NAME+hadamard adds the rotation of llama.cpp's -khad and -vhad.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Final, Protocol

from truekv.core.lazy import torch
from truekv.formats.planes import HALF_MAX, HALF_STEP, as_bytes, as_numbers, finite, fold, row_sum, split, unfold

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat

_BLOCK: Final = 32
# Float32 products and quotients between a number and its code: far less than a step.
_SLACK: Final = 2.0**-20


class Rule(Protocol):
    """How one block of 32 numbers becomes fp16 headers and codes."""

    @property
    def headers(self) -> int:
        """How many fp16 numbers stand before the codes."""
        ...

    def quantize(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """[..., 32] -> float32 headers [..., headers], codes uint8 [..., 32]."""
        ...

    def dequantize(self, headers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Undo `quantize`, from the headers as they were stored."""
        ...

    def bound(self, blocks: torch.Tensor) -> torch.Tensor:
        """Largest error in each block, [..., 1]."""
        ...


def _inverse(scale: torch.Tensor) -> torch.Tensor:
    """1 / scale, and 0 where the scale is 0 or too small to have an inverse."""
    inverse = torch.where(scale == 0, 0.0, 1 / torch.where(scale == 0, 1.0, scale))
    return torch.where(torch.isfinite(inverse), inverse, 0.0)


def _divided(values: torch.Tensor, by: float) -> torch.Tensor:
    # By a tensor: by a Python number, a GPU multiplies with the rounded reciprocal instead.
    return values / torch.full_like(values, by)


def _extreme(blocks: torch.Tensor) -> torch.Tensor:
    """Return the number of largest magnitude of each block, with its sign; of equals the first."""
    return blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))


def _stored(scale: torch.Tensor) -> torch.Tensor:
    """Error that storing a scale as fp16 adds per unit of code: rounding, coarseness, end of range."""
    size = scale.abs()
    return size * 2.0**-11 + HALF_STEP / 2 + (size - HALF_MAX).clamp(min=0)


@dataclass(frozen=True, slots=True)
class Signed:
    """Equal steps; the number of largest magnitude sits on the lowest code (q4_0, q5_0)."""

    bits: int
    headers: int = 1

    def quantize(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step = extreme / -2^(bits-1); the opposite end of the range is clipped by up to one step."""
        half = 1 << (self.bits - 1)
        scale = _divided(_extreme(blocks), -half)
        codes = (blocks * _inverse(scale) + (half + 0.5)).trunc().clamp(0, 2 * half - 1)
        return scale, codes.to(torch.uint8)

    def dequantize(self, headers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """(code - 2^(bits-1)) * scale."""
        return (codes.float() - (1 << (self.bits - 1))) * headers

    def bound(self, blocks: torch.Tensor) -> torch.Tensor:
        """One step (the clipped end), and what the stored scale is off."""
        half = 1 << (self.bits - 1)
        step = blocks.abs().amax(-1, keepdim=True) / half
        return step * (1 + half * _SLACK) + half * _stored(step)


@dataclass(frozen=True, slots=True)
class Affine:
    """Equal steps from the block's minimum to its maximum (q4_1, q5_1)."""

    bits: int
    headers: int = 2

    def quantize(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step = (maximum - minimum) / (2^bits - 1); headers are (step, minimum)."""
        top = (1 << self.bits) - 1
        low = blocks.amin(-1, keepdim=True)
        scale = _divided(blocks.amax(-1, keepdim=True) - low, top)
        codes = ((blocks - low) * _inverse(scale) + 0.5).trunc().clamp(0, top)
        return torch.cat((scale, low), -1), codes.to(torch.uint8)

    def dequantize(self, headers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Code * step + minimum."""
        return codes.float() * headers[..., :1] + headers[..., 1:]

    def bound(self, blocks: torch.Tensor) -> torch.Tensor:
        """Half a step, and what the stored step and minimum are off."""
        top = (1 << self.bits) - 1
        low, high = blocks.amin(-1, keepdim=True), blocks.amax(-1, keepdim=True)
        step = (high - low) / top
        return step / 2 + top * _stored(step) + _stored(low) + (low.abs() + high.abs()) * _SLACK


@dataclass(frozen=True, slots=True)
class Rounded:
    """127 equal steps either side of zero (q8_0)."""

    headers: int = 1

    def quantize(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Step = amax / 127; halves are rounded away from zero."""
        scale = _divided(blocks.abs().amax(-1, keepdim=True), 127)
        values = blocks * _inverse(scale)
        size = values.abs().floor()
        size = size + (2 * (values.abs() - size)).floor()
        return scale, (values.sign() * size).to(torch.int8).view(torch.uint8)

    def dequantize(self, headers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Code * step."""
        return codes.view(torch.int8).float() * headers

    def bound(self, blocks: torch.Tensor) -> torch.Tensor:
        """Half a step, and what the stored step is off."""
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return step * (0.5 + 127 * _SLACK) + 127 * _stored(step)


@dataclass(frozen=True, slots=True)
class Table:
    """Unequal steps from a fixed table, scaled by least squares with weights x^2 (iq4_nl)."""

    levels: tuple[int, ...] = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    headers: int = 1

    def quantize(self, blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Put the extreme on the lowest level, round, then fit the scale to the rounded levels."""
        first = _divided(_extreme(blocks), self.levels[0])
        values = blocks * _inverse(first)
        edges = [(low + high) / 2 for low, high in pairwise(self.levels)]
        # right=True: a number exactly between two levels takes the upper one.
        codes = torch.bucketize(values, torch.tensor(edges, device=blocks.device), right=True)
        levels = self._look_up(codes)
        # In units of the first scale, whose squares neither overflow nor vanish.
        weight = values.square() * levels
        norm = row_sum(weight * levels)
        fitted = first * (row_sum(weight * values) / torch.where(norm > 0, norm, 1.0))
        # A block of zeros has the scale +0, as in llama.cpp, and not 0 / -127 = -0.
        return fitted + 0.0, codes.to(torch.uint8)

    def dequantize(self, headers: torch.Tensor, codes: torch.Tensor) -> torch.Tensor:
        """Level * scale."""
        return self._look_up(codes) * headers

    def bound(self, blocks: torch.Tensor) -> torch.Tensor:
        """14 of 127 parts of amax by rounding (beyond level 113), and what the fit moves the levels.

        The fit changes the scale by sum(w q (v - q)) / sum(w q^2), which is at most 14 times
        (127^3 + 31 v^3) / (127^4 + 31 v^4) < 0.0135 for the worst common value v of the other 31
        numbers: a fifth, of at most 127 levels.
        """
        step = blocks.abs().amax(-1, keepdim=True) / 127
        return step * (14 + 0.2 * 127) + 127 * _stored(step * 1.2)

    def _look_up(self, codes: torch.Tensor) -> torch.Tensor:
        return torch.tensor(self.levels, dtype=torch.float32, device=codes.device)[codes.int()]


@dataclass(frozen=True, slots=True)
class Blocks:
    """Rows cut into blocks of 32, each with headers of its own in front of its codes."""

    name: str
    code_bits: int
    rule: Rule
    rotated: bool = False
    calibrated: bool = False
    # The scale is rounded to nearest after the codes are chosen, as in gguf; where it rounds to zero or
    # moves the extreme number, a second encoding chooses other codes.
    idempotent: bool = field(default=False, init=False)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block of 32 numbers."""
        return 2 * self.rule.headers + 4 * self.code_bits

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row: (blocks * block_bytes,)."""
        return (-(-dim // _BLOCK) * self.block_bytes,)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [..., dim] as uint8 [..., planes]; scales beyond fp16 saturate."""
        headers, codes = self.rule.quantize(_cut(finite(rows)))
        parts = (as_bytes(headers.clamp(-HALF_MAX, HALF_MAX).half()), self._pack(codes))
        return torch.cat(parts, -1).flatten(-2)

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Decode uint8 [..., planes] to float32 [..., dim]."""
        blocks = split(data, self.block_bytes)
        width = 2 * self.rule.headers
        headers = as_numbers(blocks[..., :width], torch.float16).float()
        return self.rule.dequantize(headers, self._unpack(blocks[..., width:])).flatten(-2)[..., :dim]

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Of each number of [..., dim]: the bound of its block."""
        blocks = _cut(rows.float())
        return self.rule.bound(blocks).expand_as(blocks).flatten(-2)[..., : rows.shape[-1]]

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        if self.code_bits == 8:
            return codes
        nibbles = fold(codes & 15, 4)
        return nibbles if self.code_bits == 4 else torch.cat((_bits(codes >> 4), nibbles), -1)

    def _unpack(self, data: torch.Tensor) -> torch.Tensor:
        if self.code_bits == 8:
            return data.contiguous()
        codes = unfold(data[..., -_BLOCK // 2 :], 4)
        return codes if self.code_bits == 4 else codes | (_unbits(data[..., :4]) << 4)


def _cut(rows: torch.Tensor) -> torch.Tensor:
    """[..., dim] -> [..., blocks, 32], the last block filled with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[-1] % _BLOCK))
    return split(padded, _BLOCK)


def _bits(flags: torch.Tensor) -> torch.Tensor:
    """32 flags -> 4 bytes, element i in bit i of a little-endian word."""
    shifts = torch.arange(8, dtype=torch.uint8, device=flags.device)
    return (split(flags, 8) << shifts).sum(-1, dtype=torch.uint8)


def _unbits(data: torch.Tensor) -> torch.Tensor:
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> shifts) & 1).flatten(-2)


_RULES: Final[dict[str, tuple[int, Rule]]] = {
    "q8_0": (8, Rounded()),
    "q5_1": (5, Affine(5)),
    "q5_0": (5, Signed(5)),
    "q4_1": (4, Affine(4)),
    "q4_0": (4, Signed(4)),
    "iq4_nl": (4, Table()),
}
FORMATS: Final[tuple[CacheFormat, ...]] = tuple(
    Blocks(name + suffix, bits, rule, rotated)
    for name, (bits, rule) in _RULES.items()
    for suffix, rotated in (("", False), ("+hadamard", True))
)
