"""How fast the GPU kernels are, beside what the device copies: `python -m bench.gpu`, into bench/RESULTS-gpu.md.

Every launch that is measured moves at least a gigabyte, so no cache holds it, and is replayed as a CUDA graph between
two events, because launch by launch Python would be timed where it takes longer. The ceiling is a copy from device
memory to device memory in the same run: bytes read and written, per second.

Kernels are compiled first, by several processes at once. Every result is kept as soon as it is there
(build/bench/gpu.jsonl), and the page is written anew after each part, so a run that is cut off leaves what it had.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
from array import array
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from bench.gpu_decode import DESCRIPTIONS, MODELS, Drawn, asks, decode, fits, forget
from bench.machine import FOLDER
from truekv.core.batch import Sequence
from truekv.core.device import choose_device
from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.spec import Field, ModelSpec, Paged, Recurrent, Slab
from truekv.engine.recording import CudaRecording
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.layout import lay_out
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import PAGE_TOKENS, plan
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

    from truekv.core.spec import LayerSpec

RESULTS: Final = Path(__file__).parent / "RESULTS-gpu.md"
KINDS: Final = ("bf16", "fp8_e4m3", "int8", "kv4")
BUDGET: Final = 64 << 30
"""Bytes of cache into which as many sequences are put as fit."""
COMPILERS: Final = 12

Result = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured, and where."""

    device: Literal["cuda", "cpu"] = "cuda"
    least: int = 1 << 30
    """Bytes that one launch moves at least."""
    rounds: int = 20
    batch: int = 64
    scans: tuple[int, ...] = (64, 256)
    prompt: int = 4096
    depths: tuple[int, ...] = (8192, 65536)
    batches: tuple[int, ...] = (1, 16, 64)
    steps: int = 16
    dtype: str = "bfloat16"


def timed(run: Callable[[], object], size: Size) -> float:
    """Return the median seconds of a launch after two that are not counted, on a device of its graph, by events."""
    if size.device == "cuda":
        run = CudaRecording(cast("Callable[[], torch.Tensor]", run)).replay
    for _ in range(2):
        run()
    if size.device == "cpu":
        seconds: list[float] = []
        for _ in range(size.rounds):
            begin = time.perf_counter()
            run()
            seconds.append(time.perf_counter() - begin)
        return statistics.median(seconds)
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(size.rounds)]
    for start, end in events:
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events) / 1e3


