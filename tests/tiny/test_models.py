"""The embedded models: the same numbers in transformers, hard keys, small files."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

import truekv.tiny
from truekv import LLM
from truekv.models.weights import Checkpoint
from truekv.tiny.tasks import examples

TINY = Path(truekv.tiny.__file__).parent
MODELS = ("hybrid", "mla", "dense")
SAME = 1e-4
pytestmark = pytest.mark.filterwarnings("default")


def oracle(name: str, ids: list[int], dtype: torch.dtype) -> torch.Tensor:
    model = transformers.AutoModelForCausalLM.from_pretrained(
        TINY / name, dtype=dtype, attn_implementation="eager", experts_implementation="eager"
    ).eval()
    with torch.no_grad():
        return model(torch.tensor([ids]), use_cache=False).logits[0]


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("chunk", [None, 37])
def test_logits_equal_transformers(name: str, chunk: int | None) -> None:
    llm = LLM(f"tiny-{name}", dtype="float32", max_num_seqs=1)
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / name)
    (example,) = examples("tool_call", "heldout", 4, 1)
    ids = tokenizer.apply_chat_template(example.messages, tools=example.tools, return_dict=False)
    # The delta rule of transformers has float32 constants in it.
    exact = oracle(name, ids, torch.float32 if name == "hybrid" else torch.float64)
    assert float((llm.logits(ids, chunk=chunk) - exact).abs().max()) <= SAME


@pytest.mark.parametrize("name", MODELS)
def test_our_prompt_is_transformers_prompt(name: str) -> None:
    from truekv.engine.tokens import Tokenizer
    from truekv.serve.messages import ChatTemplate

    theirs = transformers.AutoTokenizer.from_pretrained(TINY / name)
    tokenizer, template = Tokenizer.open(TINY / name), ChatTemplate.open(TINY / name)
    assert tokenizer is not None
    assert template is not None
    for task in ("arithmetic", "tool_call", "tool_answer"):
        (example,) = examples(task, "heldout", 0, 1)
        text = template.render(example.messages, example.tools)
        ids = theirs.apply_chat_template(
            example.messages, tools=example.tools, add_generation_prompt=True, return_dict=False
        )
        assert tokenizer.encode(text, add_special_tokens=False) == ids


def test_together_they_are_small() -> None:
    files = [path for name in MODELS for path in (TINY / name).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < 25e6
    for name in MODELS:
        assert 1e6 <= Checkpoint.open(str(TINY / name)).parameters <= 5e6


def test_the_hybrid_has_a_prediction_head() -> None:
    checkpoint = Checkpoint.open(str(TINY / "hybrid"))
    assert len(checkpoint.architecture.spec.draft_layers) == 1
    assert {"mtp.fc.weight", "mtp.norm.weight"} <= set(checkpoint.headers)
