"""Attention on the device in frames that are far from neutral, for every format, against float64 on the CPU."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from gpu.place import DEVICE, ON_DEVICE
from kernels.native.cache import fill, formats
from memory.toys import gqa, mla

from truekv.formats.choice import codecs
from truekv.formats.frame import Frame
from truekv.kernels.cuda import kernel
from truekv.kernels.cuda import paged as cuda
from truekv.kernels.reference import paged as reference
from truekv.kernels.triton import paged as triton
from truekv.kernels.triton import tiles

if TYPE_CHECKING:
    from kernels.native.cache import Cache

    from truekv.core.batch import Step
    from truekv.core.protocols import Stored
    from truekv.core.spec import Paged
    from truekv.kernels.table import PagedKernels

LAYERS = {"gqa-64": gqa(2, 64), "gqa-128": gqa(1, 128), "gqa-256": gqa(1, 256), "mla": mla(512, 64)}


def moved(stored: Stored, data: torch.Tensor) -> Stored:
    frame = Frame(*(None if part is None else part.to(DEVICE) for part in (stored.frame.centre, stored.frame.scale)))
    kept = dataclasses.replace(stored.frame, centre=frame.centre, scale=frame.scale)
    return dataclasses.replace(stored, data=data, frame=kept)


def on_device(step: Step) -> Step:
    parts = {item.name: getattr(step, item.name).to(DEVICE) for item in dataclasses.fields(step)}
    return dataclasses.replace(step, **parts)


def cache_of(layer: Paged, name: str) -> Cache:
    item = codecs()[name]
    names = [name if item.code_bits >= field.floor_bits else "int8" for field in layer.fields]
    return fill(layer, formats(*names), [1200, 33], measured=True)


@pytest.mark.parametrize("group", [1, 8, 20])
@pytest.mark.parametrize("name", sorted(codecs()))
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_decode_verify_and_a_chunk(layer: Paged, name: str, group: int) -> None:
    cache = cache_of(layer, name)
    if reason := triton.refusal(layer, tuple(stored.format for stored in cache.fields)):
        pytest.skip(reason)
    data = cache.fields[0].data.to(DEVICE)
    fields = tuple(moved(stored, data) for stored in cache.fields)
    for counts in ([1, 1], [4, 2], [70, 1]) if ON_DEVICE else ([2, 1],):
        step = cache.step(counts)
        queries = cache.queries(step, group)
        wanted = reference.attend(queries, cache.fields, 0.1, layer.window, step).double()
        got = triton.attend(tuple(query.to(DEVICE) for query in queries), fields, 0.1, layer.window, on_device(step))
        assert got.device.type == DEVICE
        # Weights of 11 bits and queries of half precision where rows are codes; of 8 bits where they are bfloat16.
        bound = 2e-2 if name == "bf16" else 5e-3
        assert float((got.cpu().double() - wanted).abs().max()) <= bound * float(wanted.abs().max())


@pytest.mark.parametrize("backend", [triton, cuda], ids=["triton", "cuda"])
@pytest.mark.parametrize(
    ("layer", "name", "group"),
    [
        (gqa(1, 128), "bf16", 8),
        (gqa(1, 128), "int8", 4),
        (gqa(1, 128), "kv4", 8),
        (gqa(1, 128), "kv4", 16),
        (mla(512, 64), "int8", 16),
        (mla(512, 64), "int8", 20),
    ],
    ids=["bf16", "int8", "kv4", "kv4-16", "latent-16", "latent-20"],
)
def test_a_program_of_several_spans_leaves_the_same_bits(
    layer: Paged, name: str, group: int, backend: PagedKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever joins the sums of spans, they are joined in one order and rounded alike."""
    if ON_DEVICE and backend is cuda and not kernel.runs_on(torch.device(DEVICE, 0)):
        pytest.skip("needs a device of compute capability 9.0")
    cache = fill(layer, formats(name, name), [3500, 33, 600, 2049])
    data = cache.fields[0].data.to(DEVICE)
    fields = tuple(moved(stored, data) for stored in cache.fields)
    step = on_device(cache.step([1] * 4))
    queries = tuple(query.to(DEVICE) for query in cache.queries(step, group))
    made: list[int] = []
    empty = triton.Sums.empty
    monkeypatch.setattr(triton.Sums, "empty", lambda *given: made.append((sums := empty(*given)).each) or sums)
    one = backend.attend(queries, fields, 0.1, None, step)
    monkeypatch.setattr(tiles, "_MANY", 1)
    several = backend.attend(queries, fields, 0.1, None, step)
    # Triton has no registers for that where rows are latent ones, nor on older devices.
    able = backend is cuda or (layer.fields[0].role == "key" and tiles.arch() not in range(1, 90))
    assert made == [1, tiles.FOLD if able else 1]
    assert torch.equal(several, one)


@pytest.mark.parametrize("name", sorted(codecs()))
@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS)
def test_bytes_are_those_of_the_reference(layer: Paged, name: str) -> None:
    cache = cache_of(layer, name)
    if reason := triton.refusal(layer, tuple(stored.format for stored in cache.fields)):
        pytest.skip(reason)
    data = torch.full_like(cache.fields[0].data, 0xFF).to(DEVICE)
    step = on_device(cache.step(cache.lengths))
    fields = tuple(moved(stored, data) for stored in cache.fields)
    triton.store(fields, tuple(rows.to(DEVICE) for rows in cache.rows), step)
    assert torch.equal(data.cpu(), cache.fields[0].data)
