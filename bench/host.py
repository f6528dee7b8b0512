"""What the host does in a step of many greedy requests, from the schedule to the text: see bench/step.py."""

from __future__ import annotations

import ctypes
import itertools
import time
from typing import TYPE_CHECKING, Any, cast
from unittest import mock

from bench.machine import native
from bench.wire import some_token
from truekv.core.lazy import torch
from truekv.core.options import EngineOptions, SamplingParams
from truekv.core.recording import recording
from truekv.kernels.native.library import Calls
from truekv.serve.assemble import build, design

if TYPE_CHECKING:
    from truekv.kernels.native.arguments import Largest

WARM = 5


def times(model: str, kv: str, depth: int, sequences: int, threads: int, steps: int) -> list[float]:
    """Return the milliseconds of so many steps of a model in which no native call computes anything.

    Each gives every request some token. What looks at stored rows is turned off: there are none.
    """
    torch.set_num_threads(threads)
    limit = 2 * (WARM + steps)
    options = EngineOptions(
        kv_cache_dtype=kv,
        max_model_len=depth + limit,
        max_num_seqs=sequences,
        max_num_batched_tokens=max(2048, sequences),
        sentinel=False,
    )
    engine = build(design(model, options))
    asked = SamplingParams(temperature=0, max_tokens=limit, ignore_eos=True)
    requests = [
        engine.add([some_token(row + place) for place in range(depth)], asked, salt=str(row))
        for row in range(sequences)
    ]
    while not all(request.answered for request in requests):
        engine.step()
    places = itertools.count()
    rows = [(ctypes.c_int64 * sequences)(*(some_token(next(places)) for _ in requests)) for _ in range(64)]
    drawn = itertools.cycle(rows)

    def call(op: str, arguments: ctypes.Structure) -> None:
        """Make no call; where a token is asked for, give one."""
        if op == "largest":
            largest = cast("Largest", arguments)
            ctypes.memmove(largest.places, next(drawn), 8 * largest.rows)

    def at_once(*_: Any) -> None:  # noqa: ANN401
        """Make none."""

    spent: list[float] = []
    before = engine.stats.generated_tokens
    with mock.patch.object(native(), "call", call), mock.patch.object(Calls, "__call__", at_once), recording():
        for _ in range(WARM + steps):
            begin = time.perf_counter()
            engine.step()
            spent.append(1e3 * (time.perf_counter() - begin))
    assert engine.stats.generated_tokens - before == sequences * (WARM + steps)
    return spent[WARM:]
