"""Queries on their way into the frames of keys, in the interpreter."""

from __future__ import annotations

import math

import pytest
import torch
from kernels.native.cache import fill, formats
from kernels.triton.watched import Watched
from memory.toys import gqa, mla

from truekv.kernels.triton import layout
from truekv.kernels.triton import paged as triton


@pytest.mark.parametrize("name", ["f32", "bf16"])
def test_queries_of_rows_that_are_stored_as_they_are_lose_nothing(name: str) -> None:
    """Divided by its norm a query of bfloat16 would be rounded again, which costs more than the weights' 8 bits."""
    cache = fill(gqa(2, 80), formats(name, name), [3])
    (query,), row = cache.queries(cache.step([1]), 2), layout.layout(cache.fields[0])
    ((framed, factor),) = triton.into_frame((query * 1e30,), cache.fields[:1], (row,), 0.5, (torch.float32,))
    assert torch.equal(framed[..., : row.dim], query * 1e30)
    assert not framed[..., row.dim :].any()
    assert torch.equal(factor, torch.full_like(factor, 0.5 * math.log2(math.e)))


@pytest.mark.parametrize("tokens", [0, 1, 9])
@pytest.mark.parametrize("names", [("kv4", "int8"), ("int8", "bf16"), ("bf16", "turboquant_fp8"), ("q4_0", "q8_0")])
def test_queries_enter_both_frames_of_a_latent_row_in_one_launch(names: tuple[str, str], tokens: int) -> None:
    """To the bits of one after the other; strided as models make them."""
    cache = fill(mla(80, 64), formats(*names), [20], measured=True)
    product = torch.randn(tokens, 5, 80 + 64 + 3, generator=torch.Generator().manual_seed(3))
    queries = product[..., :80], product[..., 80:144]
    laid = [layout.layout(item) for item in cache.fields]
    dtypes = torch.float32, torch.float16
    apart = [
        triton.into_frame((query,), (item,), (row,), 0.3, (dtype,))[0]
        for query, item, row, dtype in zip(queries, cache.fields, laid, dtypes, strict=True)
    ]
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched, "query_kernel")
        together = triton.into_frame(queries, cache.fields, laid, 0.3, dtypes)
    assert watched.grids == [(-(-tokens * 5 // 16), 2)] * (tokens > 0)
    for got, wanted, row, dtype in zip(together, apart, laid, dtypes, strict=True):
        assert got[0].dtype == dtype
        assert got[0].shape == (tokens, 5, row.columns)
        assert all(torch.isfinite(part).all() for part in got)
        assert all(torch.equal(*pair) for pair in zip(got, wanted, strict=True))


def test_a_rotation_is_worked_out_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every launch asks for one, and a step has some hundred launches."""
    (stored, other), device = fill(gqa(2, 64), formats("kv4", "int8"), [3]).fields, torch.device("cpu")
    rows = [layout.layout(item) for item in (stored, other)]
    first = [layout.rotation(*pair, device) for pair in zip((stored, other), rows, strict=True)]
    # kv4 lies in another order than int8.
    assert not torch.equal(*first)
    monkeypatch.setattr(layout.Row, "dims", lambda _: pytest.fail("worked out again"))
    again = [layout.rotation(item, layout.layout(item), device) for item in (stored, other)]
    assert all(one is two for one, two in zip(first, again, strict=True))
