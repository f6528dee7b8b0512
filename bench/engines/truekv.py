"""truekv as `LLM` runs it, token by token through its own runner."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, cast

from bench.fill import fill
from bench.wire import serve, some_token
from truekv.core.batch import Chunk
from truekv.core.errors import Corrupted
from truekv.core.lazy import torch
from truekv.core.options import EngineOptions
from truekv.serve.assemble import build, design

if TYPE_CHECKING:
    from truekv.core.batch import Sequence
    from truekv.engine.run import Runner


class TrueKV:
    """Implements bench.wire.Engine."""

    def __init__(self, runner: Runner, step_tokens: int) -> None:
        """Take a loaded model with its memory; a step of prefill takes `step_tokens`."""
        self._runner = runner
        self._step_tokens = step_tokens
        self._held: list[Sequence] = []
        self._logits_V = torch.empty(0)

    def fill(self, depth: int, sequences: int) -> None:
        """See bench.wire.Engine."""
        for sequence in self._held:
            self._runner.arena.close(sequence)
        self._held = fill(self._runner.arena, depth, sequences)

    def decode(self, steps: int) -> list[float]:
        """See bench.wire.Engine."""
        tokens = [some_token(index) for index in range(len(self._held))]
        times: list[float] = []
        for _ in range(steps):
            start = time.perf_counter()
            chunks = [Chunk(held, [token]) for held, token in zip(self._held, tokens, strict=True)]
            tokens = self._greedy(chunks)
            times.append(time.perf_counter() - start)
        return times

    def append(self, tokens: int) -> float:
        """See bench.wire.Engine."""
        start = time.perf_counter()
        for first in range(0, tokens, self._step_tokens):
            size = min(self._step_tokens, tokens - first)
            self._greedy([Chunk(self._held[0], [some_token(first + place) for place in range(size)])])
        return time.perf_counter() - start

    def logits(self) -> list[float]:
        """See bench.wire.Engine."""
        return cast("list[float]", self._logits_V.tolist())

    def _greedy(self, chunks: list[Chunk]) -> list[int]:
        results = self._runner.step(chunks, [1] * len(chunks))
        best: list[int] = []
        for logits_1V in results:
            if isinstance(logits_1V, Corrupted):
                raise logits_1V
            best.append(int(logits_1V.argmax()))
            self._logits_V = logits_1V[0]
        return best


def start(
    model: str,
    kv: str,
    context: int,
    sequences: int,
    threads: int,
    frames: str = "",
    capture: Literal["auto", "off"] = "auto",
) -> tuple[TrueKV, str]:
    """Load a checkpoint for so many sequences of `context` tokens; `frames`: a file, for formats that need it."""
    torch.set_num_threads(threads)
    options = EngineOptions(
        kv_cache_dtype=kv,
        kv_cache_frames=frames if frames and Path(frames).is_file() else None,
        max_model_len=context,
        max_num_seqs=sequences,
        capture=capture,
    )
    blueprint = design(model, options)
    engine = build(blueprint)
    backends = sorted(set(dict(blueprint.kernels.describe()).values()))
    return TrueKV(engine.runner, blueprint.step_tokens), f"kernels: {', '.join(backends)}"


if __name__ == "__main__":
    serve(start)
