"""The embedded models do what they were trained for: greedy answers to held-out prompts, through our own cache."""

from __future__ import annotations

import pytest

from truekv import LLM, SamplingParams
from truekv.tiny import tasks

EXAMPLES = 100


@pytest.fixture(scope="module", params=["hybrid", "mla", "dense"])
def llm(request: pytest.FixtureRequest) -> LLM:
    return LLM(f"tiny-{request.param}", dtype="float32", kv_cache_dtype="int8", max_num_seqs=8)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_at_least_95_of_100_answers_are_right(llm: LLM, task: str) -> None:
    examples = tasks.examples(task, "heldout", 9, EXAMPLES)
    prompts = [llm.conversation(example.messages, example.tools) for example in examples]
    results = llm.generate(prompts, SamplingParams(max_tokens=64))
    wrong = [
        (example.messages[-1]["content"], result.text)
        for example, result in zip(examples, results, strict=True)
        if not tasks.correct(example, result.text.strip())
    ]
    assert len(wrong) <= 0.05 * EXAMPLES, wrong
