"""The embedded models answer on the device what they answer on the CPU."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from gpu.place import CAPTURED, DEVICE, ON_DEVICE, OPTIONS

from truekv import LLM, SamplingParams
from truekv.core.options import Speculation
from truekv.core.sampling import Draw
from truekv.engine import sample, settle
from truekv.engine.run import Runner
from truekv.kernels.cuda import kernel
from truekv.kernels.table import fastest_sampling
from truekv.serve.assemble import EMBEDDED

if TYPE_CHECKING:
    from truekv.engine.run import Ran

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
    # Where the device is made for it, 4-bit values are attended to in CUDA C++.
    both = ON_DEVICE and kv == "int8/kv4" and kernel.runs_on(torch.device(DEVICE))
    backends = {backend for op, backend in ours.kv_plan["kernels"].items() if not op.startswith("sample ")}
    assert backends == ({"triton", "cuda"} if both else {"triton"})
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


def test_logits_leave_the_device_only_where_somebody_reads_them(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = [
        SamplingParams(max_tokens=LONGEST, ignore_eos=True, **asked)  # type: ignore[arg-type]
        for asked in (
            {},
            {"temperature": 0.8, "top_p": 0.95, "seed": 3},
            {"temperature": 0.8, "top_k": 1, "seed": 4},
            {"logprobs": 2},
            {"repetition_penalty": 1.1},
            {"temperature": 0.8, "seed": 6},
            {"temperature": 0.8, "top_k": 20, "top_p": 0.95, "seed": 5},
        )
    ]
    options = {"kv_cache_dtype": "f32", "max_model_len": 512, "dtype": "float32", "max_num_seqs": len(asked)}
    ours = LLM("tiny-dense", **options, **OPTIONS)  # type: ignore[arg-type]
    theirs = LLM("tiny-dense", **options, device="cpu")  # type: ignore[arg-type]
    steps: list[list[torch.Tensor]] = []
    drawn: list[list[int]] = []
    run = Runner.run

    def seen(*given: Any) -> Ran:
        ran = run(*given)
        steps.append([part for part in ran.rows if isinstance(part, torch.Tensor)])
        drawn.append([*map(len, ran.drawn)])
        return ran

    prompts = [[10 * index + 1, 7, 3, 5] for index in range(len(asked))]
    expected = [theirs.generate(prompt, params)[0].tokens for prompt, params in zip(prompts, asked, strict=True)]
    monkeypatch.setattr(Runner, "run", seen)
    assert [answer.tokens for answer in ours.generate(prompts, asked)] == expected
    assert all(part.device.type == "cpu" for parts in steps for part in parts)
    assert {(*map(len, parts),) for parts in steps} == {(0, 1, 0, 1, 1, 0, 1)}
    assert drawn == [[0, 0, 0, 0, 0, 1, 0]] * len(steps)
    assert all(parts[-1].shape == (1, 21) for parts in steps)
    # In every step one call for the second request, one for the last and one for that whose repetitions are punished.
    assert ours._blueprint.kernels.calls["sample"] == 3 * LONGEST


def test_of_most_rows_the_best_logits_are_all_that_filters_need(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "MOST_READ", 64)
    asked = [
        SamplingParams(max_tokens=LONGEST, ignore_eos=True, seed=seed, **asked)  # type: ignore[arg-type]
        for seed, asked in enumerate(
            (
                {"temperature": 0.8, "top_p": 0.95},
                {"temperature": 0.8, "min_p": 0.05},
                {"temperature": 0.8, "top_p": 0.9, "min_p": 0.02},
                {"temperature": 50.0, "top_p": 0.99},
            )
        )
    ]
    options = {"kv_cache_dtype": "f32", "max_model_len": 512, "dtype": "float32", "max_num_seqs": len(asked)}
    ours = LLM("tiny-dense", **options, **OPTIONS)  # type: ignore[arg-type]
    theirs = LLM("tiny-dense", **options, device="cpu")  # type: ignore[arg-type]
    read: list[list[int]] = []
    run = Runner.run

    def seen(*given: Any) -> Ran:
        ran = run(*given)
        read.append([part.shape[1] for part in ran.rows if isinstance(part, torch.Tensor)])
        return ran

    prompts = [[10 * index + 1, 7, 3, 5] for index in range(len(asked))]
    expected = [theirs.generate(prompt, params)[0].tokens for prompt, params in zip(prompts, asked, strict=True)]
    monkeypatch.setattr(Runner, "run", seen)
    assert [answer.tokens for answer in ours.generate(prompts, asked)] == expected
    # A flat row is read whole.
    assert {step[3] for step in read} == {theirs._engine.runner.model.spec.vocab_size}
    assert all(min(step[index] for step in read) == 64 for index in range(3))


@pytest.mark.parametrize("spread", [6.0, 1.0, 0.0])
def test_tokens_drawn_on_the_device_are_those_of_the_host(spread: float) -> None:
    rows, vocabulary = 200 if ON_DEVICE else 6, 151_936
    make = torch.Generator().manual_seed(5)
    logits = spread * torch.randn(rows, vocabulary, generator=make)
    points = torch.rand(rows, dtype=torch.float64, generator=make)
    temperatures = 0.3 + 2 * torch.rand(rows, dtype=torch.float64, generator=make)
    found = settle.drawn(logits.to(DEVICE), temperatures.to(DEVICE), points.to(DEVICE))
    sides = zip(logits, temperatures.tolist(), points.tolist(), strict=True)
    draws = [Draw(row, temperature, 0, 1.0, 0.0, point) for row, temperature, point in sides]
    expected = fastest_sampling().draw(draws)
    assert found.device.type == DEVICE
    # Among so many unlikely tokens a point may be near an edge.
    wrong = [(own, other) for own, other in zip(found.tolist(), expected, strict=True) if own not in {-1, other}]
    assert not wrong
    assert (found < 0).sum() <= 1
    # At the end of any token it is.
    sums = (logits.double() - logits.amax(1).double()[:, None]).div_(temperatures[:, None]).exp_().cumsum_(1)
    edges = torch.randint(vocabulary, (rows, 1), generator=make)
    points = (sums.gather(1, edges) / sums[:, -1:])[:, 0].clamp(max=1 - 2**-53)
    assert settle.drawn(logits.to(DEVICE), temperatures.to(DEVICE), points.to(DEVICE)).tolist() == [-1] * rows


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
