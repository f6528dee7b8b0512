"""The embedded models do what they were trained for: greedy answers to held-out prompts, through our own cache."""

from __future__ import annotations

import pytest

from truekv import LLM, SamplingParams
from truekv.tiny import tasks

EXAMPLES = 100
BAR = 0.95


@pytest.fixture(scope="module", params=["hybrid", "mla", "dense"])
def model(request: pytest.FixtureRequest) -> tuple[str, LLM]:
    return request.param, LLM(f"tiny-{request.param}", dtype="float32", kv_cache_dtype="int8", max_num_seqs=8)


@pytest.mark.parametrize("task", tasks.TASKS)
def test_nearly_all_answers_are_right(model: tuple[str, LLM], task: str) -> None:
    _, llm = model
    examples = tasks.examples(task, "heldout", 9, EXAMPLES)
    prompts = [llm.conversation(example.messages, example.tools) for example in examples]
    results = llm.generate(prompts, SamplingParams(max_tokens=64))
    wrong = [
        (example.messages[-1]["content"], result.text)
        for example, result in zip(examples, results, strict=True)
        if not tasks.correct(example, result.text.strip())
    ]
    assert 1 - len(wrong) / EXAMPLES >= BAR, wrong
