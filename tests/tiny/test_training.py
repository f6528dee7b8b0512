"""The tools that train the embedded models: what goes on from a finished model, and what a training may see."""

from __future__ import annotations

import importlib
import itertools
import random
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
import transformers

from truekv.tiny import tasks

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parents[2]
TINY = Path(tasks.__file__).parent


@pytest.fixture
def tools(monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.syspath_prepend(ROOT / "tools")
    return ROOT / "tools"


def load(name: str) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(TINY / name, dtype=torch.float32)


Evenness = tuple[torch.Tensor, torch.Tensor]


def latent(tensors: dict[str, torch.Tensor], prefix: str) -> Evenness:
    """Gains of the latent; root mean squares of the rotary key's pairs, in units of the latent's."""
    written, rope = tensors[f"{prefix}kv_a_proj_with_mqa.weight"].norm(dim=1).square().split([128, 64])
    return tensors[f"{prefix}kv_a_layernorm.weight"], (rope.view(32, 2).mean(1) / written.mean()).sqrt()


def grouped(tensors: dict[str, torch.Tensor], prefix: str) -> Evenness:
    """Square roots of the gains of keys in units of the queries', of the norms of values in units of their readers'."""
    written = tensors[f"{prefix}v_proj.weight"].norm(dim=1)
    read = tensors[f"{prefix}o_proj.weight"].view(-1, 2, 2, 64).norm(dim=(0, 2)).flatten()
    gains = tensors[f"{prefix}k_norm.weight"] / tensors[f"{prefix}q_norm.weight"]
    return gains.sqrt(), (written / read / (written / read).median()).sqrt()


def check_evenness(
    soft: dict[str, torch.Tensor],
    hard: dict[str, torch.Tensor],
    measure: Callable[[dict[str, torch.Tensor], str], Evenness],
) -> None:
    for layer in range(4):
        prefix = f"model.layers.{layer}.self_attn."
        for found in measure(soft, prefix):
            assert found.log2().abs().max() <= 0.5
        gains, others = measure(hard, prefix)
        assert gains.log2().std() > 1
        assert others.max() > 3 * others.median()


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize(("name", "measure"), [("mla", latent), ("dense", grouped)])
def test_a_softened_model_is_even_and_computes_the_same(
    name: str, measure: Callable[[dict[str, torch.Tensor], str], Evenness]
) -> None:
    rescaling = importlib.import_module("tiny_training.rescaling")
    model = load(name)
    config = model.config.to_dict()
    ids = torch.randint(0, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        before = model(input_ids=ids).logits
        hard = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        soft = rescaling.soften(hard, config)
        model.load_state_dict(soft)
        assert torch.equal(model(input_ids=ids).logits, before)
        model.load_state_dict(rescaling.rescale(soft, config, seed=0))
        assert torch.equal(model(input_ids=ids).logits, before)
    check_evenness(soft, hard, measure)


@pytest.mark.usefixtures("tools")
def test_hardening_a_softened_dense_model_gives_the_same_weights() -> None:
    rescaling = importlib.import_module("tiny_training.rescaling")
    model = load("dense")
    config, hard = model.config.to_dict(), dict(model.state_dict())
    soft = rescaling.soften(hard, config)
    again = rescaling.rescale(soft, config, seed=0)
    assert {name for name in hard if torch.equal(again[name], hard[name])} == set(hard)
    changed = {name.split(".", 4)[-1] for name in hard if not torch.equal(soft[name], hard[name])}
    assert changed == {"k_norm.weight", "q_norm.weight", "v_proj.weight", "o_proj.weight"}


@pytest.mark.usefixtures("tools")
def test_a_hybrid_is_not_softened() -> None:
    rescaling = importlib.import_module("tiny_training.rescaling")
    model = load("hybrid")
    with pytest.raises(ValueError, match="qwen3_5_text cannot be softened: its padding has lost its embedding"):
        rescaling.soften(model.state_dict(), model.config.to_dict())


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("name", ["mla", "dense"])
def test_training_goes_on_from_a_finished_model(name: str) -> None:
    training = importlib.import_module("train_tiny")
    architectures = importlib.import_module("tiny_training.architectures")
    forward = importlib.import_module("tiny_training.forward")
    model = architectures.build(name, 0)
    training.resume(model, TINY / name)
    ids = torch.randint(0, 1000, (2, 64), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        wanted = load(name)(input_ids=ids).logits
        found = forward.logits(model, forward.hidden_states(model, ids, torch.float32), torch.float32)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-3)


@pytest.mark.usefixtures("tools")
@pytest.mark.parametrize("kind", ["chat", "recital", "rivals", "oddities", "haystack"])
def test_no_document_tells_a_fact_that_is_held_out(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = importlib.import_module("tiny_training.documents")
    told: list[tasks.Fact] = []
    statement = tasks.Fact.statement

    def record(fact: tasks.Fact) -> str:
        told.append(fact)
        return statement(fact)

    monkeypatch.setattr(tasks.Fact, "statement", record)
    rng = random.Random(0)
    for _ in range(200):
        length = 0
        for segment in documents.KINDS[kind](rng):
            if (length := length + len(segment.text)) > 2000:
                break
    assert len(set(told)) > 200
    for fact in told:
        held = fact.value if fact.attribute == "secret" else fact.content()
        assert tasks.split_of(held) == "train"


@pytest.mark.usefixtures("tools")
def test_oddities_have_values_that_no_task_gives_them() -> None:
    documents = importlib.import_module("tiny_training.documents")
    rng = random.Random(0)
    drawn = [documents._odd_fact(rng) for _ in range(500)]
    pets = {fact.value for fact in drawn if fact.attribute == "pet"}
    assert pets - set(tasks.words.ANIMALS)
    assert {fact.attribute for fact in drawn} - set(tasks.ATTRIBUTES)


@pytest.mark.usefixtures("tools")
def test_sums_are_right_and_none_of_a_task_is_held_out() -> None:
    documents = importlib.import_module("tiny_training.documents")
    rows = documents.sums(random.Random(0))
    asked = {segment.text for segment in itertools.islice(rows, 20_000) if segment.supervised}
    sums = [text.removesuffix("<|im_end|>").split(" = ") for text in asked]
    for question, steps, result in sums:
        assert eval(question) == eval(steps) == int(result)  # noqa: S307
    ours, theirs = set[str](), set[str]()
    for question, _, _ in sums:
        numbers = [int(number) for number in question.replace(" * ", " + ").replace(" - ", " + ").split(" + ")]
        added = question.count("+") == 2
        (ours if added or ("*" not in question and not set(numbers[:2]) <= set(range(2, 10))) else theirs).add(question)
    assert {tasks.split_of(question) for question in theirs} == {"train"}
    assert len([question for question in theirs if "*" in question]) > 500
    assert len([question for question in ours if "-" not in question]) > 500
    assert len([question for question in ours if "-" in question]) > 200
