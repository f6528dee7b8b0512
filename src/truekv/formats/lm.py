"""kv4 and kv3: Lloyd-Max codes on an int8 grid, one norm-corrected fp16 scale per row and head.

Planes: codes uint8[dim * bits / 8] | scale fp16[1].

    kv4  byte j (of D/2):  dim j in bits 0-3, dim j + D/2 in bits 4-7
    kv3  byte j (of D/4):  bits 0-1 of dims j, j + D/4, j + D/2, j + 3D/4, two bits each, lowest first
         byte j (of D/8):  bit 2 of dims j + b * D/8, one bit each, b = 0 lowest

A number is levels[code] * scale: an integer times an fp16 number, exact in float32, hence the same in
every backend. The levels are antisymmetric, so a code never adds a constant to a row. A row is split in
halves (quarters, eighths) so that a vector register of consecutive bytes holds consecutive dims.

The scale is norm(row) / norm(levels[codes]): the decoded row has the norm of the row, and reading it
costs nothing extra. Keys with offsets or outlier channels leave such a code far from Gaussian even
after a rotation, and then no bound on the attention holds: these formats only run calibrated.

Sources: Lloyd (1982) and Max (1960) for the quantizer; the norm correction is TurboQuant's (2504.19874).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.formats.planes import (
    HALF_MAX,
    HALF_STEP,
    as_bytes,
    as_numbers,
    finite,
    fold,
    multiple,
    root,
    row_sum,
    unfold,
)

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat


@dataclass(frozen=True, slots=True)
class Codebook:
    """A Lloyd-Max codebook of N(0, 1), rounded to integers: level = integer * step.

    The integers were found by trying every step with a top level of 60 to 127, and keeping the one with
    the least distortion after norm correction: 0.05% above the unrounded codebook at 4 bits and 0.01% at
    3 bits (tests/formats/test_lm.py computes it again).
    """

    bits: int
    positive: tuple[int, ...]
    """The upper half, ascending; the lower half mirrors it."""
    step: float

    @property
    def levels(self) -> tuple[int, ...]:
        """All levels in the order of their codes, ascending."""
        return tuple(-level for level in reversed(self.positive)) + self.positive

    @property
    def edges(self) -> tuple[float, ...]:
        """Midpoints between neighbouring levels: halves, exact in float32."""
        return tuple((low + high) / 2 for low, high in pairwise(self.levels))


FOUR_BITS: Final = Codebook(4, (5, 15, 25, 36, 48, 62, 79, 104), 0.02622245)
THREE_BITS: Final = Codebook(3, (10, 31, 55, 88), 0.02444652)


@dataclass(frozen=True, slots=True)
class LloydMax:
    """Codes of a fixed codebook; the row's own norm, corrected, is its only scale."""

    name: str
    codebook: Codebook
    calibrated: bool = True
    rotated: bool = True
    # The norm and, on rows that are close to Gaussian, the codes survive re-encoding unchanged; but a row
    # with one outlier is far from any scaled codebook, and its codes may move once more.
    idempotent: bool = False

    @property
    def code_bits(self) -> int:
        """Bits of one code."""
        return self.codebook.bits

    def planes(self, dim: int) -> tuple[int, ...]:
        """Bytes of one row: (dim * bits / 8 codes, 2 of scale); Refused unless dim is a multiple of 8."""
        multiple(self.name, dim, 8)
        return dim * self.code_bits // 8, 2

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Encode float32 [..., dim] as uint8 [..., dim * bits / 8 + 2]."""
        rows = finite(rows)
        amax = rows.abs().amax(-1, keepdim=True)
        # Dividing by the largest number first keeps squares of very large and very small rows finite.
        unit = rows / torch.where(amax > 0, amax, 1.0)
        norm = root(row_sum(unit.square()))
        gain = math.sqrt(rows.shape[-1]) / self.codebook.step
        codes = self._nearest(unit * (gain / norm.clamp(min=1.0)))
        # Squares of integers sum exactly in float32.
        levels = root(self._levels(codes).square().sum(-1, keepdim=True))
        scale = (amax * (norm / levels)).clamp(max=HALF_MAX).half()
        return torch.cat((self._pack(codes), as_bytes(scale)), -1)

    def decode(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        """Decode uint8 [..., dim * bits / 8 + 2] to float32 [..., dim]."""
        width = self.planes(dim)[0]
        scale = as_numbers(data[..., width : width + 2], torch.float16).float()
        return self._levels(self._unpack(data[..., :width], dim)) * scale

    def bound(self, rows: torch.Tensor) -> torch.Tensor:
        """Of each number of [..., dim]; derived here, in units of the row's root mean square.

        A number inside the codebook is at most half a gap from its level, one outside it by its excess
        more. All levels are then scaled by norm(row) / norm(levels), which the triangle inequality keeps
        within `spread` of 1; last come the rounding of the fp16 scale, its coarseness and its end.
        """
        book, dim = self.codebook, rows.shape[-1]
        amax = rows.abs().amax(-1, keepdim=True)
        unit = rows.abs() / torch.where(amax > 0, amax, 1.0)
        rms = (row_sum(unit.square()) / dim).sqrt()
        size = unit / torch.where(rms > 0, rms, 1.0)
        gap = max(high - low for low, high in pairwise(book.levels)) / 2 * book.step
        top = book.positive[-1] * book.step
        excess = (size - top).clamp(min=0)
        spread = gap + (row_sum(excess.square()) / dim).sqrt()
        largest = (1 / (1 - spread).clamp(min=1e-9)).clamp(max=1 / (book.positive[0] * book.step))
        level = (size + gap).clamp(max=top)
        drift = torch.maximum(largest - 1, spread / (1 + spread))
        error = gap + excess + level * (drift + largest * 2.0**-10)
        ends = HALF_STEP / 2 + (amax * rms * largest * book.step - HALF_MAX).clamp(min=0)
        return amax * rms * error * (1 + 2.0**-20) + book.positive[-1] * ends

    def _levels(self, codes: torch.Tensor) -> torch.Tensor:
        table = torch.tensor(self.codebook.levels, dtype=torch.float32, device=codes.device)
        return table.index_select(0, codes.flatten().int()).reshape(codes.shape)

    def _nearest(self, values: torch.Tensor) -> torch.Tensor:
        """Return the code of the nearest level of each number; on a midpoint, the lower one.

        Midpoints are halves of integers, so the half that a number lies in decides: one look-up in a
        table of all halves, ten times faster than a search.
        """
        end = 2 * self.codebook.positive[-1]
        halves = torch.arange(-end, end + 1, device=values.device) / 2
        edges = torch.tensor(self.codebook.edges, device=values.device)
        table = torch.bucketize(halves, edges).to(torch.uint8)
        index = (values * 2).ceil().clamp(-end, end).int() + end
        return table.index_select(0, index.flatten()).reshape(values.shape)

    def _pack(self, codes: torch.Tensor) -> torch.Tensor:
        if self.code_bits == 4:
            return fold(codes, 4)
        return torch.cat((fold(codes & 3, 2), fold(codes >> 2, 1)), -1)

    def _unpack(self, data: torch.Tensor, dim: int) -> torch.Tensor:
        if self.code_bits == 4:
            return unfold(data, 4)
        return unfold(data[..., : dim // 4], 2) | (unfold(data[..., dim // 4 :], 1) << 2)


FORMATS: Final[tuple[CacheFormat, ...]] = (LloydMax("kv4", FOUR_BITS), LloydMax("kv3", THREE_BITS))
PAIRS: Final[dict[str, tuple[str, str]]] = {"k8v4": ("int8", "kv4"), "k4v3": ("kv4", "kv3")}
"""Names that mean one format for keys and another for values."""
