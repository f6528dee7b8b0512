"""Where the time of one decoded token goes: `python -m bench.step`.

Every native call of a step is timed from Python; what is left is the engine's own Python and torch's small
operations. Every line is the least of many steps, because other jobs only ever slow one down.

With --memory, what lies in memory after a few steps is listed. With --capture, captured steps and the same ones run
eagerly take turns instead. Their `host` is what is left when every native call returns at once. With --host, whole
steps of so many greedy requests are timed in that way, on the embedded model of that kind.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections import Counter
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING
from unittest import mock

from bench import capture, host
from bench.checkpoints import CONFIGS, checkpoint
from bench.engines.truekv import start
from bench.machine import native, positive
from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.resident import mapped

if TYPE_CHECKING:
    import ctypes
    from collections.abc import Callable, Generator


@dataclass(frozen=True, slots=True)
class Profile:
    """One step: milliseconds of each operation and of what is around them, and how often each is called."""

    operations: dict[str, float]
    outside: float
    calls: dict[str, int]

    @property
    def total(self) -> float:
        """Milliseconds of the step."""
        return self.outside + sum(self.operations.values())


def main(arguments: list[str] | None = None) -> int:
    """Measure, and print a table or one JSON object."""
    parser = argparse.ArgumentParser(prog="python -m bench.step", description=__doc__)
    parser.add_argument("--model", choices=tuple(CONFIGS), default="hybrid")
    parser.add_argument("--format", default="int8", metavar="FORMAT")
    parser.add_argument("--depth", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--threads", type=positive, default=2)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--sequences", type=positive, default=1, help="with --capture and --host: rows of a step")
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--memory", action="store_true", help="list what lies in memory instead")
    instead.add_argument("--capture", action="store_true", help="compare captured steps with eager ones")
    instead.add_argument("--host", action="store_true", help="time what the host does in steps of many requests")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    asked = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before a library with OpenMP is loaded
    try:
        return measure(asked)
    except Refused as error:
        parser.error(str(error))


def measure(asked: argparse.Namespace) -> int:
    """Print what is asked for."""
    if asked.capture:
        ways = capture.compare(
            str(checkpoint(asked.model)), asked.format, asked.depth, asked.sequences, asked.threads, asked.steps
        )
        print(json.dumps({name: asdict(way) for name, way in ways.items()}) if asked.json else capture.table(ways))
        return 0
    if asked.host:
        spent = host.times(
            f"tiny-{asked.model}", asked.format, asked.depth, asked.sequences, asked.threads, asked.steps
        )
        least, median = min(spent), statistics.median(spent)
        line = f"{asked.sequences} requests: {least:.3f} ms of host per step, median {median:.3f}"
        print(json.dumps({"least": least, "median": median}) if asked.json else line)
        return 0
    if asked.memory:
        found = memory(str(checkpoint(asked.model)), asked.format, asked.depth, asked.threads)
        table = [f"{name:30s} {size / 2**20:8.1f} MiB" for name, size in found.items()]
        print(json.dumps(found) if asked.json else "\n".join(table))
        return 0
    best = fastest(str(checkpoint(asked.model)), asked.format, asked.depth, asked.threads, asked.steps)
    if asked.json:
        print(json.dumps(asdict(best) | {"total": best.total}))
        return 0
    for name, spent in sorted(best.operations.items(), key=lambda item: -item[1]):
        print(f"{name:12s} {best.calls[name]:5d} calls {spent:8.3f} ms {spent / best.total:6.1%}")
    print(f"{'outside':12s} {'':11s} {best.outside:8.3f} ms {best.outside / best.total:6.1%}")
    print(f"{'step':12s} {sum(best.calls.values()):5d} calls {best.total:8.3f} ms")
    return 0


def fastest(model: str, kv: str, depth: int, threads: int, steps: int) -> Profile:
    """Return the least times of so many steps at a depth."""
    engine, _ = start(model, kv, depth + steps + 8, 1, threads, capture="off")
    engine.fill(depth, 1)
    engine.decode(4)
    seen = list(profiles(engine.decode, steps))
    operations = {op: min(one.operations[op] for one in seen) for op in seen[0].operations}
    return Profile(operations, min(one.outside for one in seen), seen[0].calls)


def memory(model: str, kv: str, depth: int, threads: int) -> dict[str, int]:
    """Return the resident bytes of each kind: what torch's import takes, then what is on top of it."""
    torch.get_num_threads()  # imports it
    imported = sum(item.anonymous for item in mapped())
    engine, _ = start(model, kv, depth + 16, 1, threads)
    engine.fill(depth, 1)
    engine.decode(4)
    found = {"torch, numpy and Python": imported, "weights, rows, states, a step": -imported}
    for item in mapped():
        found["weights, rows, states, a step"] += item.anonymous
        if item.resident > item.anonymous:
            name = item.file.rpartition("/")[2]
            found[name] = found.get(name, 0) + item.resident - item.anonymous
    largest = dict(sorted(found.items(), key=lambda pair: -pair[1])[:8])
    return {**largest, "other files": sum(found.values()) - sum(largest.values()), "all": sum(found.values())}


def profiles(decode: Callable[[int], list[float]], steps: int) -> Generator[Profile]:
    """Run steps one by one, every native call timed."""
    library = native()
    call = library.call
    spent: Counter[str] = Counter()
    calls: Counter[str] = Counter()

    def timed(op: str, arguments: ctypes.Structure) -> None:
        begin = time.perf_counter_ns()
        call(op, arguments)
        spent[op] += time.perf_counter_ns() - begin
        calls[op] += 1

    with mock.patch.object(library, "call", timed):
        for _ in range(steps):
            spent.clear()
            calls.clear()
            (total,) = decode(1)
            operations = {op: nanoseconds / 1e6 for op, nanoseconds in spent.items()}
            yield Profile(operations, total * 1e3 - sum(operations.values()), dict(calls))


if __name__ == "__main__":
    sys.exit(main())
