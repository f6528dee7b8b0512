"""What the guards cost: `python -m bench.sentinel`.

A decode step of the embedded models, launch by launch, alone and with the sentinel's calls around it. A look at
stored rows is timed in every other step, and counts once in EVERY. Medians, because other jobs only slow one down.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from typing import TYPE_CHECKING

from bench.machine import positive

if TYPE_CHECKING:
    from truekv import LLM

MODELS = (("tiny-hybrid", "int8"), ("tiny-dense", "kv4"), ("tiny-mla", "int8"))
PROMPT = 64


def main(arguments: list[str] | None = None) -> int:
    """Measure and print one line for each model and batch."""
    parser = argparse.ArgumentParser(prog="python -m bench.sentinel", description=__doc__)
    parser.add_argument("--steps", type=positive, default=100)
    parser.add_argument("--threads", type=positive, default=1)
    asked = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before a library with OpenMP is loaded
    import torch

    from truekv import LLM
    from truekv.trust.sentinel import EVERY

    torch.set_num_threads(asked.threads)
    for model, chosen in MODELS:
        llm = LLM(model, kv_cache_dtype=chosen, max_model_len=PROMPT + 4 * asked.steps, capture="off", sentinel=False)
        for batch in (1, 8):
            step, looked, hooks = cost(llm, batch, asked.steps)
            rare, always = (looked - step) / EVERY / step, hooks / step
            print(
                f"{model:12s} {chosen:5s} batch {batch}: step {step * 1e3:6.2f} ms, with a look {looked * 1e3:6.2f}, "
                f"calls {hooks * 1e6:5.1f} us: {rare:.2%} + {always:.2%} of the time"
            )
    return 0


def cost(llm: LLM, batch: int, steps: int) -> tuple[float, float, float]:
    """Return seconds of a step, of a step whose rows are looked at, and of the calls around a step without a look."""
    from truekv.core.batch import Chunk
    from truekv.trust.sentinel import Sentinel

    runner = llm._engine.runner  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    arena = runner.arena
    rare, always = (Sentinel(runner.model, arena, every) for every in (1 << 30, 1))
    for _ in arena.layers:
        rare.before_step([], 0)  # the first steps look at every layer
    held = [arena.open() for _ in range(batch)]
    prompts = [[10 + (row + place * place) % 400 for place in range(PROMPT)] for row in range(batch)]
    runner.step([Chunk(one, prompt) for one, prompt in zip(held, prompts, strict=True)], [1] * batch)
    alone: list[float] = []
    looked: list[float] = []
    hooks: list[float] = []

    def timed(into: list[float]) -> None:
        start = time.perf_counter()
        runner.step([Chunk(one, [tokens[-1]]) for one, tokens in zip(held, prompts, strict=True)], [1] * batch)
        into.append(time.perf_counter() - start)

    for count in range(steps):
        timed(alone)
        always.before_step(range(batch), batch)
        timed(looked)
        start = time.perf_counter()
        rare.before_step(range(batch), batch)
        for row, tokens in enumerate(prompts):
            tokens.append(10 + (row * count + count * count) % 400)
            rare.after_tokens(row, tokens, PROMPT)
        hooks.append(time.perf_counter() - start)
    for one in held:
        arena.close(one)
    return statistics.median(alone), statistics.median(looked), statistics.median(hooks)


if __name__ == "__main__":
    sys.exit(main())
