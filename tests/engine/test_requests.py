"""What a request may ask for besides tokens, and what it may not."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from truekv import LLM, Refused, SamplingParams
from truekv.core.options import EngineOptions, Speculation
from truekv.engine.events import Ended, Failed, Sampled
from truekv.serve.assemble import design

if TYPE_CHECKING:
    from pathlib import Path

LONG = [(7 * place) % 300 for place in range(100)]
FREE = SamplingParams(max_tokens=8, ignore_eos=True, logprobs=5)


def options(**changes: Any) -> dict[str, Any]:
    return {"max_model_len": 160, "debug_poison": True, **changes}


def numbers(result: Any) -> list[float]:
    return [item.logprob for place in result.logprobs for item in place.top]


@pytest.mark.parametrize("model", ["dense", "hybrid"])
def test_prompt_logprobs_are_those_of_the_plain_pass(model: str, request: pytest.FixtureRequest) -> None:
    llm = LLM(str(request.getfixturevalue(model)), **options(max_num_batched_tokens=33))
    expected = torch.log_softmax(llm.logits(LONG), -1)[:-1]
    asked = SamplingParams(max_tokens=2, ignore_eos=True, prompt_logprobs=2)
    # The second time the prompt is in the prefix cache, and is computed all the same.
    for _ in range(2):
        result = llm.generate([LONG], asked)[0]
        assert result.usage.cached_tokens == 0
        assert result.prompt_logprobs is not None
        assert [place.chosen.token for place in result.prompt_logprobs] == LONG[1:]
        for place, row in zip(result.prompt_logprobs, expected, strict=True):
            assert place.chosen.logprob == pytest.approx(float(row[place.chosen.token]), abs=1e-5)
            assert [item.token for item in place.top] == row.topk(2).indices.tolist()
    assert llm.generate([LONG], FREE)[0].usage.cached_tokens > 0
    assert llm.generate([LONG], FREE)[0].prompt_logprobs is None


@pytest.mark.parametrize("model", ["dense", "hybrid"])
def test_the_next_turn_starts_where_the_last_one_ended(model: str, request: pytest.FixtureRequest) -> None:
    directory = str(request.getfixturevalue(model))
    llm = LLM(directory, **options(kv_cache_dtype="int8"))
    first = llm.generate([LONG[:50]], SamplingParams(max_tokens=40, ignore_eos=True))[0]
    talk = [*LONG[:50], *first.tokens, *LONG[50:60]]
    second = llm.generate([talk], FREE)[0]
    # Memory holds all of the first turn but its last token: complete pages of it on a hybrid, lines on others.
    assert second.usage.cached_tokens == (64 if model == "hybrid" else 89)
    plain = LLM(directory, **options(kv_cache_dtype="int8", enable_prefix_caching=False)).generate([talk], FREE)[0]
    assert plain.usage.cached_tokens == 0
    assert (second.tokens, numbers(second)) == (plain.tokens, numbers(plain))


def test_salts_do_not_share(dense: Path) -> None:
    llm = LLM(str(dense), **options())
    first = llm.generate([LONG], FREE, cache_salt="a")[0]
    assert llm.generate([LONG], FREE, cache_salt="b")[0].usage.cached_tokens == 0
    again = llm.generate([LONG], FREE, cache_salt="a")[0]
    assert again.usage.cached_tokens == len(LONG) - 1
    assert numbers(again) == numbers(first)


def test_of_two_the_one_of_lower_priority_number_goes_first(dense: Path) -> None:
    llm = LLM(str(dense), **options(max_num_seqs=1))
    engine = llm._engine
    later, sooner = engine.add(LONG[:20], FREE, 1), engine.add(LONG[20:40], FREE, 0)
    order = [event.request for event in engine.run([later, sooner]) if isinstance(event, Ended)]
    assert order == [sooner.identity, later.identity]
    with pytest.raises(Refused, match="there are 2 prompts and 1 priorities"):
        llm.generate([LONG, LONG], FREE, priority=[0])


@pytest.mark.parametrize("method", ["ngram", "mtp"])
def test_preempted_requests_say_what_they_would_have_said(method: str) -> None:
    plain = LLM("tiny-hybrid", kv_cache_dtype="int8", max_model_len=512, enable_prefix_caching=False)
    questions = [f"What is {a} * {a + 1} + 3 * {10 - a}?" for a in range(2, 8)]
    prompts = [plain.conversation([{"role": "user", "content": text}]) for text in questions]
    params = [
        SamplingParams(max_tokens=60, ignore_eos=True, temperature=0.8, seed=seed, logprobs=3) for seed in range(6)
    ]
    expected = plain.generate(prompts, params)
    asked = options(
        kv_cache_dtype="int8",
        max_num_seqs=6,
        speculative_config=Speculation(method=method, num_speculative_tokens=3),
    )
    sizes = design("tiny-hybrid", EngineOptions(**asked)).plan
    # Six answers grow to three or four pages each, and twelve pages are there.
    memory = 12 * sizes.page_bytes + 6 * (sizes.state_bytes_per_sequence + sizes.checkpoint_bytes)
    tight = LLM("tiny-hybrid", **asked, memory=memory)
    assert tight.kv_plan["pages"] == 12
    found = tight.generate(prompts, params)
    stats = tight.stats
    assert stats["preemptions"] > 0
    assert sum(stats["accepted"]) > 0
    assert sum(stats["drafted"]) > sum(stats["accepted"])
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.tokens == theirs.tokens
        assert numbers(ours) == numbers(theirs)
    tight._engine.runner.arena.check()


def test_stats_count_what_was_done(hybrid: Path) -> None:
    llm = LLM(str(hybrid), **options(speculative_config='{"method": "ngram", "num_speculative_tokens": 2}'))
    llm.generate([LONG, LONG[:40]], FREE)
    first = llm.stats
    assert first["generated_tokens"] == 16
    assert first["computed_tokens"] == 140 + 2 * 7 - 32 * first["prefix"]["hits"]
    llm.generate([LONG], FREE)
    second = llm.stats
    assert second["prefix"]["tokens_hit"] == 96
    assert second["computed_tokens"] == first["computed_tokens"] + 4 + 7
    assert (second["running"], second["waiting"], second["held_pages"]) == (0, 0, 0)
    assert second["sentinel"]["findings_total"]["finite"] == 0


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"memory": 1000}, "1000 bytes is left for rows and states"),
        ({"speculative_config": {"method": "mtp", "num_speculative_tokens": 1}}, "multi-token-prediction head"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 0}}, "_max is 0"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 65}}, "must be an integer from 1 to 64"),
        ({"speculative_config": {"method": "ngram", "num_speculative_tokens": 0}}, "must be an integer from 1 to 64"),
        (
            {"speculative_config": {"method": "eagle", "num_speculative_tokens": 1}},
            "unknown speculation method 'eagle'",
        ),
        ({"speculative_config": {"method": "ngram"}}, "names no num_speculative_tokens"),
        ({"speculative_config": {"methud": "ngram"}}, "did you mean 'method'"),
        ({"speculative_config": "{"}, "speculative_config is not valid JSON"),
        ({"speculative_config": [1]}, "but must be an object"),
        (
            {"max_model_len": 20, "speculative_config": {"method": "ngram", "num_speculative_tokens": 20}},
            "holds 20 tok",
        ),
        ({"prefix_checkpoint_interval": 0}, "prefix_checkpoint_interval is 0"),
        ({"capture": "maybe"}, "capture is 'maybe', but must be auto, on or off"),
    ],
)
def test_engines_that_could_not_run_are_refused_at_start(dense: Path, changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        LLM(str(dense), **options(**changes))
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_a_request_that_is_refused_or_fails_changes_nothing_for_the_others(dense: Path) -> None:
    llm = LLM(str(dense), **options())
    engine = llm._engine
    expected = llm.generate([LONG[:30], LONG[30:70]], FREE)
    requests = [engine.add(LONG[:30], FREE)]
    engine.step()
    for wrong in (
        lambda: SamplingParams(seed=2**70),
        lambda: SamplingParams(stop=("",)),
        lambda: SamplingParams(stop=("x" * 1001,)),
        lambda: engine.add(LONG * 2, FREE),
        lambda: engine.add(LONG, SamplingParams(logit_bias={320: 1.0})),
    ):
        with pytest.raises(Refused):
            wrong()
    requests.append(engine.add(LONG[30:70], FREE))
    events = [event for _ in range(1) for event in engine.run(requests)]
    assert not [event for event in events if isinstance(event, Failed)]
    for item, result in zip(requests, expected, strict=True):
        tops = [event.logprob.top for event in events if isinstance(event, Sampled) and event.request == item.identity]
        assert item.generated == result.tokens
        assert [value for top in tops for _, value in top] == numbers(result)[-5 * len(tops) :]


def test_options_understand_a_speculation_given_ready(dense: Path) -> None:
    ready = EngineOptions(speculative_config=Speculation(num_speculative_tokens=2), max_model_len=64)
    assert LLM.open(str(dense), ready).options.drafts == 2
