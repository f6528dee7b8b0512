"""Caches of any depth without their prefill: rows of random numbers, encoded by the kernels, on every page."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from truekv.core.batch import Sequence, Step
    from truekv.memory.arena import Arena

SAMPLE: Final = 512
"""Tokens whose rows are drawn and encoded; deeper caches repeat these pages' bytes, each in memory of its own."""


def fill(arena: Arena, depth: int, sequences: int, seed: int = 0) -> list[Sequence]:
    """Open sequences of `depth` tokens each.

    Rows are standard normal in their frames; recurrent states are the zero state, and are said to hold the
    tokens. How fast a row is read does not depend on what it holds, only on where it lies, in which format.
    """
    opened = [arena.open() for _ in range(sequences)]
    if not depth:
        return opened
    sample = min(depth, SAMPLE)
    _draw(arena, arena.reserve([Chunk(opened[0], [0] * sample)]), seed)
    arena.advance(opened[0], sample)
    drawn = list(opened[0].pages)
    for sequence in opened:
        if missing := depth - sequence.position:
            arena.reserve([Chunk(sequence, [0] * missing)])
            arena.advance(sequence, missing)
        _repeat(arena, drawn, [page for page in sequence.pages if page not in set(drawn)])
    for layer in arena.layers:
        if isinstance(layer, StateLayer):
            layer.folded[[sequence.slot for sequence in opened]] = depth
    return opened


def _draw(arena: Arena, step: Step, seed: int) -> None:
    """Encode random rows for the tokens of a step; layers that are alike get the same bytes."""
    generator = torch.Generator().manual_seed(seed)
    pages = cast("list[int]", step.page.unique().tolist())
    encoded: dict[object, PagedLayer] = {}
    for layer in _paged(arena):
        alike = encoded.setdefault(tuple((stored.field, stored.format.name) for stored in layer.stored), layer)
        if alike is not layer:
            layer.data[pages] = alike.data[pages]
            continue
        shapes = [(len(step.page), stored.field.heads, stored.field.dim) for stored in layer.stored]
        arena.kernels.store(layer.stored, tuple(torch.randn(shape, generator=generator) for shape in shapes), step)


def _repeat(arena: Arena, drawn: list[int], copies: list[int]) -> None:
    for start in range(0, len(copies), len(drawn)):
        part = copies[start : start + len(drawn)]
        for layer in _paged(arena):
            layer.data[part] = layer.data[drawn[: len(part)]]


def _paged(arena: Arena) -> list[PagedLayer]:
    return [layer for layer in arena.layers if isinstance(layer, PagedLayer)]
