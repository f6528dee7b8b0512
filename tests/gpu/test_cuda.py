"""The kernels in CUDA C++ on the device: compiled, tried, against the reference on the CPU, and replayed as a graph."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

import pytest
import torch
from kernels.cuda.emulated import drawn
from kernels.native.cache import fill, formats
from memory.toys import gqa, mla

from truekv.engine.recording import CudaRecording
from truekv.kernels.cuda import compiler, kernel, paged, trial
from truekv.kernels.cuda.driver import Function
from truekv.kernels.reference import paged as reference

if TYPE_CHECKING:
    from collections.abc import Callable

    from kernels.native.cache import Cache

    from truekv.core.batch import Step
    from truekv.core.protocols import Stored

DEVICE = "cuda"
BOUND = 2**-9
"""Of the largest number of a token and head: weights are halves, queries integers of 16 bits."""


@pytest.fixture(autouse=True)
def _hopper() -> None:
    if not kernel.runs_on(torch.device(DEVICE, 0)):
        pytest.skip("needs a device of compute capability 9.0")


@pytest.fixture
def launches(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Every launch of a kernel in CUDA C++."""
    made: list[object] = []
    launch = Function.launch

    def counted(self: Function, *arguments: Any) -> None:
        made.append(arguments)
        launch(self, *arguments)

    monkeypatch.setattr(Function, "launch", counted)
    return made


def moved(step: Step) -> Step:
    return dataclasses.replace(
        step, **{item.name: getattr(step, item.name).to(DEVICE) for item in dataclasses.fields(step)}
    )


def there(cache: Cache) -> tuple[Stored, ...]:
    return tuple(dataclasses.replace(item, data=item.data.to(DEVICE)) for item in cache.fields)


def rows_of(kind: kernel.Kind, lengths: list[int], seed: int = 0) -> Cache:
    layer = mla(kernel.LATENT, kernel.ROPE) if kind.tiles else gqa(2, kind.dim)
    return fill(layer, formats(kind.keys, kind.values), lengths, seed=seed)


def error(cache: Cache, counts: list[int], group: int, launches: list[object]) -> float:
    step = cache.step(counts)
    queries = drawn(cache, step, group)
    scale, window = cache.layer.fields[0].dim ** -0.5, cache.layer.window
    wanted = reference.attend(queries, cache.fields, scale, window, step).double()
    before = len(launches)
    got = paged.attend(tuple(query.to(DEVICE) for query in queries), there(cache), scale, window, moved(step))
    assert len(launches) == before + 1
    return float(((got.double().cpu() - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())


@pytest.mark.parametrize("kind", kernel.KINDS, ids=str)
def test_it_compiles_and_passes_its_trial(kind: kernel.Kind) -> None:
    assert trial.problem(kind, torch.device(DEVICE, 0)) is None
    assert compiler.compiler().version


@pytest.mark.parametrize("kind", kernel.KINDS, ids=str)
@pytest.mark.parametrize("length", [1, 31, 32, 33, 511, 512, 513, 3000])
def test_lengths_and_kinds(length: int, kind: kernel.Kind, launches: list[object]) -> None:
    cache = rows_of(kind, [length, 40], seed=length)
    assert error(cache, [1, 2], 8 * kind.tiles - 4 if kind.tiles else 4, launches) < BOUND


@pytest.mark.parametrize(("group", "counts"), [(1, [8, 3]), (2, [4, 1]), (3, [2, 1]), (5, [1, 1]), (8, [1, 1])])
def test_groups_and_query_lengths(group: int, counts: list[int], launches: list[object]) -> None:
    cache = fill(gqa(2, 128), formats("kv4", "kv4"), [700, 33])
    assert error(cache, counts, group, launches) < BOUND


@pytest.mark.parametrize(("code", "rope"), [("int8", "int8"), ("kv4", "int8"), ("bf16", "bf16")])
@pytest.mark.parametrize(("heads", "counts"), [(1, [8, 3]), (20, [2, 1]), (20, [4, 1]), (128, [1, 1])])
def test_heads_of_latent_rows(heads: int, counts: list[int], code: str, rope: str, launches: list[object]) -> None:
    # Of bf16 neither queries nor weights are rounded to its 8 bits.
    bound = 1e-4 if code == "bf16" else BOUND
    assert error(rows_of(kernel.Kind(code, kernel.LATENT, rope, 2), [2100, 33]), counts, heads, launches) < bound


@pytest.mark.parametrize("window", [1, 31, 33, 100, 512, 700])
def test_windows(window: int, launches: list[object]) -> None:
    cache = fill(gqa(1, 128, window), formats("kv4", "kv4"), [900, 40])
    assert error(cache, [3, 2], 2, launches) < BOUND


def captured(function: Callable[[], torch.Tensor]) -> CudaRecording:
    return CudaRecording(function, pool=torch.cuda.graph_pool_handle(), aside=torch.cuda.Stream())


@pytest.mark.parametrize("kind", kernel.KINDS, ids=str)
def test_a_graph_replays_what_eager_steps_compute_with_other_contents(
    kind: kernel.Kind, launches: list[object]
) -> None:
    """Another length, other queries and other pages in the same buffers; spans that nobody writes hold NaN."""
    cache, group = rows_of(kind, [900, 700]), 4 * kind.tiles - 2 if kind.tiles else 4
    fields, steps = there(cache), [cache.shortened(lengths).step([2, 2]) for lengths in ([600, 40], [900, 700])]
    held, queries = moved(steps[0]), tuple(query.to(DEVICE) for query in cache.queries(steps[0], group))
    recording = captured(lambda: paged.attend(queries, fields, 0.1, None, held))
    assert len(launches) == 2
    for step in (*steps, steps[0]):
        for item in dataclasses.fields(step):
            getattr(held, item.name).copy_(getattr(step, item.name))
        for query, other in zip(queries, cache.queries(step, group), strict=True):
            query.copy_(other)
        replayed = recording.replay().clone()
        assert torch.isfinite(replayed).all()
        assert torch.equal(replayed, paged.attend(queries, fields, 0.1, None, held))
    assert len(launches) == 5
