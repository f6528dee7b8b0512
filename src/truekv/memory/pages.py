"""The rows of one attention layer: pages of bytes in the layer's own formats.

A page holds `page_tokens` tokens. Its fields follow one another, each with its heads one after the
other, each head with its planes:

    page = { field: { head: { codes[page_tokens] | scales[page_tokens] } } }
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.errors import Corrupted
from truekv.core.lazy import torch
from truekv.core.protocols import Stored
from truekv.core.untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import Field, Paged
    from truekv.formats.frame import Frame
    from truekv.kernels.table import Kernels

POISON = 0xFF
"""Fills bytes that nobody wrote: as float32, bf16, fp16 and fp8 all of them are NaN."""


def row_bytes(field: Field, chosen: CacheFormat) -> int:
    """Bytes that one token takes in one field, all heads together."""
    return field.heads * sum(chosen.planes(field.dim))


def page_bytes(layer: Paged, formats: Seq[CacheFormat], page_tokens: int) -> int:
    """Bytes of one page of a layer: what is planned, and what is allocated."""
    return page_tokens * sum(row_bytes(*pair) for pair in zip(layer.fields, formats, strict=True))


class PagedLayer:
    """Owns the rows of one layer; implements core.protocols.PagedMemory."""

    def __init__(
        self,
        name: str,
        layer: Paged,
        formats: Seq[CacheFormat],
        frames: Seq[Frame],
        kernels: Kernels,
        *,
        pages: int,
        page_tokens: int,
        poison: bool,
        check_finite: bool,
        device: torch.device | str,
    ) -> None:
        """Allocate uint8 [pages, page_bytes]; `frames` holds one per field."""
        size = (pages, page_bytes(layer, formats, page_tokens))
        self.data = untouched(size, torch.uint8, device)
        if poison:
            self.data.fill_(POISON)
        self.name = name
        self.layer = layer
        self.kernels = kernels
        self.check_finite = check_finite
        self.probe: Callable[[tuple[Stored, ...], tuple[torch.Tensor, ...], Step], None] | None = None
        """Shown what is stored, the rows that were given and the step, once the rows are stored."""
        stored: list[Stored] = []
        start = 0
        for field, chosen, frame in zip(layer.fields, formats, frames, strict=True):
            stored.append(Stored(field, chosen, frame, self.data, start, page_tokens))
            start += page_tokens * row_bytes(field, chosen)
        self.stored = tuple(stored)

    def attend(
        self, queries: tuple[torch.Tensor, ...], rows: tuple[torch.Tensor, ...], scale: float, step: Step
    ) -> torch.Tensor:
        """Store the rows, then attend to stored rows only; see core.protocols.PagedMemory.

        Raises Corrupted for rows that are not finite, before anything is stored.
        """
        if self.check_finite:
            self._check(rows)
        self.kernels.store(self.stored, rows, step)
        if self.probe is not None:
            self.probe(self.stored, rows, step)
        return self.kernels.attend(queries, self.stored, scale, self.layer.window, step)

    def copy(self, source: int, target: int) -> None:
        """Copy a whole page."""
        self.data[target] = self.data[source]

    def erase(self, pages: Seq[int], byte: int = POISON) -> None:
        """Fill whole pages with one byte."""
        self.data[list(pages)] = byte

    def erase_lines(self, page: int, line: int) -> None:
        """Fill one page with poison from a line on."""
        for stored in self.stored:
            start = stored.start
            for _head in range(stored.field.heads):
                for width in stored.format.planes(stored.field.dim):
                    end = start + stored.page_tokens * width
                    self.data[page, start + line * width : end] = POISON
                    start = end

    def tensors(self) -> Seq[torch.Tensor]:
        """Every tensor this layer allocated."""
        return (self.data,)

    def _check(self, rows: tuple[torch.Tensor, ...]) -> None:
        if self.kernels.ops.finite(*rows):
            return
        for field, values in zip(self.layer.fields, rows, strict=True):
            if bad := int((~torch.isfinite(values)).any(-1).any(-1).sum()):
                raise Corrupted(
                    f"{self.name}: the rows of '{field.name}' hold NaN or infinity for {bad} of {len(values)} tokens; "
                    "nothing was stored: check the weights and the compute dtype",
                    layer=self.name,
                )
