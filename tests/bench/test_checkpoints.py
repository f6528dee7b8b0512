from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from bench.checkpoints import CONFIGS, checkpoint

from truekv.serve.llm import LLM

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("name", list(CONFIGS))
def test_transformers_and_truekv_read_the_same_model(folder: Path, name: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    directory = checkpoint(name)
    assert directory.is_relative_to(folder)
    tokens = AutoTokenizer.from_pretrained(directory)("the same text for both of them")["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0]
    got = LLM(str(directory), dtype="float32", kv_cache_dtype="f32", max_model_len=64).logits(tokens)
    assert 0.3 < float(expected.std()) < 3
    # GLM's norms of latents have another eps in transformers.
    torch.testing.assert_close(got, expected, rtol=0, atol=2e-4 if name != "mla" else 2e-3)


def test_a_checkpoint_is_written_once_and_again_when_its_shape_changes(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = checkpoint("dense") / "model.safetensors"
    written = weights.stat().st_mtime_ns
    assert checkpoint("dense") == weights.parent
    assert weights.stat().st_mtime_ns == written
    monkeypatch.setitem(CONFIGS, "dense", {**CONFIGS["dense"], "num_hidden_layers": 1})
    assert json.loads((checkpoint("dense") / "config.json").read_text())["num_hidden_layers"] == 1
    assert weights.stat().st_mtime_ns != written
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["dense"]


def test_the_seed_makes_the_weights(folder: Path) -> None:
    first = (checkpoint("dense") / "model.safetensors").read_bytes()
    (folder / "checkpoints" / "dense" / "config.json").unlink()
    assert (checkpoint("dense") / "model.safetensors").read_bytes() == first
