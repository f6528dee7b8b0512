"""What a request is told, and when: stop strings, log-probabilities, seeds, priorities."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from exact.paths import GREEDY, Watch, drawn

from truekv import SamplingParams
from truekv.engine.events import Stored
from truekv.engine.tokens import StopStrings
from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from exact.stage import Stage

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")


def test_a_stop_string_is_found_wherever_tokens_divide_it() -> None:
    text, stop = "so it goes, and so it ends", "so it e"
    for size in range(1, len(text)):
        stops = StopStrings([stop])
        shown, met = "", False
        for start in range(0, len(text), size):
            part, met = stops.push(text[start : start + size])
            shown += part
            if met:
                break
        assert met
        assert shown == text[: text.index(stop)]


def test_logprobs_are_the_models_whatever_the_temperature(stage: Stage) -> None:
    llm, oracle = stage.llm("dense", frozenset({"drafted"})), stage.oracle("dense")
    params = SamplingParams(max_tokens=6, temperature=2.0, seed=3, logprobs=2, ignore_eos=True)
    prompt = drawn(9, 4)
    result = llm.generate(prompt, params)[0]
    assert result.logprobs is not None
    assert result.tokens == oracle.answer(prompt, params)
    for place, position in enumerate(result.logprobs):
        expected = torch.log_softmax(oracle.look(prompt + result.tokens[:place]).logits[-1], 0)
        assert position.chosen.logprob == pytest.approx(float(expected[result.tokens[place]]), abs=1e-6)
        assert position.top[0].logprob == pytest.approx(float(expected.max()), abs=1e-6)


def test_prompt_logprobs_are_complete_whatever_is_cached_or_lost(stage: Stage) -> None:
    oracle, engine = stage.oracle("dense"), stage.llm("dense", frozenset({"prefix", "batched", "chunked"}))._engine
    watch = Watch(engine, oracle)
    prompt = drawn(70, 4)
    params = dataclasses.replace(GREEDY, prompt_logprobs=1, max_tokens=4)
    expected = torch.log_softmax(oracle.look(prompt).logits, -1)
    for lose in (False, True):
        request = engine.add(prompt, params)
        told: list[float] = []
        steps = watch.counts["steps"]
        while engine._answers:
            if lose and watch.counts["steps"] == steps + 1 and not watch.counts["robbed"]:
                watch.rob(began=False)
            for event in engine.step():
                if isinstance(event, Stored):
                    told += [item.logprob for item in event.logprobs]
        assert request.generated == oracle.answer(prompt, params)
        assert told == pytest.approx([float(expected[place - 1, prompt[place]]) for place in range(1, 70)], abs=1e-6)
    assert watch.counts["robbed"] == 1


def test_a_lower_priority_number_goes_first(stage: Stage) -> None:
    engine = stage.llm("dense", frozenset())._engine
    short = dataclasses.replace(GREEDY, max_tokens=2)
    requests = [engine.add(drawn(5, place), short, priority=priority) for place, priority in enumerate((3, 1, 2))]
    ended: list[int] = []
    while engine._answers:
        engine.step()
        ended += [item.identity for item in requests if not item.remaining and item.identity not in ended]
    assert ended == [1, 2, 0]


def test_nobody_waits_for_ever(stage: Stage) -> None:
    engine = stage.llm("dense", frozenset())._engine
    short = dataclasses.replace(GREEDY, max_tokens=1)
    late = engine.add([1], short, priority=1)
    steps = 0
    while late.remaining:
        while len(engine.schedule.waiting) + len(engine.schedule.running) < 3:
            engine.add([2], short)
        engine.step()
        steps += 1
        assert steps < 600, "a request of a lower priority starves"
    assert steps > 100
    for request in [*engine.schedule.waiting, *engine.schedule.running]:
        engine.abort(request)


def test_the_same_seed_gives_the_same_tokens_in_any_company(stage: Stage) -> None:
    llm, oracle = stage.llm("dense", frozenset({"batched"})), stage.oracle("dense")
    params = SamplingParams(max_tokens=6, temperature=1.5, seed=3, ignore_eos=True)
    others = [dataclasses.replace(params, seed=seed) for seed in (5, 6)]
    prompt = drawn(9, 4)
    answers = llm.generate([drawn(4, 1), prompt, drawn(5, 2), prompt], [others[0], params, others[1], params])
    assert answers[1].tokens == answers[3].tokens == oracle.answer(prompt, params)
    assert answers[0].tokens == oracle.answer(drawn(4, 1), others[0])
