"""Stored bytes that attention reads per second, beside what the machine reads: `python -m bench.attention`.

Every call attends to another layer, and all layers together are larger than any cache, so each row comes from
memory. Raw reads with as many threads are taken in between: the best of the run is what all rows are compared with; the
better of those right before and after a row is told too, as memory that others use is slower for a while.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from bench.fill import fill
from bench.machine import FOLDER, RawRead, describe, native, positive
from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.spec import Field, ModelSpec, Paged
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan
from truekv.serve.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Iterator

COLD_BYTES: Final = 450_000_000


@dataclass(frozen=True, slots=True)
class Shape:
    """A layer's query heads and fields, and the formats it is measured in."""

    name: str
    heads: int
    layer: Paged
    formats: tuple[str, ...]


def _gqa(kv_heads: int, dim: int) -> Paged:
    return Paged((Field("k", kv_heads, dim, "key"), Field("v", kv_heads, dim, "value")))


SHAPES: Final = (
    Shape("16q/8kv d128", 16, _gqa(8, 128), ("bf16", "int8", "fp8_e4m3", "kv4", "turboquant_4bit_nc")),
    Shape("8q/2kv d256", 8, _gqa(2, 256), ("bf16", "int8", "kv4")),
    Shape(
        "mla 20h 512+64",
        20,
        Paged((Field("latent", 1, 512, "both"), Field("rope", 1, 64, "key", floor_bits=8))),
        ("bf16", "int8", "kv4"),
    ),
)


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    contexts: tuple[int, ...] = (4096, 16384, 65536)
    batches: tuple[int, ...] = (1, 8)
    passes: int = 5
    cold_bytes: int = COLD_BYTES


QUICK: Final = Size(contexts=(4096, 16384), passes=3)


@dataclass(frozen=True, slots=True)
class Row:
    """One measurement in 10^9 bytes per second: stored rows, scales included, and raw reads right before and after."""

    shape: str
    format: str
    context: int
    batch: int
    gbps: float
    raw_gbps: float


def measure(size: Size, shapes: tuple[Shape, ...], backend: str, raw: RawRead, threads: int) -> Iterator[Row]:
    """Yield one row after the other, with a raw read before and after each."""
    before = raw.measure(threads)
    for shape in shapes:
        for name in shape.formats:
            for context in size.contexts:
                for batch in size.batches:
                    rate = attend_rate(shape, name, context, batch, size, backend)
                    after = raw.measure(threads)
                    yield Row(shape.name, name, context, batch, rate, max(before, after))
                    before = after


def attend_rate(shape: Shape, name: str, context: int, batch: int, size: Size, backend: str) -> float:
    """Decode one token of each sequence on layer after layer; return the best pass, in GB/s of stored rows."""
    (formats,) = choose_formats(_spec(shape, context, 1), name, "", "bfloat16")
    per_token = plan(_spec(shape, context, 1), [formats]).layers[0].bytes_per_token
    count = -(-size.cold_bytes // (per_token * context * batch))
    spec = _spec(shape, context, count)
    chosen = [formats] * count
    arena = Arena(
        spec, plan(spec, chosen, max_num_seqs=batch), select(spec, [one or () for one in chosen], backend=backend)
    )
    held = fill(arena, context - 1, batch)
    step = arena.reserve([Chunk(sequence, [0]) for sequence in held])
    scored = [field for field in shape.layer.fields if field.role != "value"]
    queries = tuple(torch.randn(batch, shape.heads, field.dim) for field in scored)
    scale = sum(field.dim for field in scored) ** -0.5
    layers = [layer for layer in arena.layers if isinstance(layer, PagedLayer)]
    best = float("inf")
    for _ in range(size.passes):
        start = time.perf_counter()
        for layer in layers:
            arena.kernels.attend(queries, layer.stored, scale, None, step)
        best = min(best, time.perf_counter() - start)
    return per_token * context * batch * count / best / 1e9


def _spec(shape: Shape, context: int, layers: int) -> ModelSpec:
    return ModelSpec("bench", 1024, 1024, context, "bfloat16", (shape.layer,) * layers)


def watched(rows: list[Row], raw_gbps: float) -> dict[str, object]:
    """Return the JSON object that is watched from outside."""
    return {
        "raw_read_gbps": round(raw_gbps, 3),
        "rows": [
            {
                "shape": row.shape,
                "format": row.format,
                "context": row.context,
                "batch": row.batch,
                "gbps": round(row.gbps, 3),
                "fraction_of_raw_read": round(row.gbps / raw_gbps, 4),
            }
            for row in rows
        ],
    }


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or the JSON object, and keep everything for bench.report."""
    parser = argparse.ArgumentParser(prog="python -m bench.attention", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer contexts and repetitions: under 5 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--backend", default="native", help="folder of truekv/kernels")
    parser.add_argument("--instruction-set", help="force its native kernels, instead of those that are chosen")
    parser.add_argument("--threads", type=positive, default=2)
    asked = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before a library with OpenMP is loaded
    torch.set_num_threads(asked.threads)
    rows: list[Row] = []
    try:
        library, raw = native(), RawRead()
        with library.using(asked.instruction_set or library.isa), Bar("measuring"):
            machine = describe(asked.threads)
            if not asked.json:
                print("; ".join(f"{key}: {value}" for key, value in machine.items()), flush=True)
            for row in measure(QUICK if asked.quick else Size(), SHAPES, asked.backend, raw, asked.threads):
                rows.append(row)
                if not asked.json:
                    print(
                        f"{row.shape:15s} {row.format:19s} {row.context:6d} x {row.batch} {row.gbps:7.2f} GB/s "
                        f"({row.raw_gbps:.2f} raw)",
                        flush=True,
                    )
    except Refused as error:
        print(error, file=sys.stderr)
        return 2
    result = watched(rows, raw.best[asked.threads])
    command = " ".join(["python -m bench.attention", *(arguments if arguments is not None else sys.argv[1:])])
    beside = [row.raw_gbps for row in rows]
    saved = {"machine": machine, "versions": {"kernels": asked.backend}, "command": command, **result}
    saved["raw_read_gbps_beside"] = beside
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "attention.json").write_text(json.dumps(saved, indent=1))
    print(json.dumps(result) if asked.json else f"raw read: {raw.best[asked.threads]:.2f} GB/s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
