"""Rows stored and attended to on the device, against the reference on the CPU, for every format that Triton takes."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from gpu.place import DEVICE
from memory.toys import Toy, formats_of, gqa, make_arena, mla, random_tokens

from truekv.core.batch import Chunk
from truekv.formats.choice import codecs
from truekv.kernels.triton import paged

if TYPE_CHECKING:
    from truekv.core.spec import Paged

LAYERS = {
    "gqa-64": gqa(2, 64),
    "gqa-128": gqa(2, 128),
    "gqa-256": gqa(1, 256),
    "window": gqa(2, 64, window=70),
    "mla": mla(128, 64),
}


@pytest.mark.parametrize("name", [name for name in codecs() if not codecs()[name].calibrated])
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_prefill_decode_and_verify(layer: Paged, name: str) -> None:
    (formats,) = formats_of((layer,), name)
    if reason := paged.refusal(layer, formats):
        pytest.skip(reason)
    toy, moved = Toy((layer,), query_groups=8), Toy((layer,), query_groups=8)
    moved.tables = [{key: rows.to(DEVICE) for key, rows in table.items()} for table in moved.tables]
    theirs = make_arena((layer,), name, drafts=3, backend="reference")
    ours = make_arena((layer,), name, drafts=3, backend="triton", device=DEVICE)
    pairs = [(theirs.open(), ours.open()) for _ in range(2)]
    tokens = random_tokens(260)
    for start, end, drafts in ((0, 200, 0), (200, 201, 0), (201, 205, 3), (205, 230, 0)):
        expected, got = (
            runs.run(arena, Chunk(pairs[0][side], tokens[start:end], drafts), Chunk(pairs[1][side], [start % 64]))
            for side, (runs, arena) in enumerate(((toy, theirs), (moved, ours)))
        )
        for out, right in zip(got, expected, strict=True):
            # Weights of 11 bits and queries of half precision, where rows are codes; of 8 bits where they are bfloat16.
            bound = 2e-2 if name == "bf16" else 4e-3
            assert float((out.cpu() - right).abs().max()) <= bound * float(right.abs().max())
        for side, arena in enumerate((theirs, ours)):
            arena.advance(pairs[0][side], end - start)
            arena.advance(pairs[1][side], 1)
    for stored in ours._paged():
        assert stored.data.device.type == DEVICE
    assert ours.kernels.calls[f"store[{formats[0].name}]"] >= 4
    ours.check()
    assert torch.isfinite(torch.cat(got)).all()
