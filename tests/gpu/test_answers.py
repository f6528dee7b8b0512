"""The embedded models answer on the device what they answer on the CPU."""

from __future__ import annotations

import pytest
import torch

from truekv import LLM, SamplingParams
from truekv.core.options import Speculation
from truekv.serve.assemble import EMBEDDED

QUESTIONS = ("What is 7 * 8 + 3 * 4?", "What is 12 + 30?", "Is 7 * 8 = 56?")


@pytest.mark.parametrize("kv", ["bf16", "int8", "int8/kv4"])
@pytest.mark.parametrize("model", EMBEDDED)
def test_answers(model: str, kv: str) -> None:
    if model == "tiny-mla" and "/" in kv:
        pytest.skip("one row is key and value there")
    options = {"kv_cache_dtype": kv, "max_model_len": 512, "dtype": "float32"}
    ours, theirs = (LLM(model, device=device, **options) for device in ("cuda", "cpu"))  # type: ignore[arg-type]
    assert {backend for _, backend in ours.kv_plan["kernels"].items()} == {"triton"}
    for question in QUESTIONS:
        messages = [{"role": "user", "content": question}]
        params = SamplingParams(max_tokens=48)
        assert ours.chat(messages, params).text == theirs.chat(messages, params).text


@pytest.mark.parametrize("capture", ["on", "off"])
def test_drafts_change_nothing(capture: str) -> None:
    speculation = Speculation(num_speculative_tokens=3)
    texts = {
        LLM("tiny-hybrid", device="cuda", capture=capture, max_model_len=512, speculative_config=guesses)  # type: ignore[arg-type]
        .chat([{"role": "user", "content": QUESTIONS[0]}], SamplingParams(max_tokens=48))
        .text
        for guesses in (None, speculation)
    }
    assert len(texts) == 1


def test_weights_and_memory_lie_on_the_device() -> None:
    llm = LLM("tiny-hybrid", device="cuda", max_model_len=512)
    arena = llm._engine.runner.arena
    assert all(
        tensor.is_cuda
        for layer in arena.layers
        if layer is not None
        for tensor in layer.tensors()  # type: ignore[union-attr]
    )
    assert torch.cuda.memory_allocated() > arena.nbytes
