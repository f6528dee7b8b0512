"""Single operations beside torch, on one thread: `python -m bench.ops`.

A step goes through the states, weights and pages of 24 layers in turn, as a model does. torch's side of a recurrent
step is the bare rule in its fastest form, batched matrix products in place; the native side also convolves, normalises,
keeps the tail and writes the log. Where transformers is installed, its own functions for all of that except the log
make a second row, "in transformers". Prompts, encoding and sampling are compared with the reference kernels, linear
maps with torch.nn.functional.linear in bfloat16. Times are processor time, the least of many.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import json
import sys
import time
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final

from bench.machine import FOLDER, describe
from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.core.ops import Part
from truekv.core.sampling import Draw
from truekv.core.spec import Field, ModelSpec, Paged, Recurrent
from truekv.formats.choice import choose_formats
from truekv.kernels.native.sampling import SAMPLING as NATIVE
from truekv.kernels.reference.sampling import SAMPLING as REFERENCE
from truekv.kernels.table import fastest_ops, select
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan
from truekv.models.mixers.gdn import GdnShape
from truekv.models.mixers.mamba2 import Mamba2Shape

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.protocols import ScanKernel
    from truekv.core.sampling import Sampling

LAYERS: Final = 24
PROMPT: Final = 512
SHAPES: Final = {
    "gdn 16 heads 128x128": GdnShape(1024, 16, 16, 128, 128, 4, 1e-6).spec(),
    "gdn 32 heads 128x128": GdnShape(2048, 16, 32, 128, 128, 4, 1e-6).spec(),
    "mamba2 48 heads 64x128": Mamba2Shape(1536, 48, 64, 1, 128, 4, 1e-6, (0.0, 1.0)).spec(),
    "mamba2 96 heads 64x128": Mamba2Shape(4096, 96, 64, 8, 128, 4, 1e-6, (0.0, 1.0)).spec(),
}


ROWS: Final = (1, 4, 128, 512)
# A layer of Qwen3.5-0.8B with attention: queries with gates, keys and values; the output; both maps of the MLP.
MAPS: Final = {"qkv": (1024, 5120), "out": (2048, 1024), "up": (1024, 7168), "down": (3584, 1024)}
VOCABULARY: Final = 151_936
# Temperature, top_k, top_p and min_p over logits with some fifty likely tokens, or over normal ones, which are flat.
DRAWS: Final = {
    "greedy": (0.0, 0, 1.0, 0.0),
    "top_p .95, top_k 20": (0.8, 20, 0.95, 0.0),
    "top_p .95": (0.8, 0, 0.95, 0.0),
    "min_p .05": (0.8, 0, 1.0, 0.05),
    "temperature .8": (0.8, 0, 1.0, 0.0),
    "flat, top_p .95": (0.8, 0, 0.95, 0.0),
    "flat, T 3, top_p .95": (3.0, 0, 0.95, 0.0),
}
CACHE: Final = Paged((Field("k", 2, 256, "key"), Field("v", 2, 256, "value")))


@dataclass(frozen=True, slots=True)
class Measured:
    """One operation on one layer, in microseconds."""

    operation: str
    shape: str
    native: float
    torch: float
    ratio: float
    gbps: float | None
    """State read and written, or weights read, per second, 10^9 bytes; None where they stay in the cache."""
    share: float | None = None
    """Of the time that the linear maps of the same layer take."""


def main() -> None:
    """Measure, print a table or one JSON object, and keep it for `bench.report`."""
    parser = argparse.ArgumentParser(prog="python -m bench.ops", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one shape per rule, fewer repetitions")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    shapes = {name: layer for name, layer in SHAPES.items() if not asked.quick or name.split()[1] in {"16", "48"}}
    times = 10 if asked.quick else 40
    rows = [step(name, layer, times) for name, layer in shapes.items()]
    if importlib.util.find_spec("transformers") is not None:
        rows += [step(name, layer, times, "in transformers") for name, layer in shapes.items() if layer.rule == "gdn"]
    rows += [prompt(name, layer, 2 if asked.quick else 5) for name, layer in shapes.items()]
    rows += [linear(count, times) for count in ROWS]
    maps = sum(best(functools.partial(native_maps, 1, *size, LAYERS), times) for size in MAPS.values()) / LAYERS
    rows += [encode(name, maps, times) for name in ("int8", "kv4", "q4_0")]
    rows += [sample(name, count, times // 4) for name in DRAWS for count in (1, 16)]
    result = {"rows": [asdict(row) for row in rows]}
    command = " ".join(["python -m bench.ops", *sys.argv[1:]])
    saved = {"machine": describe(1), "versions": {"kernels": "native"}, "command": command, **result}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "ops.json").write_text(json.dumps(saved, indent=1))
    if asked.json:
        sys.stdout.write(json.dumps(result) + "\n")
    else:
        show(rows)


def step(name: str, layer: Recurrent, times: int, beside: str = "") -> Measured:
    """Measure one token, with states that come from memory."""
    native = best(lambda: carry(layer, scans("native"), 1, LAYERS), times) / LAYERS
    theirs = best(transformers_gdn(layer) if beside else TORCH[layer.rule](layer), times) / LAYERS
    size = 4 * _numbers(layer.state[0].shape)
    return Measured(f"step {beside}".strip(), name, native, theirs, theirs / native, 2 * size / native / 1e3)


def prompt(name: str, layer: Recurrent, times: int) -> Measured:
    """Measure a chunk of 512 tokens."""
    native = best(lambda: carry(layer, scans("native"), PROMPT, 1), times)
    reference = best(lambda: carry(layer, scans("reference"), PROMPT, 1), 1)
    return Measured(f"prompt of {PROMPT}", name, native, reference, reference / native, None)


def linear(rows: int, times: int) -> Measured:
    """Measure the map into the MLP's inner space for so many tokens."""
    into, out = MAPS["up"]
    layers = LAYERS if rows < 16 else 2
    native = best(lambda: native_maps(rows, into, out, layers), times if rows < 16 else 3) / layers
    torch_us = best(lambda: torch_maps(rows, into, out, layers), times if rows < 16 else 3) / layers
    read = 2 * into * out / native / 1e3 if rows < 16 else None
    return Measured(f"linear of {rows}", f"{into} to {out}", native, torch_us, torch_us / native, read)


