"""Both engines on the same checkpoints, in one run and by turns: `python -m bench.decode --peer llama.cpp`.

Caches reach a depth without its prefill: truekv's through bench.fill, llama.cpp's through a saved state whose
rows are repeated (bench.engines.llama), transformers' through random tensors (bench.engines.transformers).
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from statistics import correlation, fmean
from typing import TYPE_CHECKING, Final

from bench.checkpoints import CONFIGS, checkpoint
from bench.convert import gguf
from bench.frames import frames
from bench.machine import FOLDER, describe, positive
from bench.wire import EngineFailed, Worker
from truekv.core.errors import Refused
from truekv.serve.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator

FORMATS: Final = {"bf16": "f16", "int8": "q8_0", "kv4": "q4_0"}
"""truekv's formats, and llama.cpp's of as many bits."""
PEER_PYTHON: Final = FOLDER / "peer" / "bin" / "python"
PEER_READY: Final = FOLDER / "peer" / "ready"
"""Made by `make bench-peer` when all of it is built."""
NO_PEER: Final = "llama.cpp is not built here; build it with 'make bench-peer', or name another engine with --peer"


SAME: Final = {"bf16": 0.95, "int8": 0.9, "kv4": 0.5}
"""Least correlation of both engines' logits. Rounded rows make routers of random weights choose other experts."""
SAME_TOKENS: Final = 48


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    depths: tuple[int, ...] = (0, 4096, 16384, 32768)
    formats: tuple[str, ...] = ("bf16", "int8", "kv4")
    models: tuple[str, ...] = ("dense", "hybrid", "mla")
    rounds: int = 4
    steps: int = 6
    """Tokens of one engine before it is the other's turn."""
    prompts: tuple[int, ...] = (512, 2048)
    """Tokens of prefill from empty."""
    middle: int = 4096
    """Where a chunk is appended, and where several sequences are decoded."""
    chunk: int = 128
    sequences: int = 8


