"""The machine that a table was measured on: what it is, and how fast it reads memory."""

from __future__ import annotations

import argparse
import ctypes
import os
import platform
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.untouched import untouched

if TYPE_CHECKING:
    from truekv.kernels.native.library import Library

FOLDER = Path(__file__).parent.parent / "build" / "bench"
"""Where checkpoints, peers and the last measurements are kept; git ignores it."""


class _RawRead(ctypes.Structure):
    """native/bench.cpp: RawRead."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("bytes", ctypes.c_int64),
        ("threads", ctypes.c_int32),
        ("result", ctypes.POINTER(ctypes.c_uint64)),
    )


class RawRead:
    """Reads a buffer that no cache holds, and keeps the best rate of the run: other jobs only ever slow it down."""

    def __init__(self, size: int = 1 << 29) -> None:
        """Allocate and write `size` bytes."""
        self._library = native()
        # Lies in memory as caches do, on large pages where the system has them: 10% faster on two cores, 30% on one.
        self._buffer = untouched((size // 8,), torch.int64, "cpu").fill_(1)
        self.best: dict[int, float] = {}
        """Gigabytes (10^9) per second, by number of threads."""

    def measure(self, threads: int) -> float:
        """Read the buffer once with so many threads and return the rate, GB/s."""
        found = ctypes.c_uint64()
        arguments = _RawRead(self._buffer.data_ptr(), self._buffer.nbytes, threads, ctypes.pointer(found))
        start = time.perf_counter()
        self._library.call("raw_read", arguments)
        rate = self._buffer.nbytes / (time.perf_counter() - start) / 1e9
        expected = len(self._buffer) % 2
        if found.value != expected:
            raise AssertionError(f"raw_read returned {found.value}, not {expected}")
        self.best[threads] = max(rate, self.best.get(threads, 0.0))
        return rate


def positive(text: str) -> int:
    """Return a number given on the command line, of threads or steps; argparse says what is wrong with another."""
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is no number of 1 or more")
    return int(text)


def describe(threads: int) -> dict[str, str]:
    """Return what a reader needs to judge the numbers: processor, memory, versions and the day."""
    library = native()
    return {
        "processor": _first("/proc/cpuinfo", "model name") or platform.processor() or platform.machine(),
        "cores": f"{os.cpu_count()}, of which {threads} were used",
        "memory": f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB",
        "instruction set": library.isa,
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])}",
        "python, torch": f"{platform.python_version()}, {torch.__version__}",
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "not set"),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def _first(path: str, key: str) -> str | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.startswith(key)), None)


def native() -> Library:
    """Return the native library; Refused where there is none, because the reference is not worth a table."""
    from truekv.kernels.native.library import library

    found = library()
    if found is None:
        raise Refused("the benchmarks need the native library; install truekv with a C++ compiler: pip install -e .")
    return found