def encode(name: str, maps: float, times: int) -> Measured:
    """Measure one token's keys and values; `maps` is what the linear maps of a layer take, in microseconds."""
    native = best(lambda: stores(name, "native"), times) / LAYERS
    reference = best(lambda: stores(name, "reference"), 3) / LAYERS
    return Measured("encode", f"{name} k, v 2x256", native, reference, reference / native, None, native / maps)


def sample(name: str, rows: int, times: int) -> Measured:
    """Measure the draw of a token from each of some rows of logits."""
    native = best(lambda: draws(name, rows, NATIVE), 4 * times)
    reference = best(lambda: draws(name, rows, REFERENCE), times)
    return Measured(f"sample of {rows}", name, native, reference, reference / native, None)


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


def native_maps(rows: int, into: int, out: int, layers: int) -> Callable[[], None]:
    """Return a call that maps bfloat16 rows by as many weights, each in memory of its own."""
    weight = torch.randn(out, into).bfloat16()
    maps = [fastest_ops().matrix([Part(weight)]) for _ in range(layers)]
    x = torch.randn(rows, into).bfloat16()

    def call() -> None:
        for one in maps:
            one(x)

    return call


def torch_maps(rows: int, into: int, out: int, layers: int) -> Callable[[], None]:
    """Return the same call for torch."""
    weight = torch.randn(out, into).bfloat16()
    weights = [weight.clone() for _ in range(layers)]
    x = torch.randn(rows, into).bfloat16()

    def call() -> None:
        for one in weights:
            torch.nn.functional.linear(x, one)

    return call


def stores(name: str, backend: str) -> Callable[[], None]:
    """Return a call that encodes and writes one token on all layers."""
    spec = ModelSpec("bench", 1024, 1024, 4096, "bfloat16", (CACHE,) * LAYERS)
    formats = choose_formats(spec, name, "", "bfloat16")
    planned = plan(spec, formats, max_model_len=4096, max_num_seqs=1, drafts=0, dtype="bfloat16")
    arena = Arena(spec, planned, select(spec, formats, backend=backend))
    described = arena.reserve([Chunk(arena.open(), [0])])
    layers = [layer for layer in arena.layers if isinstance(layer, PagedLayer)]
    rows_1KD = torch.randn(1, 2, 256).bfloat16()

    def call() -> None:
        for layer in layers:
            arena.kernels.store(layer.stored, (rows_1KD, rows_1KD), described)

    return call


def draws(name: str, rows: int, sampling: Sampling) -> Callable[[], None]:
    """Return a call that draws."""
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(rows, VOCABULARY, generator=made)
    if not name.startswith("flat"):
        likely = torch.randint(VOCABULARY, (rows, 50), generator=made)
        logits.scatter_add_(1, likely, 9 + 6 * torch.rand(rows, 50, generator=made))
    asked = [Draw(row, *DRAWS[name], 0.37) for row in logits]

    def call() -> None:
        sampling.draw(asked)

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


def transformers_gdn(layer: Recurrent) -> Callable[[], Callable[[], None]]:
    """Make what transformers' Qwen3-Next does with one token in bfloat16: convolve, normalise, apply the rule, keep it.

    As in Qwen3NextGatedDeltaNet.forward; the linear maps, the gates and the norm around it are left out on both sides.
    """
    from transformers.models.qwen3_next import modeling_qwen3_next

    theirs: Any = modeling_qwen3_next
    value_heads, key_dim, value_dim = layer.state[0].shape
    channels, taps = layer.log[0].shape[0], layer.state[1].shape[1] + 1
    keys = (channels - value_heads * value_dim) // 2
    states = torch.randn(LAYERS, 1, value_heads, key_dim, value_dim)
    tails = torch.randn(LAYERS, 1, channels, taps).bfloat16()
    mixed, weight = torch.randn(1, channels, 1).bfloat16(), torch.randn(channels, taps).bfloat16()
    beta, decay = torch.rand(1, 1, value_heads).bfloat16(), -torch.rand(1, 1, value_heads)

    def call() -> None:
        for state, tail in zip(states, tails, strict=True):
            convolved = theirs.causal_conv1d_update(mixed, tail, weight, None, "silu").transpose(1, 2)
            query, key, value = torch.split(convolved, [keys, keys, value_heads * value_dim], dim=-1)
            _, after = theirs.torch_recurrent_gated_delta_rule(
                query.reshape(1, 1, -1, key_dim),
                key.reshape(1, 1, -1, key_dim),
                value.reshape(1, 1, -1, value_dim),
                g=decay,
                beta=beta,
                initial_state=state,
                output_final_state=True,
                use_qk_l2norm_in_kernel=True,
            )
            state.copy_(after)

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
    for title in ("native us", "torch us", "torch / native", "GB/s", "of the maps"):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        speed = "" if row.gbps is None else f"{row.gbps:.1f}"
        share = "" if row.share is None else f"{row.share:.1%}"
        times = (f"{row.native:,.0f}", f"{row.torch:,.0f}", f"{row.ratio:.1f}")
        table.add_row(row.operation, row.shape, *times, speed, share)
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def _numbers(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())


if __name__ == "__main__":
    main()
