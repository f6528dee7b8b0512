"""How fast the GPU kernels are, beside what the device copies: `python -m bench.gpu`, into bench/RESULTS-gpu.md.

Every launch that is measured moves at least a gigabyte, so no cache holds it, and is timed with CUDA events. The
ceiling is a copy from device memory to device memory in the same run: bytes read and written, per second.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import statistics
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from bench.checkpoints import DESCRIPTIONS, checkpoint
from bench.machine import FOLDER
from truekv import LLM, SamplingParams
from truekv.core.batch import Sequence
from truekv.core.device import choose_device
from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.spec import Field, ModelSpec, Paged, Recurrent, Slab
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.layout import lay_out
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import PAGE_TOKENS, plan
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from truekv.core.spec import LayerSpec

RESULTS: Final = Path(__file__).parent / "RESULTS-gpu.md"
LEAST: Final = 1 << 30
"""Bytes that one launch moves at least."""
ROUNDS: Final = 20
PROMPT: Final = 512
ANSWER: Final = 64


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement."""

    what: str
    milliseconds: float
    gigabytes: float
    """Moved by a launch, 10^9."""
    share: float
    """Of the copy ceiling."""


def timed(run: Callable[[], object], rounds: int = ROUNDS) -> float:
    """Return the median seconds of a launch, by CUDA events, after two that are not counted."""
    for _ in range(2):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(rounds)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


