"""Caches of any depth without their prefill: rows of random numbers, encoded by the kernels, on every page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.memory.pages import PagedLayer

if TYPE_CHECKING:
    from truekv.core.batch import Sequence
    from truekv.memory.arena import Arena

SAMPLE: Final = 512
"""Tokens whose rows are drawn and encoded; deeper caches repeat these pages' bytes, each in memory of its own."""


def fill(arena: Arena, depth: int, sequences: int, seed: int = 0) -> list[Sequence]:
    """Open sequences of `depth` tokens each. Rows are standard normal in their frames; states stay zero.

    How fast a row is read does not depend on what it holds, only on where it lies, in which format.
    """
    opened = [arena.open() for _ in range(sequences)]
    if not depth:
        return opened
    first = opened[0]
    sample = min(depth, SAMPLE)
    step = arena.reserve([Chunk(first, [0] * sample)])
    drawn = list(first.pages)
    generator = torch.Generator().manual_seed(seed)
    layers = [layer for layer in arena.layers if isinstance(layer, PagedLayer)]
    encoded: dict[object, PagedLayer] = {}
    for layer in layers:
        alike = encoded.setdefault(tuple((stored.field, stored.format.name) for stored in layer.stored), layer)
        if alike is not layer:
            layer.data[drawn] = alike.data[drawn]
            continue
        for stored in layer.stored:
            rows_THD = torch.randn(sample, stored.field.heads, stored.field.dim, generator=generator)
            arena.kernels.store(stored, rows_THD, step)
    arena.advance(first, sample)
    for sequence in opened:
        if sequence.position < depth:
            arena.reserve([Chunk(sequence, [0] * (depth - sequence.position))])
            arena.advance(sequence, depth - sequence.position)
        copies = [page for page in sequence.pages if page not in set(drawn)]
        for start in range(0, len(copies), len(drawn)):
            part = copies[start : start + len(drawn)]
            for layer in layers:
                layer.data[part] = layer.data[drawn[: len(part)]]
    return opened