QUICK: Final = Size(
    depths=(0, 4096, 16384), formats=("int8", "kv4"), rounds=2, steps=4, prompts=(), chunk=0, sequences=0
)


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured on both engines: tokens per second, or bytes."""

    what: str
    """decode, prefill, append (a chunk of prefill at a depth), memory."""
    model: str
    depth: int
    batch: int
    tokens: int
    """Of prefill; 1 for decode."""
    format: str
    peer_format: str
    truekv: float
    peer: float

    @property
    def ratio(self) -> float:
        """How many times truekv's number is the peer's."""
        return self.truekv / self.peer


@dataclass(frozen=True, slots=True)
class Load:
    """What both engines of a pair are started with."""

    model: str
    format: str
    context: int
    sequences: int
    threads: int

    @property
    def options(self) -> dict[str, int]:
        """What every engine takes."""
        return {"context": self.context, "sequences": self.sequences, "threads": self.threads}


def start_truekv(load: Load) -> Worker:
    """Start truekv, with measured frames where the format needs them."""
    measured = str(frames(load.model)) if load.format == "kv4" else ""
    path = str(checkpoint(load.model))
    return Worker(sys.executable, "bench.engines.truekv", path, kv=load.format, frames=measured, **load.options)


def start_llama(load: Load) -> tuple[Worker, str]:
    """Start llama.cpp with the format of as many bits, and name it."""
    name, values = FORMATS[load.format], int(load.model != "mla")  # it stores an MLA latent once, as a key
    path = str(gguf(load.model))
    return Worker(str(PEER_PYTHON), "bench.engines.llama", path, kv=name, values=values, **load.options), name


def start_transformers(load: Load) -> tuple[Worker, str]:
    """Start transformers, which has bf16 rows whatever truekv stores."""
    path = str(checkpoint(load.model))
    return Worker(sys.executable, "bench.engines.transformers", path, threads=load.threads), "bf16"


START: Final = {"llama.cpp": start_llama, "transformers": start_transformers}


def compare(size: Size, peer: str, threads: int, versions: dict[str, str]) -> Iterator[Row]:
    """Measure everything, model by model and format by format, and yield rows as they come."""
    if peer == "llama.cpp" and not PEER_READY.is_file():
        raise Refused(NO_PEER)
    # Room for the tokens that are added at a depth.
    room = 64 + size.rounds * size.steps + size.chunk
    longest = max(*size.depths, size.middle if size.chunk else 0, *size.prompts, 0) + room
    for model in size.models:
        for kv in size.formats:
            with _pair(Load(model, kv, longest, 1, threads), size, peer, versions) as pair:
                yield from pair.alone()
            if size.sequences:
                load = Load(model, kv, size.middle + room, size.sequences, threads)
                with _pair(load, size, peer, versions) as pair:
                    yield pair.decode(size.middle, size.sequences)


@contextmanager
def _pair(load: Load, size: Size, peer: str, versions: dict[str, str]) -> Generator[_Pair, None, None]:
    with start_truekv(load) as ours:
        theirs, name = START[peer](load)
        with theirs:
            versions |= {"truekv": ours.version, peer: theirs.version}
            yield _Pair(ours, theirs, size, load.model, load.format, name)


@dataclass(frozen=True, slots=True)
class _Pair:
    """Both engines, loaded with one model and formats of as many bits."""

    ours: Worker
    theirs: Worker
    size: Size
    model: str
    kv: str
    peer_format: str

    def alone(self) -> Iterator[Row]:
        """Measure one sequence: decode at each depth, prefill, and memory at the deepest."""
        self.check()
        for depth in self.size.depths:
            yield self.decode(depth, 1)
        yield self._row("memory", self.size.depths[-1], 1, 0, self.ours.peak(), self.theirs.peak())
        for tokens in self.size.prompts:
            yield self._prefill("prefill", 0, tokens)
        if self.size.chunk:
            yield self._prefill("append", self.size.middle, self.size.chunk)

    def check(self) -> None:
        """Refuse to compare engines that do not compute the same model: a prefix must leave nearly the same logits."""
        for engine in (self.ours, self.theirs):
            engine.fill(0)
            engine.append(SAME_TOKENS)
        alike = correlation(self.ours.logits(), self.theirs.logits())
        if alike < SAME[self.kv]:
            raise Refused(
                f"after {SAME_TOKENS} tokens of {self.model} the logits over {self.kv} and {self.peer_format} rows "
                f"correlate by {alike:.3f}, less than {SAME[self.kv]}: the engines do not compute the same model"
            )

    def decode(self, depth: int, sequences: int) -> Row:
        """Decode by turns, after a first token, which also pays for what is set up once per cache."""
        for engine in (self.ours, self.theirs):
            engine.fill(depth, sequences)
            engine.decode(1)
        times = _by_turns(lambda engine: fmean(engine.decode(self.size.steps)), self, self.size.rounds)
        return self._row("decode", depth, sequences, 1, *(sequences / time for time in times))

    def _prefill(self, what: str, depth: int, tokens: int) -> Row:
        def run(engine: Worker) -> float:
            engine.fill(depth)
            return engine.append(tokens)

        return self._row(what, depth, 1, tokens, *(tokens / time for time in _by_turns(run, self, rounds=2)))

    def _row(self, what: str, depth: int, batch: int, tokens: int, ours: float, theirs: float) -> Row:
        return Row(what, self.model, depth, batch, tokens, self.kv, self.peer_format, ours, theirs)


def _by_turns(run: Callable[[Worker], float], pair: _Pair, rounds: int) -> tuple[float, float]:
    """Return the best time of each engine: other jobs on the machine only ever slow one down."""
    ours, theirs = zip(*((run(pair.ours), run(pair.theirs)) for _ in range(rounds)), strict=True)
    return min(ours), min(theirs)


def watched(rows: list[Row]) -> dict[str, object]:
    """Return the JSON object that is watched from outside: decode of one sequence."""
    return {
        "rows": [
            {
                "model": row.model,
                "depth": row.depth,
                "format": row.format,
                "truekv_tps": round(row.truekv, 3),
                "peer_tps": round(row.peer, 3),
                "peer_format": row.peer_format,
                "ratio": round(row.ratio, 3),
            }
            for row in rows
            if row.what == "decode" and row.batch == 1
        ]
    }


def line(row: Row) -> str:
    """One row as a line of the terminal's table."""
    numbers = f"{row.truekv:9.2f} {row.peer:9.2f} tokens/s"
    if row.what == "memory":
        numbers = f"{row.truekv / 2**20:9.0f} {row.peer / 2**20:9.0f} MiB     "
    formats = f"{row.format}|{row.peer_format}"
    what = f"{row.what} {row.tokens}" if row.tokens > 1 else row.what
    return f"{row.model:7s} {formats:12s} {what:12s} depth {row.depth:6d} batch {row.batch} {numbers} {row.ratio:6.2f}x"


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or the JSON object, and keep everything for bench.report."""
    parser = argparse.ArgumentParser(prog="python -m bench.decode", description=__doc__)
    parser.add_argument("--peer", choices=("llama.cpp", "transformers"), default="llama.cpp")
    parser.add_argument("--quick", action="store_true", help="fewer depths and formats, decode alone: under 5 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--models", nargs="+", choices=tuple(CONFIGS), metavar="MODEL")
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), metavar="FORMAT")
    parser.add_argument("--depths", nargs="+", type=int, metavar="TOKENS")
    parser.add_argument("--threads", type=positive, default=2)
    asked = parser.parse_args(arguments)
    # Before a library with OpenMP is loaded, here and in the engines: spinning threads slow the other engine down.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    versions: dict[str, str] = {}
    rows: list[Row] = []
    try:
        with Bar("measuring"):
            for row in compare(_size(asked), asked.peer, asked.threads, versions):
                rows.append(row)
                if not asked.json:
                    print(line(row), flush=True)
    except (Refused, EngineFailed) as error:
        print(error, file=sys.stderr)
        return 2
    command = " ".join(["python -m bench.decode", *(arguments if arguments is not None else sys.argv[1:])])
    saved = {"machine": describe(asked.threads), "versions": versions, "command": command}
    FOLDER.mkdir(parents=True, exist_ok=True)
    path = FOLDER / f"decode-{asked.peer}.json"
    path.write_text(json.dumps({**saved, "rows": [asdict(row) for row in rows]}, indent=1))
    if asked.json:
        print(json.dumps(watched(rows)))
    return 0


def _size(asked: argparse.Namespace) -> Size:
    size = QUICK if asked.quick else Size()
    if asked.peer == "transformers":
        size = Size(depths=(8192,), formats=("bf16", "int8"), models=("hybrid",), prompts=(), middle=8192, chunk=0)
    return replace(
        size,
        models=tuple(asked.models or size.models),
        formats=tuple(asked.formats or size.formats),
        depths=tuple(asked.depths or size.depths),
    )


if __name__ == "__main__":
    sys.exit(main())
