import random
from pathlib import Path

import pytest

from truekv.tiny import tasks

TINY = Path(tasks.__file__).parent
MODELS = ("hybrid", "mla", "dense")


def key(example: tasks.Example) -> str:
    return f"{example.messages[-1]['content']}|{example.answer}"


@pytest.mark.parametrize("task", tasks.TASKS)
def test_generators_repeat_for_a_seed_and_differ_between_seeds(task: str) -> None:
    first = tasks.examples(task, "heldout", seed=3, count=8)
    assert first == tasks.examples(task, "heldout", seed=3, count=8)
    assert first != tasks.examples(task, "heldout", seed=4, count=8)


@pytest.mark.parametrize("task", ["arithmetic", "tool_call"])
def test_splits_share_no_question(task: str) -> None:
    train = {key(example) for example in tasks.examples(task, "train", 0, 2000)}
    heldout = {key(example) for example in tasks.examples(task, "heldout", 0, 500)}
    assert not train & heldout


def test_splits_share_no_secret() -> None:
    rng = random.Random(0)
    train = {tasks.random_secret(rng, "train").value for _ in range(5000)}
    heldout = {tasks.random_secret(rng, "heldout").value for _ in range(2000)}
    assert not train & heldout


def test_splits_share_no_fact() -> None:
    rng = random.Random(0)
    train = {fact for _ in range(1000) for fact in tasks.random_facts(rng, "train", 4)}
    heldout = {fact for _ in range(300) for fact in tasks.random_facts(rng, "heldout", 4)}
    assert not train & heldout


def test_answers_of_arithmetic_are_right() -> None:
    for example in tasks.examples("arithmetic", "heldout", 0, 200):
        question, steps, result = example.answer.split(" = ")
        assert eval(question) == eval(steps) == int(result)  # noqa: S307


@pytest.mark.parametrize("task", tasks.TASKS)
def test_graders_accept_the_answer_and_refuse_another(task: str) -> None:
    examples = tasks.examples(task, "heldout", 0, 20)
    assert all(tasks.correct(example, example.answer) for example in examples)
    assert not any(tasks.correct(example, text) for example in examples for text in ("", "I do not know."))
    first = examples[0]
    assert not any(tasks.correct(first, other.answer) for other in examples if other.answer != first.answer)


def test_graders_read_the_value_not_the_phrasing() -> None:
    example = tasks.Example([], "Your colour is blue.", "fact")
    assert tasks.correct(example, " The colour is blue ")
    assert not tasks.correct(example, "Your colour is red.")


def test_conversations_about_facts_have_at_most_six_turns() -> None:
    lengths = {len(example.messages) for example in tasks.examples("fact", "heldout", 0, 200)}
    assert max(lengths) <= 12  # a system message and six turns, less the last answer


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_secret_lies_at_its_depth(depth: float) -> None:
    example = tasks.secret(random.Random(0), "heldout", 1000, depth)
    text = example.messages[1]["content"]
    assert text.index("The secret is") == pytest.approx(depth * len(text), abs=60)


def test_scenarios_ask_several_questions() -> None:
    drawn = tasks.scenarios(0, 20)
    assert drawn == tasks.scenarios(0, 20)
    assert all(len(scenario.questions) >= 5 for scenario in drawn)
    assert all(tasks.correct(turn, turn.answer) for scenario in drawn for turn in scenario.questions)


def test_calibration_prompts_hold_nothing_that_is_held_out() -> None:
    prompts = tasks.calibration_prompts(0, 50)
    assert len(prompts) == 50
    heldout = {example.answer for example in tasks.examples("arithmetic", "heldout", 0, 500)}
    assert not heldout & {prompt[-1]["content"] for prompt in prompts}


@pytest.fixture(scope="module", params=MODELS)
def directory(request: pytest.FixtureRequest) -> Path:
    return TINY / request.param


def test_haystacks_are_as_long_as_asked(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    example = tasks.secret(random.Random(0), "heldout", tasks.MAX_FILLER_TOKENS)
    length = len(tokenizer.encode(example.messages[1]["content"]))
    assert tasks.MAX_FILLER_TOKENS - 10 < length < tasks.MAX_FILLER_TOKENS + 15


def test_any_text_survives_the_tokenizer(directory: Path) -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    text = "Grüße, 世界! <tool_call>\n{x}\t123 \U0001f600"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert len(tokenizer) <= 1024


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("task", ["arithmetic", "fact", "secret", "tool_call"])
def test_models_answer_heldout_prompts(directory: Path, task: str) -> None:
    transformers = pytest.importorskip("transformers")
    import torch

    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    examples = tasks.examples(task, "heldout", 5, 4)
    right = 0
    for example in examples:
        prompt = tokenizer.apply_chat_template(
            example.messages, tools=example.tools, add_generation_prompt=True, return_tensors="pt"
        )
        with torch.no_grad():
            out = model.generate(**prompt, max_new_tokens=60, do_sample=False)
        text = tokenizer.decode(out[0, prompt["input_ids"].shape[1] :].tolist())
        right += tasks.correct(example, text.removesuffix(tokenizer.eos_token))
    assert right >= len(examples) - 1
