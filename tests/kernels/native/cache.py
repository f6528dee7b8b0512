"""Fields of one layer full of random rows: sequences of any lengths, pages in any order, NaN where nobody wrote."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from truekv.core.batch import Step
from truekv.core.protocols import Stored
from truekv.formats.choice import codecs
from truekv.formats.frame import Frame, frame_for
from truekv.kernels.native import paged as native
from truekv.kernels.reference import paged as reference

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import Paged

PAGE = 32


def make_step(lengths: list[int], counts: list[int], pages: torch.Tensor) -> Step:
    """The last `counts` of `lengths` tokens of each sequence are new; `pages` [B, W] is the page table."""
    position = torch.tensor(lengths) - torch.tensor(counts)
    starts = [sum(counts[:row]) for row in range(len(counts))]
    positions = torch.cat([torch.arange(length - count, length) for length, count in zip(lengths, counts, strict=True)])
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    place = torch.arange(max(counts))
    gather = torch.stack([start + place.clamp(max=count - 1) for start, count in zip(starts, counts, strict=True)])
    none = torch.zeros(len(counts), dtype=torch.int64)
    return Step(
        tokens=torch.zeros_like(owner),
        positions=positions,
        owner=owner,
        offset=positions - position[owner],
        gather=gather,
        position=position,
        count=torch.tensor(counts),
        certain=torch.tensor(counts),
        replay=none,
        slot=torch.arange(len(counts)),
        pages=pages,
        page=pages[owner, positions // PAGE],
        line=positions % PAGE,
    )


@dataclass
class Cache:
    """Rows of all sequences in memory, and what is asked of them."""

    layer: Paged
    fields: tuple[Stored, ...]
    rows: tuple[torch.Tensor, ...]
    lengths: list[int]
    pages: torch.Tensor
    seed: int

    def step(self, counts: list[int], sequences: list[int] | None = None) -> Step:
        """The last `counts` tokens of some sequences, by default of all."""
        chosen = list(range(len(self.lengths))) if sequences is None else sequences
        return make_step([self.lengths[index] for index in chosen], counts, self.pages[chosen])

    def shortened(self, lengths: list[int]) -> Cache:
        """The same memory as it was (or as it is seen) when the sequences were that long."""
        return replace(self, lengths=lengths)

    def queries(self, step: Step, group: int, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
        """A query of each token and head, which depends on the position alone."""
        made: list[torch.Tensor] = []
        for item in self.layer.fields:
            if item.role == "value":
                continue
            make = torch.Generator().manual_seed(self.seed + item.dim)
            table = torch.randn(97, item.heads * group, item.dim, generator=make)
            made.append(table[step.positions % len(table)].to(dtype))
        return tuple(made)


def fill(
    layer: Paged,
    formats: tuple[CacheFormat, ...],
    lengths: list[int],
    *,
    seed: int = 0,
    measured: bool = False,
    spare: int = 3,
) -> Cache:
    """Store random rows with the reference; `measured` frames are far from neutral where the format takes them."""
    make = torch.Generator().manual_seed(seed)
    widths = [-(-length // PAGE) for length in lengths]
    order = torch.randperm(sum(widths) + spare, generator=make)
    pages = torch.full((len(lengths), max(widths)), int(order[-1]))
    for row, width in enumerate(widths):
        pages[row, :width] = order[sum(widths[:row]) :][:width]
    size = PAGE * sum(
        item.heads * sum(chosen.planes(item.dim)) for item, chosen in zip(layer.fields, formats, strict=True)
    )
    data = torch.full((len(order), size), 0xFF, dtype=torch.uint8)
    fields: list[Stored] = []
    start = 0
    for item, chosen in zip(layer.fields, formats, strict=True):
        frame = Frame(
            2 * torch.randn(item.heads, item.dim, generator=make),
            0.5 + torch.rand(item.heads, item.dim, generator=make),
        )
        stored = Stored(item, chosen, frame_for(chosen, frame if measured else None), data, start, PAGE)
        fields.append(stored)
        start += item.heads * stored.head_bytes
    rows = tuple(torch.randn(sum(lengths), item.heads, item.dim, generator=make) for item in layer.fields)
    step = make_step(lengths, lengths, pages)
    reference.store(tuple(fields), rows, step)
    return Cache(layer, tuple(fields), rows, lengths, pages, seed)


def formats(*names: str) -> tuple[CacheFormat, ...]:
    return tuple(codecs()[name] for name in names)


def error(cache: Cache, counts: list[int], group: int, *, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference between native and reference, relative to the largest number of the reference."""
    step = cache.step(counts)
    queries = cache.queries(step, group, dtype)
    scale = cache.layer.fields[0].dim ** -0.5
    wanted = reference.attend(queries, cache.fields, scale, cache.layer.window, step)
    got = native.attend(queries, cache.fields, scale, cache.layer.window, step)
    assert got.dtype == wanted.dtype == dtype
    assert got.shape == wanted.shape
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())
