"""The embedded models answer on the device what they answer on the CPU."""

from __future__ import annotations

import pytest
import torch
from gpu.place import CAPTURED, DEVICE, ON_DEVICE, OPTIONS

from truekv import LLM, SamplingParams
from truekv.core.options import Speculation
from truekv.serve.assemble import EMBEDDED

LONGEST = 48 if ON_DEVICE else 4
QUESTIONS = ("What is 7 * 8 + 3 * 4?", "What is 12 + 30?", "Is 7 * 8 = 56?")


@pytest.mark.parametrize("kv", ["bf16", "int8", "int8/kv4"])
@pytest.mark.parametrize("model", EMBEDDED)
def test_answers(model: str, kv: str) -> None:
    if model == "tiny-mla" and "/" in kv:
        pytest.skip("one row is key and value there")
    options = {"kv_cache_dtype": kv, "max_model_len": 512, "dtype": "float32"}
    ours = LLM(model, **options, **OPTIONS)  # type: ignore[arg-type]
    theirs = LLM(model, **options, device="cpu")  # type: ignore[arg-type]
    assert {backend for op, backend in ours.kv_plan["kernels"].items() if not op.startswith("sample ")} == {"triton"}
    for question in QUESTIONS if ON_DEVICE else QUESTIONS[:1]:
        messages = [{"role": "user", "content": question}]
        params = SamplingParams(max_tokens=LONGEST)
        assert ours.chat(messages, params).text == theirs.chat(messages, params).text


@pytest.mark.parametrize("capture", ["on", "off"])
def test_drafts_change_nothing(capture: str) -> None:
    speculation = Speculation(num_speculative_tokens=3)
    texts = {
        # In float32 throughout: products of more rows differ in their last bits, and half precision shows that.
        LLM(
            "tiny-hybrid",
            capture=capture,
            max_model_len=512,
            dtype="float32",
            kv_cache_dtype="f32",
            speculative_config=guesses,
            device=DEVICE,
            kernel_backend=CAPTURED,
        )
        .chat([{"role": "user", "content": QUESTIONS[0]}], SamplingParams(max_tokens=LONGEST))
        .text
        for guesses in (None, speculation)
    }
    assert len(texts) == 1


def test_weights_and_memory_lie_on_the_device() -> None:
    llm = LLM("tiny-hybrid", max_model_len=512, **OPTIONS)  # type: ignore[arg-type]
    arena = llm._engine.runner.arena
    assert all(
        tensor.device.type == DEVICE
        for layer in arena.layers
        if layer is not None
        for tensor in layer.tensors()  # type: ignore[union-attr]
    )
    assert not ON_DEVICE or torch.cuda.memory_allocated() > arena.nbytes
