"""Single operations beside torch, on one thread: `python -m bench.ops`.

A step goes through the states of 24 layers in turn, as a model does. torch's side of a step is the bare rule in
its fastest form, batched matrix products in place; the native side also convolves, normalises, keeps the tail and
writes the log. Prompts are compared with the reference kernels. Times are processor time, the least of many.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.core.spec import ModelSpec, Recurrent
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.mixers.gdn import GdnShape
from truekv.models.mixers.mamba2 import Mamba2Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.protocols import ScanKernel

LAYERS: Final = 24
PROMPT: Final = 512
SHAPES: Final = {
    "gdn 16 heads 128x128": GdnShape(1024, 16, 16, 128, 128, 4, 1e-6).spec(),
    "gdn 32 heads 128x128": GdnShape(2048, 16, 32, 128, 128, 4, 1e-6).spec(),
    "mamba2 48 heads 64x128": Mamba2Shape(1536, 48, 64, 1, 128, 4, 1e-6, (0.0, 1.0)).spec(),
    "mamba2 96 heads 64x128": Mamba2Shape(4096, 96, 64, 8, 128, 4, 1e-6, (0.0, 1.0)).spec(),
}


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation on one layer, in microseconds."""

    operation: str
    shape: str
    native: float
    torch: float
    ratio: float
    gbps: float | None
    """State read and written per second, 10^9 bytes; None where a state stays in the cache."""


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape per rule, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {name: layer for name, layer in SHAPES.items() if not asked.quick or name.split()[1] in {"16", "48"}}
    times = 10 if asked.quick else 40
    rows = [step(name, layer, times) for name, layer in shapes.items()]
    rows += [prompt(name, layer, 2 if asked.quick else 5) for name, layer in shapes.items()]
    if asked.json:
        sys.stdout.write(json.dumps({"rows": [asdict(row) for row in rows]}) + "\n")
    else:
        show(rows)


def step(name: str, layer: Recurrent, times: int) -> Measured:
    """Measure one token, with states that come from memory."""
    native = best(lambda: carry(layer, scans("native"), 1, LAYERS), times) / LAYERS
    bare = best(TORCH[layer.rule](layer), times) / LAYERS
    size = 4 * _numbers(layer.state[0].shape)
    return Measured("step", name, native, bare, bare / native, 2 * size / native / 1e3)


def prompt(name: str, layer: Recurrent, times: int) -> Measured:
    """Measure a chunk of 512 tokens."""
    native = best(lambda: carry(layer, scans("native"), PROMPT, 1), times)
    reference = best(lambda: carry(layer, scans("reference"), PROMPT, 1), 1)
    return Measured(f"prompt of {PROMPT}", name, native, reference, reference / native, None)


def best(make: Callable[[], Callable[[], None]], times: int) -> float:
    """Return the least processor time of a call, in microseconds."""
    call = make()
    call()
    least = float("inf")
    for _ in range(times):
        start = time.process_time_ns()
        call()
        least = min(least, (time.process_time_ns() - start) / 1e3)
    return least


def scans(backend: str) -> dict[str, ScanKernel]:
    """Return a backend's recurrent rules."""
    from truekv.core.folder import members

    return members(f"truekv.kernels.{backend}", "SCAN")  # type: ignore[return-value] (what the folder is for)


def carry(layer: Recurrent, rules: dict[str, ScanKernel], tokens: int, layers: int) -> Callable[[], None]:
    """Return a call that carries bfloat16 tokens through as many layers, each with memory of its own."""
    spec = ModelSpec("bench", 16, 16, 4096, "bfloat16", (layer,) * layers)
    planned = plan(spec, (None,) * layers, max_model_len=4096, max_num_seqs=1, drafts=0, dtype="bfloat16")
    arena = Arena(spec, planned, select(spec, (None,) * layers, backend="reference"))
    sequence = arena.open()
    described = arena.reserve([Chunk(sequence, [0] * tokens)])
    made = torch.Generator().manual_seed(0)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=made)

    heads, channels = layer.state[0].shape[0], layer.log[0].shape[0]
    taps = layer.state[1].shape[1] + 1
    inputs = {"conv": some(tokens, channels).bfloat16()}
    weights = {"conv": some(channels, taps).bfloat16()}
    if layer.rule == "gdn":
        inputs |= {"beta": some(tokens, heads).sigmoid(), "decay": -some(tokens, heads).abs()}
    else:
        inputs |= {"dt": some(tokens, heads).abs()}
        weights |= {"conv_bias": some(channels).bfloat16(), "A": -some(heads).abs(), "D": some(heads)}
    memory: list[Any] = list(arena.layers)

    def call() -> None:
        for held in memory:
            rules[layer.rule](layer, inputs, weights, held.state, held.log, described)

    return call


def torch_gdn(layer: Recurrent) -> Callable[[], Callable[[], None]]:
    """Make S <- e S + k d^T and its two products as batched matrix products, nothing else."""
    heads, keys, values = layer.state[0].shape
    states = torch.randn(LAYERS, heads, keys, values)
    q, k = torch.randn(heads, 1, keys) / keys, torch.randn(heads, 1, keys) / keys
    v, beta, keep = torch.randn(heads, 1, values), torch.rand(heads, 1, 1), torch.rand(heads, 1, 1)

    def call() -> None:
        for state in states:
            state.mul_(keep)
            state.baddbmm_(k.mT, (v - k @ state) * beta)
            _ = q @ state

    return lambda: call


def torch_mamba2(layer: Recurrent) -> Callable[[], Callable[[], None]]:
    """Make h <- e h + x b^T and its product with c as batched matrix products, nothing else."""
    heads, dim, size = layer.state[0].shape
    states = torch.randn(LAYERS, heads, dim, size)
    x, b, c = torch.randn(heads, dim, 1), torch.randn(heads, 1, size), torch.randn(heads, size, 1)
    keep = torch.rand(heads, 1, 1)

    def call() -> None:
        for state in states:
            state.mul_(keep).baddbmm_(x, b)
            _ = state @ c

    return lambda: call


TORCH: Final = {"gdn": torch_gdn, "mamba2": torch_mamba2}


def show(rows: list[Measured]) -> None:
    """Print the table."""
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("operation", no_wrap=True)
    table.add_column("shape", no_wrap=True)
    for title in ("native us", "torch us", "torch / native", "state GB/s"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        speed = "" if row.gbps is None else f"{row.gbps:.1f}"
        table.add_row(row.operation, row.shape, f"{row.native:,.0f}", f"{row.torch:,.0f}", f"{row.ratio:.1f}", speed)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _numbers(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


if __name__ == "__main__":
    main()
