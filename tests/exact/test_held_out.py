"""The embedded models answer held-out prompts with everything on as with everything off."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import pytest

from truekv import LLM, SamplingParams
from truekv.kernels.native.library import library
from truekv.tiny import tasks

if TYPE_CHECKING:
    from truekv.serve.llm import Result
    from truekv.tiny.tasks import Example

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
METHODS: Final = {"hybrid": "mtp", "mla": "ngram", "dense": "ngram"}
OFF: Final[dict[str, Any]] = {"max_num_seqs": 1, "enable_prefix_caching": False, "capture": "off"}
ON: Final[dict[str, Any]] = {
    "kv_cache_dtype": "int8",
    "max_num_seqs": 16,
    "max_num_batched_tokens": 128,
    "enable_prefix_caching": True,
    "prefix_checkpoint_interval": 256,
    "capture": "on",
}
PARAMS: Final = SamplingParams(max_tokens=64, logprobs=1)
Record = Callable[[str, object], None]
CALL: Final = re.compile(
    r"<tool_call>\n<function=get_weather>\n<parameter=city>\n.+\n</parameter>\n"
    r"<parameter=unit>\n(celsius|fahrenheit)\n</parameter>\n</function>\n</tool_call>"
)


def examples(count: int, needle: int | None) -> list[Example]:
    """`count` examples of each task; needles in `needle` tokens of filler, None for up to two thousand."""
    found: list[Example] = []
    for task in tasks.TASKS:
        if task == "secret" and needle is not None:
            source = random.Random("secret|short")
            found += [tasks.secret(source, "heldout", needle) for _ in range(count)]
        else:
            found += tasks.examples(task, "heldout", 21, count)
    return found


def numbers(result: Result) -> tuple[list[int], list[float]]:
    """What two runs of one format must agree on to the last bit."""
    assert result.logprobs is not None
    return result.tokens, [place.chosen.logprob for place in result.logprobs]


def same_with_everything_on(name: str, count: int, needle: int | None, record: Record, *, every: int = 1) -> None:
    """`every`: which of the prompts are compared bit by bit with a run of one alone."""
    on = LLM(
        f"tiny-{name}",
        **ON,
        speculative_config={"method": METHODS[name], "num_speculative_tokens": 3},
    )
    drawn = examples(count, needle)
    prompts = [on.conversation(example.messages, example.tools) for example in drawn]
    first = on.generate(prompts, PARAMS)
    again = on.generate(prompts[::every], PARAMS)
    stats = on.stats
    assert sum(stats["accepted"]) > 0
    assert sum(stats["drafted"]) > sum(stats["accepted"])
    assert stats["prefix"]["hits"] >= len(again) // 2  # some are evicted by then
    assert on._engine.runner.forward.replays > 5
    off = LLM(f"tiny-{name}", **OFF, kv_cache_dtype="int8").generate(prompts[::every], PARAMS)
    for results in (first[::every], again):
        assert [numbers(result) for result in results] == [numbers(result) for result in off]
    plain = LLM(f"tiny-{name}", **OFF | {"max_num_seqs": min(8, every)}).generate(prompts, PARAMS)
    answers = [[result.text or "" for result in results] for results in (first, plain)]
    record("summary", f"tiny-{name}, everything on against everything off: {summary(drawn, *answers)}")
    judge(drawn, *answers)


def calls(drawn: list[Example], answers: list[str]) -> list[bool]:
    """Whether each call of a tool parses."""
    asked = [text for example, text in zip(drawn, answers, strict=True) if example.task == "tool_call"]
    return [CALL.fullmatch(text.strip()) is not None for text in asked]


def summary(drawn: list[Example], ours: list[str], plain: list[str]) -> str:
    """Say in numbers what `judge` asks for."""
    differ = sum(one != other for one, other in zip(ours, plain, strict=True))
    parse = calls(drawn, ours)
    found = [tasks.correct(item, text) for item, text in zip(drawn, ours, strict=True) if item.task == "secret"]
    return (
        f"{differ} of {len(drawn)} answers differ, {sum(parse)} of {len(parse)} tool calls parse, "
        f"{sum(found)} of {len(found)} needles are found"
    )


def judge(drawn: list[Example], ours: list[str], plain: list[str]) -> None:
    """Int8 answers like the unquantized model, calls of tools parse, and needles are found."""
    differ = [pair for pair in zip(ours, plain, strict=True) if pair[0] != pair[1]]
    assert not differ
    assert all(calls(drawn, ours)), ours
    for task in tasks.TASKS:
        right = [tasks.correct(item, text) for item, text in zip(drawn, ours, strict=True) if item.task == task]
        before = [tasks.correct(item, text) for item, text in zip(drawn, plain, strict=True) if item.task == task]
        assert sum(right) >= sum(before) - len(right) // 100, f"{task}: {sum(right)} right instead of {sum(before)}"
        if task == "secret":
            assert sum(right) >= 0.95 * len(right), "needles are not found"


@pytest.mark.parametrize("name", METHODS)
def test_everything_on_answers_like_everything_off(name: str, record_property: Record) -> None:
    same_with_everything_on(name, 8, 60, record_property, every=8)


@pytest.mark.campaign
@pytest.mark.parametrize("name", METHODS)
def test_everything_on_answers_500_prompts_like_everything_off(name: str, record_property: Record) -> None:
    same_with_everything_on(name, 100, None, record_property)