def ceiling(size: Size) -> float:
    """Return the bytes per second that the device copies, read and written."""
    source = torch.ones(size.least // 4, device=size.device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / timed(lambda: target.copy_(source), size)


@dataclass(frozen=True, slots=True)
class Launch:
    """Something that is measured."""

    what: str
    moved: int
    """Bytes."""
    run: Callable[[], object]

    def measure(self, size: Size, rate: float) -> Result:
        """Time it."""
        if self.moved < size.least:
            raise AssertionError(f"{self.what} moves {self.moved} bytes, but a cache may hold less than {size.least}")
        seconds = timed(self.run, size)
        share = self.moved / seconds / rate
        return {"what": self.what, "ms": seconds * 1e3, "gb": self.moved / 1e9, "share": share}


def gqa(heads: int, dim: int) -> Paged:
    """Return a layer of grouped query heads."""
    return Paged((Field("k", heads, dim, "key"), Field("v", heads, dim, "value")))


MLA: Final = Paged((Field("latent", 1, 512, "both"), Field("rope", 1, 64, "key", floor_bits=8)))
SHAPES: Final = (
    ("32q/8kv d128", 32, gqa(8, 128), ("bf16", "fp8_e4m3", "int8", "q8_0", "q4_0", "int8/kv4", "kv4", "kv3")),
    ("16q/4kv d256", 16, gqa(4, 256), ("bf16", "int8", "kv4")),
    ("mla 20h 512+64", 20, MLA, ("bf16", "int8", "kv4")),
)


_IN_BOTH: Final = ((0, "q4_0"), (0, "kv4"), (0, "kv3"), (1, "kv4"), (2, "bf16"), (2, "int8"), (2, "kv4"))
"""Of the shapes: rows that are attended to in Triton as well."""


class Attention:
    """A layer's memory full of rows, and one new token of each sequence."""

    def __init__(self, layer: Paged, heads: int, kv: str, size: Size, backend: str = "auto") -> None:
        """Fill sequences as deep as makes a launch large enough."""
        formats, spec = _memory(layer, kv)
        batch = size.batch
        self.token_bytes = sum(
            item.heads * sum(chosen.planes(item.dim)) for item, chosen in zip(layer.fields, formats, strict=True)
        )
        pages = max(16, -(-size.least // (batch * self.token_bytes * PAGE_TOKENS)) + 1)
        self.depth = pages * PAGE_TOKENS
        planned = plan(spec, [formats], max_model_len=self.depth, max_num_seqs=batch, dtype="bfloat16")
        self.arena = Arena(spec, planned, select(spec, [formats], (), backend, size.device), device=size.device)
        (held,) = self.arena.layers
        assert isinstance(held, PagedLayer)
        self.stored = held.stored
        _fill(self.arena, held)
        shuffled = torch.randperm(batch * pages, generator=torch.Generator().manual_seed(0))
        order = array("q", cast("list[int]", shuffled.tolist()))
        rows = [
            (Sequence(pages=order[row * pages : (row + 1) * pages], slot=row), self.depth - 1, [0], 0)
            for row in range(batch)
        ]
        self.step = lay_out(rows, PAGE_TOKENS, self.arena.device)
        dims = [item.dim for item in layer.fields if item.role != "value"]
        self.queries = tuple(_normal((batch, heads, dim), size) for dim in dims)

    def __call__(self) -> object:
        """Attend."""
        return self.arena.kernels.attend(self.queries, self.stored, 0.1, None, self.step)


def _normal(shape: tuple[int, ...], size: Size) -> torch.Tensor:
    return torch.randn(shape, device=size.device).to(getattr(torch, size.dtype))


def attention(name: str, heads: int, layer: Paged, kv: str, size: Size, backend: str = "auto") -> Launch:
    """Attend with one new token of each sequence."""
    held = Attention(layer, heads, kv, size, backend)
    moved = size.batch * held.depth * held.token_bytes
    return Launch(f"attention {name}, {kv} in {held.arena.kernels.backend}, {size.batch} x {held.depth}", moved, held)


def gathered(size: Size, heads: int = 32) -> Launch:
    """Attend to the same kv4 rows as vLLM's TurboQuant does."""
    from bench import gpu_peers

    held = Attention(gqa(8, 128), heads, "kv4", size)
    fields = held.stored
    framed = fields[0].frame.query(held.queries[0].float()).contiguous()

    def run() -> torch.Tensor:
        return gpu_peers.gathered(framed, fields, 0.1, held.step)

    moved = size.batch * held.depth * held.token_bytes
    return Launch(f"vLLM's access pattern 32q/8kv d128, kv4, {size.batch} x {held.depth}", moved, run)


def _memory(layer: LayerSpec, kv: str) -> tuple[tuple[Any, ...], ModelSpec]:
    spec = ModelSpec("bench", 64, 64, 1 << 20, "bfloat16", (layer,))
    (formats,) = choose_formats(spec, kv, "", "bfloat16")
    return formats or (), spec


def _fill(arena: Arena, held: PagedLayer) -> None:
    """Store random rows in the first page, and copy its bytes to all others."""
    step = lay_out([(Sequence(pages=array("q", [0]), slot=0), 0, [0] * PAGE_TOKENS, 0)], PAGE_TOKENS, arena.device)
    shapes = [(PAGE_TOKENS, stored.field.heads, stored.field.dim) for stored in held.stored]
    arena.kernels.store(held.stored, tuple(torch.randn(shape, device=arena.device) for shape in shapes), step)
    held.data[1:] = held.data[0]


def peer(name: str, size: Size, heads: int = 32, kv_heads: int = 8, dim: int = 128) -> Launch:
    """Another attention over dense bf16 rows; Refused where it is not installed."""
    from bench import gpu_peers

    package, make = gpu_peers.PEERS[name]
    if gpu_peers.missing(package):
        raise Refused(f"{name} is left out: the package {package} is not installed")
    batch = size.batch
    depth = -(-size.least // (batch * kv_heads * dim * 4) // 16) * 16 + 16
    query = _normal((batch, heads, 1, dim), size)
    k, v = (_normal((batch, kv_heads, depth, dim), size) for _ in range(2))
    what = f"{name} {heads}q/{kv_heads}kv d{dim}, {size.dtype}, {batch} x {depth}"
    return Launch(what, k.nbytes + v.nbytes, make(query, k, v))


def fla(size: Size, batch: int, heads: int = 32, dim: int = 128) -> Launch:
    """One token of fla-core's gated delta rule; Refused where it is not installed."""
    from bench import gpu_peers

    if gpu_peers.missing("fla"):
        raise Refused("fla-core is left out: the package fla is not installed")
    one = 2 * 4 * batch * heads * dim * dim
    runs = [gpu_peers.fla(batch, heads, dim, size.device) for _ in range(max(1, -(-size.least // one)))]

    def run() -> None:
        for each in runs:
            each()

    return Launch(f"fla gated delta rule, {batch} rows, {len(runs)} layers", one * len(runs), run)


def recurrent(rule: str) -> Recurrent:
    """Return a layer of a 9B hybrid's sizes."""
    if rule == "gdn":
        state, channels, log = (32, 128, 128), 2 * 16 * 128 + 32 * 128, ("beta", "decay")
    else:
        state, channels, log = (96, 64, 128), 96 * 64 + 2 * 8 * 128, ("dt",)
    slabs = (Slab("state", state, "float32"), Slab("conv", (channels, 3), "model"))
    entries = (Slab("conv", (channels,), "model"), *(Slab(name, state[:1], "float32") for name in log))
    return Recurrent(rule, (), slabs, entries)


def scan(rule: str, batch: int, size: Size) -> Launch:
    """Carry the states of `batch` sequences over one token, layer by layer, until a launch's worth is moved."""
    layer = recurrent(rule)
    one = 2 * 4 * batch * layer.state[0].shape[0] * layer.state[0].shape[1] * layer.state[0].shape[2]
    count = max(1, -(-size.least // one))
    rows = [(Sequence(pages=array("q", [0]), slot=row), 0, [0], 0) for row in range(batch)]
    run = _scans(rule, count, rows, 0, size)
    return Launch(f"{rule} step, {batch} rows, {count} layers", one * count, run)


def _scans(
    rule: str, count: int, rows: list[tuple[Sequence, int, list[int], int]], drafts: int, size: Size
) -> Callable[[], None]:
    """Return what takes these rows' tokens through so many layers."""
    layer = recurrent(rule)
    memory, spec = _memory(layer, "bf16")
    longest = max(len(tokens) for _, _, tokens, _ in rows)
    planned = plan(spec, [memory], max_model_len=longest, max_num_seqs=len(rows), drafts=drafts, dtype="bfloat16")
    kernels = select(spec, [memory], device=size.device)
    arenas = [Arena(spec, planned, kernels, check_finite=False, device=size.device) for _ in range(count)]
    step = lay_out(rows, PAGE_TOKENS, arenas[0].device)
    heads, channels, tokens = layer.state[0].shape[0], layer.log[0].shape[0], len(step.owner)
    inputs = {"conv": torch.randn(tokens, channels, device=size.device).bfloat16()}
    inputs |= {item.name: torch.rand(tokens, heads, device=size.device) for item in layer.log[1:]}
    if "decay" in inputs:
        inputs["decay"] = -inputs["decay"]
    taps = torch.randn(channels, 4, device=size.device).bfloat16()
    weights = {"conv": taps, "A": -torch.rand(heads, device=size.device), "D": torch.rand(heads, device=size.device)}

    def run() -> None:
        for arena in arenas:
            (held,) = arena.layers
            assert isinstance(held, StateLayer)
            held.scan(inputs, weights, step)

    return run


def prompted(size: Size) -> Iterator[Result]:
    """Take a long prompt through one recurrent layer: in chunks, and with a draft behind it, hence token by token."""
    pages = array("q", range(-(-size.prompt // PAGE_TOKENS)))
    for rule, drafts in itertools.product(("gdn", "mamba2"), (0, 1)):
        row = (Sequence(pages=pages, slot=0), 0, [0] * size.prompt, drafts)
        what = f"{rule}, {'token by token' if drafts else 'in chunks'}"
        try:
            yield _prompt(what, _scans(rule, 1, [row], drafts, size), size)
        except Exception as error:  # noqa: BLE001 (one that fails must not cost the others their numbers)
            yield {"part": "missing", "what": f"prompt {what}", "why": str(error).splitlines()[0][:200]}
    if size.device == "cuda":
        from bench import gpu_peers

        if gpu_peers.missing("fla"):
            yield {"part": "missing", "what": "prompt fla", "why": "the package fla is not installed"}
        else:
            yield _prompt("gdn, fla in chunks", gpu_peers.fla_prompt(size.prompt, 32, 128, size.device), size)


def _prompt(what: str, run: Callable[[], object], size: Size) -> Result:
    seconds = timed(run, size)
    return {"part": "prompt", "what": what, "tokens": size.prompt, "ms": seconds * 1e3}


Made = tuple[str, tuple[Any, ...]]


def launches(size: Size, *, quick: bool) -> list[Made]:
    """Name everything that is launched: a function of this module, and its arguments."""
    found: list[Made] = [("attention", (*shape, kv, size)) for *shape, formats in SHAPES for kv in formats]
    found += [("scan", (rule, batch, size)) for rule in ("gdn", "mamba2") for batch in size.scans]
    if size.device == "cuda":
        # Beside what auto takes on devices that have a kernel in CUDA C++ for such rows.
        found += [("attention", (*SHAPES[place][:3], kv, size, "triton")) for place, kv in _IN_BOTH]
        # As many bytes in fewer and longer rows.
        found += [("attention", (*SHAPES[0][:3], kv, replace(size, batch=8))) for kv in ("bf16", "int8", "kv4")]
        found += [("gathered", (size,)), ("peer", ("torch SDPA", size)), ("peer", ("flashinfer", size))]
        found += [("fla", (size, size.scans[0]))]
        if not quick:
            found.append(("peer", ("flex attention", size)))
    return found


def made(one: Made) -> Launch:
    """Make a launch."""
    name, arguments = one
    return cast("Launch", globals()[name](*arguments))


def compiled(one: Made) -> str:
    """Launch once in a process of its own, which leaves compiled kernels to all others."""
    try:
        made(one).run()
        torch.cuda.synchronize()
    except Exception as error:  # noqa: BLE001 (what fails here fails again where it is measured, and is told there)
        return f"{one[0]}: {error}"
    return ""


def measured(size: Size, rate: float, *, quick: bool) -> Iterator[Result]:
    """Measure every launch; what cannot be launched says why."""
    for one in launches(size, quick=quick):
        try:
            yield {"part": "launch", **made(one).measure(size, rate)}
        except Exception as error:  # noqa: BLE001 (one that fails must not cost the others their numbers)
            yield {"part": "missing", "what": f"{one[0]} {one[1][0]}", "why": str(error).splitlines()[0][:200]}
        forget()


def decoded(size: Size, configs: dict[str, dict[str, Any]], *, quick: bool) -> Iterator[Result]:
    """Decode with every model, and say how many sequences fit."""
    for name, config in configs.items():
        drawn = Drawn(name, config, size.device, cast("Any", size.dtype))
        every = asks(quick=quick, drafting=drawn.drafting, kinds=KINDS, depths=size.depths, batches=size.batches)
        for ask in every:
            try:
                yield {"part": "decode", **decode(drawn, ask, size.steps)}
            except Exception as error:  # noqa: BLE001 (likewise)
                yield {"part": "missing", "what": f"{name} {ask}", "why": str(error).splitlines()[0][:200]}
            forget()
        del drawn
        forget()


def room() -> Iterator[Result]:
    """Count the sequences that fit; needs no device."""
    for name in MODELS:
        for kv in KINDS:
            counts = {str(depth): fits(name, kv, BUDGET, depth) for depth in Size().depths}
            yield {"part": "fits", "model": name, "kv": kv, "sequences": counts}


def describe(size: Size) -> Result:
    """Return what a reader needs to judge the numbers."""
    from importlib.metadata import version

    name = "none: tiny sizes on a CPU, where no number means anything"
    if size.device == "cuda":
        found = cast("Any", torch.cuda.get_device_properties(0))  # pyright: ignore[reportUnknownMemberType]
        name = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} processors"
    return {
        "part": "machine",
        "device": name,
        "torch": str(torch.__version__),
        "triton": version("triton"),
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def render(results: Seq[Result]) -> str:
    """Return the page."""

    def of(part: str) -> list[Result]:
        return [one for one in results if one["part"] == part]

    lines = ["# Results on a GPU", "", "Written by `python -m bench.gpu`.", ""]
    lines += ["; ".join(f"{name}: {value}" for name, value in one.items() if name != "part") for one in of("machine")]
    lines += [f"\nCopy: {one['rate'] / 1e9:,.0f} GB/s, read and written." for one in of("copy")]
    if launched := of("launch"):
        lines += [
            *("", "## Launches", "", "Each moves at least 1 GiB and is replayed as a graph, the median of 20.", ""),
            *("| launch | ms | GB | of copy |", "|---|---:|---:|---:|"),
            *(f"| {one['what']} | {one['ms']:.3f} | {one['gb']:.2f} | {one['share']:.0%} |" for one in launched),
        ]
    if prompts := of("prompt"):
        lines += [
            *("", "## A prompt through one recurrent layer", "", "Convolution included, but in what is not ours.", ""),
            *("| rule | tokens | ms | tokens/s |", "|---|---:|---:|---:|"),
            *(
                f"| {one['what']} | {one['tokens']:,} | {one['ms']:.3f} | {one['tokens'] / one['ms'] * 1e3:,.0f} |"
                for one in prompts
            ),
        ]
    if steps := of("decode"):
        lines += [
            *("", "## Decode", "", f"Random weights in bf16: {'; '.join(map(': '.join, DESCRIPTIONS.items()))}."),
            "A step is laid out on the host and run, and its likeliest tokens are read back. No draft is accepted:",
            *("every draft that is adds as much again as the tokens/s that stand there.", ""),
            "| model | cache | requests | depth | graphs | drafts | ms | of it layout | tokens/s | cache, GiB |",
            "|---|---|---:|---:|---|---:|---:|---:|---:|---:|",
            *(
                f"| {x['model']} | {x['kv']} | {x['batch']} | {x['depth']:,} | {'yes' if x['captured'] else 'no'} "
                f"| {x['drafts']} | {x['ms']:.2f} | {x['host_ms']:.2f} | {x['rate']:,.0f} | {x['cache_gib']:.2f} |"
                for x in steps
            ),
        ]
    if counted := of("fits"):
        depths = list(counted[0]["sequences"])
        lines += [
            *("", f"## Sequences in {BUDGET >> 30} GiB of cache, from the plan", ""),
            f"| model | cache | {' | '.join(f'of {int(depth):,} tokens' for depth in depths)} |",
            f"|---|---|{'---:|' * len(depths)}",
            *(
                f"| {one['model']} | {one['kv']} | {' | '.join(str(one['sequences'][depth]) for depth in depths)} |"
                for one in counted
            ),
        ]
    if left := of("missing"):
        lines += ["", "## Left out", "", *(f"- {one['what']}: {one['why']}" for one in left)]
    return "\n".join(lines) + "\n"


class Kept:
    """Results, each written down as soon as it is there."""

    def __init__(self, folder: Path, page: Path) -> None:
        """Start anew."""
        folder.mkdir(parents=True, exist_ok=True)
        self._file, self._page = folder / "gpu.jsonl", page
        self._file.write_text("")
        self.results: list[Result] = []

    def add(self, result: Result) -> None:
        """Keep one."""
        self.results.append(result)
        with self._file.open("a") as file:
            file.write(json.dumps(result) + "\n")
        self._page.write_text(render(self.results))
        print(json.dumps(result), flush=True)


def run(
    size: Size, kept: Kept, configs: dict[str, dict[str, Any]], *, quick: bool, engine: bool = True
) -> list[Result]:
    """Measure everything."""
    kept.add(describe(size))
    for one in room():
        kept.add(one)
    if size.device == "cuda":
        began = time.perf_counter()
        faults: list[str] = []
        try:
            with ProcessPoolExecutor(COMPILERS, mp_context=multiprocessing.get_context("spawn")) as pool:
                faults += [fault for fault in pool.map(compiled, launches(size, quick=quick)) if fault]
        except BrokenProcessPool as error:
            # What ended a process there is told where it is measured; the rest is compiled there too.
            faults.append(str(error))
        print(f"compiled in {time.perf_counter() - began:.0f} s", *faults, sep="\n", flush=True)
    rate = ceiling(size)
    kept.add({"part": "copy", "rate": rate})
    for one in itertools.chain(measured(size, rate, quick=quick), prompted(size)):
        kept.add(one)
    if engine:
        for one in decoded(size, configs, quick=quick):
            kept.add(one)
    return kept.results


def main(arguments: list[str] | None = None) -> int:
    """Measure and write the page."""
    parser = argparse.ArgumentParser(prog="python -m bench.gpu", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer sizes of whole models: a few minutes")
    parser.add_argument("--kernels-only", action="store_true", help="leave whole models out")
    given = parser.parse_args(arguments)
    try:
        choose_device("cuda")
    except Refused as error:
        print(f"bench.gpu: {error}")
        return 2
    os.environ.setdefault("TRITON_CACHE_DIR", str(FOLDER.parent / "triton"))
    run(Size(), Kept(FOLDER, RESULTS), MODELS, quick=given.quick, engine=not given.kernels_only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
