"""Any mixture of arrivals, losses and aborts on any path, drawn from a seed: the same as from nothing in one chunk."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Final

import pytest
from exact.paths import DRAFTS, DRAWN, GREEDY, PUNISHED, Scripted, Watch, drawn
from exact.test_product import FORMATS, HEADLESS

from truekv import Refused
from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from exact.stage import Stage

    from truekv.engine.request import Request

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
FEATURES: Final = ("chunked", "prefix", "captured")
STEPS: Final = 60


def wander(stage: Stage, seed: int) -> None:
    """Some sixty steps of one engine with whatever the seed says."""
    source = random.Random(seed)
    model = source.choice(("dense", "gdn", "gdn", "mamba2", "mla"))
    guesses = source.choice(("", "drafted", "ngram", *(() if model in HEADLESS else ("mtp", "mtp"))))
    path = frozenset({"batched", guesses, *(item for item in FEATURES if source.random() < 0.6)}) - {""}
    cache_format = source.choice(FORMATS)
    engine = stage.llm(model, path, cache_format, pages=source.choice((4, 5, 6, 8, 12, 24)) + 1)._engine
    oracle = stage.oracle(model, cache_format)
    watch = Watch(engine, oracle)
    if guesses == "drafted":
        engine.drafting = Scripted(oracle, lambda request: hash((seed, len(request.tokens))) % (DRAFTS + 1))
    texts: list[list[int]] = [drawn(90, number) for number in range(3)]
    open_requests: list[Request] = []
    for step in range(STEPS):
        if len(open_requests) < 5 and source.random() < 0.3:
            open_requests += arrive(engine, source, texts)
        if open_requests and source.random() < 0.05:
            engine.abort(open_requests.pop(source.randrange(len(open_requests))))
        if source.random() < 0.1:
            watch.counts["robbed"] = 0
            watch.rob(began=False)
        follow(watch, open_requests, texts)
        assert step < STEPS
    while open_requests:
        follow(watch, open_requests, texts)
        assert watch.counts["steps"] < 1000, "the engine runs on and on"
    watch.rest()


def arrive(engine: object, source: random.Random, texts: list[list[int]]) -> list[Request]:
    """A prompt that begins like a text of before, or goes on from one."""
    text = source.choice(texts)
    size = source.choice((1, 5, 31, 32, 33, 40, 63, 64, 65, 80))
    prompt = [*text[:size], *drawn(source.choice((1, 2, 7)), source.randrange(9))][:110]
    params = dataclasses.replace(source.choice((GREEDY, DRAWN, PUNISHED)), max_tokens=source.choice((1, 2, 5, 9)))
    try:
        request = engine.add(prompt, params, priority=source.choice((0, 0, 1)), salt=source.choice(("", "", "s")))
    except Refused:
        return []
    return [request]


def follow(watch: Watch, open_requests: list[Request], texts: list[list[int]]) -> None:
    """One step; whoever has ended said what the oracle says."""
    watch.step()
    for request in [item for item in open_requests if not item.remaining]:
        open_requests.remove(request)
        watch.settle([request], [(list(request.prompt), request.params)], idle=False)
        texts[request.identity % len(texts)] = list(request.tokens)


@pytest.mark.parametrize("seed", range(4))
def test_an_engine_that_wanders_changes_no_bit(stage: Stage, seed: int) -> None:
    wander(stage, seed)


@pytest.mark.campaign
@pytest.mark.parametrize("seed", range(4, 404))
def test_an_engine_that_wanders_long_changes_no_bit(stage: Stage, seed: int) -> None:
    wander(stage, seed)
