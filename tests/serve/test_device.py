"""--device: where a model runs, what runs there, and what is refused. Designing a run on a GPU needs none."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from truekv import LLM, EngineOptions, Refused, SamplingParams
from truekv.core.device import choose_device
from truekv.core.errors import DoesNotFit
from truekv.engine.capture import StepGraphs
from truekv.engine.speculate.drafting import Drafter
from truekv.memory.plan import readable
from truekv.serve import assemble, doctor
from truekv.serve.assemble import DEVICE_SHARE, captures, design, effective
from truekv.serve.cli import run

if TYPE_CHECKING:
    from collections.abc import Callable

    from command_line import Outcome

GPU = torch.device("cuda", 0)
GIB = 1 << 30


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Pretend that there is a GPU with so many free bytes."""

    def free(count: int) -> None:
        monkeypatch.setattr(assemble, "choose_device", lambda _: GPU)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (count, 80 * GIB) if device == GPU else None)

    return free


def test_without_a_gpu_auto_is_the_cpu() -> None:
    assert choose_device("auto") == choose_device("cpu") == torch.device("cpu")
    assert design("tiny-dense", EngineOptions()).device == torch.device("cpu")


def test_a_gpu_that_is_not_there_is_refused(truekv: Callable[..., Outcome]) -> None:
    with pytest.raises(Refused, match=r"device is cuda, but torch .* sees no CUDA device here; use device cpu"):
        LLM("tiny-dense", device="cuda")
    done = truekv("generate", "tiny-dense", "a", "--device", "cuda")
    assert (done.code, done.out) == (2, "")
    assert "sees no CUDA device here" in done.err


def test_an_unknown_device_is_refused() -> None:
    with pytest.raises(Refused, match="device is 'tpu', but must be auto, cuda or cpu"):
        EngineOptions(device="tpu")  # type: ignore[arg-type]


def test_on_a_gpu_triton_runs_captured(gpu: Callable[[int], None]) -> None:
    gpu(8 * GIB)
    options = EngineOptions(kv_cache_dtype="int8", max_model_len=256)
    blueprint = design("tiny-hybrid", options)
    assert blueprint.device == GPU
    assert {backend for what, backend in blueprint.kernels.describe() if not what.startswith("sample ")} == {"triton"}
    assert captures(options, blueprint.kernels, GPU)
    with pytest.raises(Refused, match="native kernels run on the CPU alone: use device cpu or the triton backend"):
        design("tiny-hybrid", EngineOptions(kernel_backend="native"))


def test_memory_on_a_gpu_is_what_is_needed_and_at_most_what_is_free(gpu: Callable[[int], None]) -> None:
    options = EngineOptions(max_model_len=1024, max_num_seqs=8, enable_prefix_caching=False)
    alone = design("tiny-dense", options)
    assert alone.plan.step_bytes == 0
    weights = alone.checkpoint.bytes_in(alone.dtype)
    gpu(64 * GIB)
    free = design("tiny-dense", options).plan
    assert free.total_bytes >= alone.plan.total_bytes
    assert free.step_bytes > 1 << 20
    room = alone.plan.total_bytes // 2
    gpu(int((room + weights + free.step_bytes) / DEVICE_SHARE))
    tight = design("tiny-dense", options).plan
    assert room // 2 < tight.total_bytes <= room
    # Nobody asked for it, so the prefill chunk is a GPU's.
    short = design("tiny-dense", replace(options, max_num_batched_tokens=512)).plan
    assert tight.step_bytes == free.step_bytes > short.step_bytes
    gpu(int((weights + free.step_bytes) / DEVICE_SHARE))
    with pytest.raises(
        DoesNotFit, match=r"0 bytes is left for rows and states beside [\d.]+ MiB for steps: .*give"
    ) as error:
        design("tiny-dense", options)
    assert "\n" not in str(error.value)


