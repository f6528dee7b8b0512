"""A frame: everything that happens to a row once, outside of the loop that reads the cache.

A row x is stored as code(H((x - c) / s)), with a centre c and a scale s per kv head and channel, measured
once on the model, and the fixed rotation H. Reading costs nothing extra:

    scores   q' = H(s * q); the constant q . c is the same for every key and drops out of the softmax
    output   o = c + s * (H^T o'), because the attention weights sum to one
"""

# Shape suffixes: T tokens, H kv heads, Q query heads, D dim.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from truekv.formats.rotation import rotate, unrotate

if TYPE_CHECKING:
    from truekv.core.lazy import torch
    from truekv.core.protocols import CacheFormat


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Centre and scale, float32 [H, D] each or None, and whether rows are rotated."""

    centre: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    rotated: bool = False

    @property
    def identity(self) -> bool:
        """Whether rows are stored as they are."""
        return self.centre is None and self.scale is None and not self.rotated

    def rows(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Take rows [T, H, D] into the frame: what the codec encodes, float32."""
        rows = x_THD.float()
        if self.centre is not None:
            rows = rows - self.centre
        if self.scale is not None:
            rows = rows / self.scale
        return rotate(rows) if self.rotated else rows

    def query(self, q_TQD: torch.Tensor) -> torch.Tensor:
        """Take queries [T, Q, D] into the frame, Q a multiple of H: consecutive heads share a kv head."""
        query = q_TQD.float()
        if self.scale is not None:
            query = query * _grouped(self.scale, query.shape[-2])
        return rotate(query) if self.rotated else query

    def output(self, o_TQD: torch.Tensor) -> torch.Tensor:
        """Take averages [T, Q, D] of stored rows, by weights that sum to one, out of the frame."""
        output = o_TQD.float()
        if self.rotated:
            output = unrotate(output)
        if self.scale is not None:
            output = output * _grouped(self.scale, output.shape[-2])
        if self.centre is not None:
            output = output + _grouped(self.centre, output.shape[-2])
        return output

    def to(self, device: torch.device | str) -> Frame:
        """Return the frame on a device."""
        centre = None if self.centre is None else self.centre.to(device)
        scale = None if self.scale is None else self.scale.to(device)
        return Frame(centre, scale, self.rotated)


IDENTITY: Final = Frame()


def frame_for(codec: CacheFormat, measured: Frame | None) -> Frame:
    """Return the frame that a codec's rows are stored in, given what was measured on the model, if anything.

    Formats that neither rotate nor need a measurement (f32, bf16, llama.cpp's blocks) store rows as they are.
    """
    if not codec.rotated and not codec.calibrated:
        return IDENTITY
    return replace(measured or IDENTITY, rotated=codec.rotated)


def _grouped(values_HD: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Repeat each kv head's values for the query heads that share it: [H, D] -> [Q, D]."""
    return values_HD.repeat_interleave(query_heads // values_HD.shape[0], 0)
