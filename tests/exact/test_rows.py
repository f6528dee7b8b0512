"""What attention stores and sees: bounds, codes, windows and far pages."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch
from exact.paths import drawn
from memory.toys import Toy, gqa, make_arena, random_tokens

from truekv.core.batch import Chunk
from truekv.formats.choice import codecs
from truekv.kernels.native.library import library
from truekv.kernels.reference.paged import planes
from truekv.memory.pages import PagedLayer

if TYPE_CHECKING:
    from exact.stage import Stage

    from truekv.core.protocols import Stored

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")


def test_rows_come_back_within_their_bound(stage: Stage) -> None:
    """Through arena and native kernels, in frames that differ in every layer and channel, outliers included."""
    for model, cache_format in (("mla", "fp8"), ("dense", "int8"), ("dense", "kv4")):
        llm = stage.llm(model, frozenset(), cache_format)
        arena, measured = llm._engine.runner.arena, llm._blueprint.frames
        tokens = drawn(40, 3)
        held = arena.open(tokens)
        step = arena.reserve([Chunk(held, tokens)])
        make = torch.Generator().manual_seed(2)
        for index, layer in enumerate(arena.layers):
            assert isinstance(layer, PagedLayer)
            rows: list[torch.Tensor] = []
            for stored in layer.stored:
                frame = measured[index, stored.field.name]
                row = torch.randn(len(tokens), stored.field.heads, stored.field.dim, generator=make)
                row[:, :, 5] *= 100 if cache_format != "fp8" else 1
                rows.append(row * frame.scale + frame.centre)
            queries = tuple(torch.zeros(len(tokens), 4, item.field.dim) for item in layer.stored if scored(item))
            layer.attend(queries, tuple(rows), 1.0, step)
            for stored, row in zip(layer.stored, rows, strict=True):
                frame = dataclasses.replace(measured[index, stored.field.name], rotated=stored.format.rotated)
                lines = [plane[held.pages].transpose(1, 2).flatten(0, 1)[: len(tokens)] for plane in planes(stored)]
                decoded = stored.format.decode(torch.cat(lines, -1), stored.field.dim)
                framed = frame.rows(row)
                assert bool(((decoded - framed).abs() <= stored.format.bound(framed) * 1.001 + 1e-5).all()), (
                    f"{model}, {cache_format}: layer {index}, {stored.field.name}"
                )


def scored(stored: Stored) -> bool:
    return stored.field.role != "value"


def test_codes_of_a_row_and_of_its_negative_are_opposite() -> None:
    rows = torch.randn(64, 64, generator=torch.Generator().manual_seed(1))
    for name in ("kv4", "kv3"):
        codec = codecs()[name]
        assert torch.equal(codec.decode(codec.encode(-rows), 64), -codec.decode(codec.encode(rows), 64))


def test_a_window_sees_exactly_its_tokens() -> None:
    toy = Toy((gqa(2, 16, window=5),))
    tokens = random_tokens(40)
    arena = make_arena(toy.layers, "f32", max_num_seqs=1)
    got = toy.feed(arena, arena.open(), tokens)
    table = toy.tables[0]
    q, k, v = (table[name][tokens].double() for name in ("q.k", "k", "v"))
    score = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(2, 1)) * 0.3
    place = torch.arange(len(tokens))
    seen = (place[None] <= place[:, None]) & (place[None] > place[:, None] - 5)
    weight = score.masked_fill(~seen, -torch.inf).softmax(-1)
    expected = torch.einsum("hqk,khd->qhd", weight, v.repeat_interleave(2, 1)).flatten(1)
    assert (got - expected).abs().max() < 1e-5


def test_offsets_beyond_two_gibibytes() -> None:
    toy = Toy((gqa(2, 64),))
    tokens = random_tokens(40)
    arena = make_arena(toy.layers, "f32", poison=False, max_num_seqs=1)
    (layer,) = arena.layers
    assert isinstance(layer, PagedLayer)
    page_bytes = layer.data.shape[1]
    pages = (1 << 31) // page_bytes + 9
    # Unlike torch's, numpy's zeros cost no memory before they are written.
    data = torch.from_numpy(np.zeros((pages, page_bytes), np.uint8))
    layer.data, layer.stored = data, tuple(dataclasses.replace(stored, data=data) for stored in layer.stored)
    arena._free_pages = [pages - 1, pages - 2]
    held = arena.open()
    got = toy.feed(arena, held, tokens)
    assert min(held.pages) * page_bytes > 1 << 31
    assert torch.equal(got, toy.plain(tuple(tokens)))