def test_what_is_asked_for_as_memory_is_for_rows_and_states(gpu: Callable[[int], None]) -> None:
    gpu(8 * GIB)
    blueprint = design("tiny-hybrid", EngineOptions(memory=64 << 20, enable_prefix_caching=False))
    assert (60 << 20) < blueprint.plan.total_bytes <= 64 << 20
    assert blueprint.plan.step_bytes > 0


def test_defaults_follow_the_device(gpu: Callable[[int], None]) -> None:
    asked = EngineOptions(max_model_len=2048)
    here = design("tiny-hybrid", replace(asked, device="cpu")).options
    assert (here.max_num_seqs, here.max_num_batched_tokens) == (8, 512)
    gpu(64 * GIB)
    there = design("tiny-hybrid", asked)
    assert (there.options.max_num_seqs, there.options.max_num_batched_tokens) == (256, 2048)
    assert (there.sequences, there.step_tokens) == (256, 2048)
    assert there.plan.slots == 256 + 1
    assert there.parts is not None
    # A small device has room for fewer, and what is asked for is never changed.
    states = there.plan.state_bytes_per_sequence * 256
    gpu(int((there.plan.step_bytes + 2 * states) / DEVICE_SHARE))
    fewer = design("tiny-hybrid", asked)
    assert 1 <= fewer.sequences < 256
    assert fewer.plan.slots == fewer.options.max_num_seqs + 1 == fewer.sequences + 1
    own = design("tiny-hybrid", replace(asked, max_num_seqs=200, max_num_batched_tokens=64))
    assert (own.sequences, own.step_tokens) == (200, 64)


def test_doctor_and_the_plan_say_what_is_kept_for_steps(
    gpu: Callable[[int], None], capsys: pytest.CaptureFixture[str]
) -> None:
    gpu(64 * GIB)
    options = EngineOptions(max_model_len=256)
    kept = design("tiny-dense", options).plan.step_bytes
    assert doctor.run("tiny-dense", options, as_json=False) == 0
    assert f"{readable(kept)} of the GPU are kept for what they compute" in capsys.readouterr().out
    assert effective(design("tiny-dense", options))["step_bytes"] == kept
    assert run(["plan", "tiny-dense"]) == 0
    assert re.search(r"not counted: steps .* [\d.]+ MiB on a GPU, for up to 2,048 tokens each", capsys.readouterr().out)


def test_on_a_gpu_every_usual_size_is_recorded_before_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(assemble, "warms", lambda _: True)
    options: dict[str, Any] = {
        "capture": "on",
        "max_model_len": 256,
        "max_num_seqs": 2,
        "speculative_config": {"method": "mtp", "num_speculative_tokens": 2, "adaptive": False},
    }
    llm = LLM("tiny-hybrid", **options)
    graphs = llm._engine.runner.forward
    assert isinstance(graphs, StepGraphs)
    drafting = llm._engine.drafting
    assert isinstance(drafting, Drafter)
    assert drafting.predictor is not None
    guesses = drafting.predictor._guesses[2]
    assert isinstance(guesses, StepGraphs)
    recorded = graphs.recorded, guesses.recorded
    assert recorded == (2 * 6, 2 * 6), "1 to 6 tokens, in rows of 1 and of 3"
    llm.generate([[5, 6, 7], [8]], SamplingParams(max_tokens=60, ignore_eos=True))
    assert graphs.replays > 0
    assert guesses.replays > 0
    assert (graphs.recorded, guesses.recorded) == recorded


def test_what_the_interpreter_runs_is_not_captured() -> None:
    with pytest.raises(Refused, match="kernels in Triton's interpreter cannot be captured; turn capture off"):
        design("tiny-dense", EngineOptions(kernel_backend="triton", capture="on"))
    blueprint = design("tiny-dense", EngineOptions(kernel_backend="triton"))
    assert not captures(blueprint.options, blueprint.kernels, blueprint.device)
