"""Captured decode steps against the same ones run eagerly, in turns: see bench/step.py."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench.fill import fill
from bench.machine import native
from bench.wire import some_token
from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.core.options import EngineOptions
from truekv.core.recording import recording
from truekv.engine.capture import StepGraphs
from truekv.kernels.native.library import Calls
from truekv.memory.arena import Arena
from truekv.serve.assemble import design

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.batch import Step


@dataclass(frozen=True, slots=True)
class Way:
    """Milliseconds of one forward: the whole step, and what the host does beside the kernels."""

    least: float
    median: float
    host: float


class Turns:
    """Sequences at a depth, whose next step is run one way or the other."""

    def __init__(self, model: str, kv: str, depth: int, sequences: int, steps: int) -> None:
        """Load a checkpoint; there is room for so many steps."""
        options = EngineOptions(kv_cache_dtype=kv, max_model_len=depth + steps, max_num_seqs=sequences + 1)
        blueprint = design(model, options)
        loaded = blueprint.checkpoint.load(blueprint.dtype, blueprint.kernels.ops)
        self.arena = Arena(loaded.spec, blueprint.plan, blueprint.kernels, blueprint.frames, check_finite=False)

        def eager(step: Step) -> torch.Tensor:
            return loaded.forward(step, self.arena.layers)

        self.graphs = StepGraphs(eager, self.arena)
        self.ways: dict[str, Callable[[Step], torch.Tensor]] = {"eager": eager, "captured": self.graphs}
        self._held = fill(self.arena, depth, sequences)

    def run(self, way: str) -> float:
        """Run one step; return its milliseconds."""
        step = self.arena.reserve([Chunk(held, [some_token(row)]) for row, held in enumerate(self._held)])
        begin = time.perf_counter()
        with torch.inference_mode():
            self.ways[way](step)
        spent = 1e3 * (time.perf_counter() - begin)
        for held in self._held:
            self.arena.advance(held, 1)
        return spent


def compare(model: str, kv: str, depth: int, sequences: int, threads: int, steps: int) -> dict[str, Way]:
    """Time so many steps of each way, with kernels and without, after a few that warm up."""
    torch.set_num_threads(threads)
    turns = Turns(model, kv, depth, sequences, 4 * (steps + 4))

    def measure() -> dict[str, list[float]]:
        seen: dict[str, list[float]] = {way: [] for way in turns.ways}
        for _ in range(steps + 4):
            for way, times in seen.items():
                times.append(turns.run(way))
        return {way: times[4:] for way, times in seen.items()}

    whole = measure()

    def at_once(*_: Any) -> None:  # noqa: ANN401
        """Make no call."""

    # Nothing is computed, so nobody must look at it either.
    with mock.patch.object(native(), "call", at_once), mock.patch.object(Calls, "__call__", at_once), recording():
        host = measure()
    assert turns.graphs.eager == 0
    return {way: Way(min(times), statistics.median(times), min(host[way])) for way, times in whole.items()}


def table(ways: dict[str, Way]) -> str:
    """Lay the result out for people."""
    lines = [f"{'':10s} {'least':>10s} {'median':>10s} {'host':>10s}  ms per step"]
    lines += [f"{name:10s} {way.least:10.3f} {way.median:10.3f} {way.host:10.3f}" for name, way in ways.items()]
    ratio = ways["eager"].median / ways["captured"].median
    return "\n".join([*lines, f"{'speed-up':10s} {ways['eager'].least / ways['captured'].least:9.3f}x {ratio:9.3f}x"])