class Ceiling:
    """What the device copies."""

    def __init__(self) -> None:
        """Copy two gigabytes."""
        source = torch.ones(LEAST // 4, device="cuda")
        target = torch.empty_like(source)
        self.rate = 2 * source.nbytes / timed(lambda: target.copy_(source))
        """Bytes per second, read and written."""

    def row(self, what: str, moved: int, run: Callable[[], object]) -> Row:
        """Measure a launch that moves so many bytes."""
        if moved < LEAST:
            raise AssertionError(f"{what} moves {moved} bytes, but a cache may hold less than {LEAST}")
        seconds = timed(run)
        return Row(what, seconds * 1e3, moved / 1e9, moved / seconds / self.rate)


def gqa(heads: int, dim: int) -> Paged:
    """Return a layer of grouped query heads."""
    return Paged((Field("k", heads, dim, "key"), Field("v", heads, dim, "value")))


MLA: Final = Paged((Field("latent", 1, 512, "both"), Field("rope", 1, 64, "key", floor_bits=8)))
SHAPES: Final = (
    ("32q/8kv d128", 32, gqa(8, 128), ("bf16", "fp8_e4m3", "int8", "q4_0", "int8/kv4", "kv4", "kv3")),
    ("16q/4kv d256", 16, gqa(4, 256), ("bf16", "int8", "kv4")),
    ("mla 20h 512+64", 20, MLA, ("bf16", "int8", "kv4")),
)


def attention(
    ceiling: Ceiling, name: str, heads: int, layer: Paged, kv: str, batch: int = 64, backend: str = "auto"
) -> Row:
    """Attend with one new token of each of `batch` sequences, as deep as makes a launch large enough."""
    memory, spec = _memory(layer, kv)
    per_token = sum(
        item.heads * sum(chosen.planes(item.dim)) for item, chosen in zip(layer.fields, memory, strict=True)
    )
    pages = max(16, -(-LEAST // (batch * per_token * PAGE_TOKENS)) + 1)
    planned = plan(spec, [memory], max_model_len=pages * PAGE_TOKENS, max_num_seqs=batch, dtype="bfloat16")
    arena = Arena(spec, planned, select(spec, [memory], (), backend, "cuda"), check_finite=False, device="cuda")
    (held,) = arena.layers
    assert isinstance(held, PagedLayer)
    _fill(arena, held)
    shuffled = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
    order = cast("list[int]", shuffled.tolist())
    rows = [
        (Sequence(pages=order[row * pages : (row + 1) * pages], slot=row), pages * PAGE_TOKENS - 1, [0], 0)
        for row in range(batch)
    ]
    step = lay_out(rows, PAGE_TOKENS, arena.device)
    dims = [item.dim for item in layer.fields if item.role != "value"]
    queries = tuple(torch.randn(batch, heads, dim, device="cuda", dtype=torch.bfloat16) for dim in dims)
    moved = batch * pages * PAGE_TOKENS * per_token
    return ceiling.row(
        f"attention {name}, {kv} in {arena.kernels.backend}, {batch} x {pages * PAGE_TOKENS}",
        moved,
        lambda: arena.kernels.attend(queries, held.stored, 0.1, None, step),
    )


def _memory(layer: LayerSpec, kv: str) -> tuple[tuple[Any, ...], ModelSpec]:
    spec = ModelSpec("bench", 64, 64, 1 << 20, "bfloat16", (layer,))
    (formats,) = choose_formats(spec, kv, "", "bfloat16")
    return formats or (), spec


def _fill(arena: Arena, held: PagedLayer) -> None:
    """Store random rows in the first page, and copy its bytes to all others."""
    step = lay_out([(Sequence(pages=[0], slot=0), 0, [0] * PAGE_TOKENS, 0)], PAGE_TOKENS, arena.device)
    for stored in held.stored:
        rows = torch.randn(PAGE_TOKENS, stored.field.heads, stored.field.dim, device="cuda", dtype=torch.bfloat16)
        arena.kernels.store(stored, rows, step)
    held.data[1:] = held.data[0]


def sdpa(ceiling: Ceiling, batch: int = 64, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Row:
    """Torch's own attention over dense bf16 rows, as a peer."""
    depth = -(-LEAST // (batch * kv_heads * dim * 4))
    query = torch.randn(batch, heads, 1, dim, device="cuda", dtype=torch.bfloat16)
    k, v = (torch.randn(batch, kv_heads, depth, dim, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    attend = torch.nn.functional.scaled_dot_product_attention
    return ceiling.row(
        f"torch SDPA {heads}q/{kv_heads}kv d{dim}, bf16, {batch} x {depth}",
        k.nbytes + v.nbytes,
        lambda: attend(query, k, v, enable_gqa=True),
    )


def recurrent(rule: str) -> Recurrent:
    """Return a layer of a 9B hybrid's sizes."""
    if rule == "gdn":
        state, channels, log = (32, 128, 128), 2 * 16 * 128 + 32 * 128, ("beta", "decay")
    else:
        state, channels, log = (96, 64, 128), 96 * 64 + 2 * 8 * 128, ("dt",)
    slabs = (Slab("state", state, "float32"), Slab("conv", (channels, 3), "model"))
    entries = (Slab("conv", (channels,), "model"), *(Slab(name, state[:1], "float32") for name in log))
    return Recurrent(rule, (), slabs, entries)


def scan(ceiling: Ceiling, rule: str, batch: int) -> Row:
    """Carry the states of `batch` sequences over one token, layer by layer, until a launch's worth is moved."""
    layer = recurrent(rule)
    memory, spec = _memory(layer, "bf16")
    planned = plan(spec, [memory], max_model_len=PAGE_TOKENS, max_num_seqs=batch, dtype="bfloat16")
    kernels = select(spec, [memory], device="cuda")
    one = 2 * 4 * batch * layer.state[0].shape[0] * layer.state[0].shape[1] * layer.state[0].shape[2]
    arenas = [Arena(spec, planned, kernels, check_finite=False, device="cuda") for _ in range(max(1, -(-LEAST // one)))]
    rows = [(Sequence(pages=[0], slot=row), 0, [0], 0) for row in range(batch)]
    step = lay_out(rows, PAGE_TOKENS, arenas[0].device)
    heads, channels = layer.state[0].shape[0], layer.log[0].shape[0]
    inputs = {"conv": torch.randn(batch, channels, device="cuda", dtype=torch.bfloat16)}
    inputs |= {item.name: torch.rand(batch, heads, device="cuda") for item in layer.log[1:]}
    if "decay" in inputs:
        inputs["decay"] = -inputs["decay"]
    taps = torch.randn(channels, 4, device="cuda", dtype=torch.bfloat16)
    weights = {"conv": taps, "A": -torch.rand(heads, device="cuda"), "D": torch.rand(heads, device="cuda")}

    def run() -> None:
        for arena in arenas:
            (held,) = arena.layers
            assert isinstance(held, StateLayer)
            held.scan(inputs, weights, step)

    return ceiling.row(f"{rule} step, {batch} rows, {len(arenas)} layers", one * len(arenas), run)


def decode(name: str, kv: str, batch: int, capture: str) -> dict[str, Any]:
    """Answer `batch` random prompts; tokens per second after the first token of each."""
    options: dict[str, Any] = {"kv_cache_dtype": kv, "capture": capture, "max_num_seqs": batch}
    # Every prompt is to be computed each time.
    options |= {"enable_prefix_caching": False, "sentinel": False, "device": "cuda"}
    llm = LLM(str(checkpoint(name)), max_model_len=PROMPT + ANSWER, **options)
    make = torch.Generator().manual_seed(0)
    drawn = torch.randint(4, 32000, (batch, PROMPT), generator=make)
    prompts = cast("list[list[int]]", drawn.tolist())
    seconds: dict[int, float] = {}
    # Twice: kernels are compiled and steps captured the first time.
    for count in (ANSWER, 1, ANSWER):
        start = time.perf_counter()
        llm.generate(prompts, SamplingParams(max_tokens=count, ignore_eos=True))
        torch.cuda.synchronize()
        seconds[count] = time.perf_counter() - start
    rate = batch * (ANSWER - 1) / (seconds[ANSWER] - seconds[1])
    del llm
    gc.collect()
    torch.cuda.empty_cache()
    return {"model": name, "kv": kv, "batch": batch, "capture": capture, "rate": rate}


def describe() -> dict[str, str]:
    """Return what a reader needs to judge the numbers."""
    from importlib.metadata import version

    found = cast("Any", torch.cuda.get_device_properties(0))  # pyright: ignore[reportUnknownMemberType]
    return {
        "device": f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} processors",
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def render(machine: dict[str, str], rate: float, rows: Seq[Row], decoded: Seq[dict[str, Any]]) -> str:
    """Return the page."""
    lines = [
        "# Results on a GPU",
        "",
        "Written by `python -m bench.gpu`. Launches move at least 1 GiB each and are timed with CUDA events, the",
        f"median of {ROUNDS}; the share is of what the device copies in the same run, read and written.",
        "",
        "; ".join(f"{name} {value}" for name, value in machine.items()),
        "",
        f"Copy: {rate / 1e9:,.0f} GB/s",
        "",
        "| launch | ms | GB | share of copy |",
        "|---|---:|---:|---:|",
        *(f"| {row.what} | {row.milliseconds:.3f} | {row.gigabytes:.2f} | {row.share:.0%} |" for row in rows),
    ]
    if decoded:
        lines += [
            "",
            f"Decode after prompts of {PROMPT} random tokens, {ANSWER - 1} tokens each, tokens/s of all requests;",
            f"random weights: {'; '.join(f'{name}: {text}' for name, text in DESCRIPTIONS.items())}.",
            "",
            "| model | cache | requests | captured | tokens/s |",
            "|---|---|---:|---|---:|",
            *(f"| {x['model']} | {x['kv']} | {x['batch']} | {x['capture']} | {x['rate']:,.0f} |" for x in decoded),
        ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kernels-only", action="store_true", help="leave the engine out")
    given = parser.parse_args()
    try:
        choose_device("cuda")
    except Refused as error:
        print(f"bench.gpu: {error}")
        return 2
    ceiling = Ceiling()
    rows: list[Row] = []
    for name, heads, layer, formats in SHAPES:
        rows += [attention(ceiling, name, heads, layer, kv) for kv in formats]
    # Beside what auto takes on devices that have kernels in CUDA C++ for such rows.
    rows += [attention(ceiling, name, heads, layer, "kv4", backend="triton") for name, heads, layer, _ in SHAPES[:2]]
    rows += [sdpa(ceiling), *(scan(ceiling, rule, batch) for rule in ("gdn", "mamba2") for batch in (64, 256))]
    decoded = [
        decode(name, kv, batch, capture)
        for name in (() if given.kernels_only else DESCRIPTIONS)
        for kv in ("bf16", "int8")
        for batch in (1, 16, 64)
        for capture in ("off", "on")
    ]
    machine = describe()
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "gpu.json").write_text(json.dumps({"machine": machine, "decode": decoded}))
    RESULTS.write_text(render(machine, ceiling.rate, rows, decoded))
    print(RESULTS.read_text())
    return 0


if __name__ == "__main__":
    sys.exit(main())
