"""The CUDA kernels as their own PTX, run on the CPU in the place of the device."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from kernels.cuda.ptx import Launch, Program, Wrong

from truekv.kernels.cuda import compiler, kernel, paged, trial
from truekv.kernels.reference import paged as reference

if TYPE_CHECKING:
    from kernels.native.cache import Cache

    from truekv.core.batch import Step

BOUND = 2**-9
"""Queries and weights are halves."""

NEEDS_NVCC = pytest.mark.skipif(compiler.nvcc() is None, reason="needs nvcc, which makes the PTX that runs here")


@functools.cache
def ptx(kind: kernel.Kind) -> str:
    found = compiler.nvcc()
    assert found is not None
    return found.ptx(kind.file, kind.text, compiler.options(kind.definitions))


class Emulated:
    """What `kernel.load` returns on a device; `text` is other PTX than the kernel's."""

    def __init__(self, text: str = "") -> None:
        self.grids: list[tuple[int, int, int]] = []
        self._text = text

    @property
    def launches(self) -> int:
        return len(self.grids)

    def load(self, kind: kernel.Kind, _device: torch.device) -> Emulated:
        self.program, self._shared_bytes = Program.read(self._text or ptx(kind)), kind.shared_bytes
        return self

    def launch(self, grid: tuple[int, int, int], arguments: tuple[object, ...]) -> None:
        self.grids.append(grid)
        given = [item if isinstance(item, torch.Tensor) else item.value for item in arguments]  # type: ignore[attr-defined]
        Launch(self.program, grid, given, self._shared_bytes).run()


def run(cache: Cache, step: Step, queries: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return paged.attend(queries, cache.fields, 0.11, cache.layer.window, step)


def tried(kind: kernel.Kind, text: str, monkeypatch: pytest.MonkeyPatch) -> float:
    """The error of other PTX in the trial of a kernel, NaN where it does what no device would do."""
    monkeypatch.setattr(trial, "load", Emulated(text).load)
    try:
        return trial.error(kind, torch.device("cpu"))
    except Wrong:
        return float("nan")


def drawn(cache: Cache, step: Step, heads: int) -> tuple[torch.Tensor, ...]:
    """Queries of a step, as a model of bf16 has them where rows are bf16 too: no kernel rounds those."""
    queries = cache.queries(step, heads)
    plain = cache.fields[0].format.name == "bf16"
    return tuple(query.bfloat16().float() for query in queries) if plain else queries


def error(cache: Cache, counts: list[int], group: int, emulated: Emulated) -> float:
    """Largest difference from the reference, relative to the largest number of each token and head."""
    step = cache.step(counts)
    queries = drawn(cache, step, group)
    scale = cache.layer.fields[0].dim ** -0.5
    wanted = reference.attend(queries, cache.fields, scale, cache.layer.window, step).double()
    before = emulated.launches
    got = paged.attend(queries, cache.fields, scale, cache.layer.window, step).double()
    assert emulated.launches == before + 1
    assert got.shape == wanted.shape
    return float(((got - wanted).abs().amax(-1) / wanted.abs().amax(-1)).max())
