"""--device: where a model runs, what runs there, and what is refused. Designing a run on a GPU needs none."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from truekv import LLM, EngineOptions, Refused
from truekv.core.device import choose_device
from truekv.core.errors import DoesNotFit
from truekv.serve import assemble
from truekv.serve.assemble import DEVICE_SHARE, captures, design

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
    options = EngineOptions(max_model_len=1024, enable_prefix_caching=False)
    alone = design("tiny-dense", options)
    weights = alone.checkpoint.bytes_in(alone.dtype)
    gpu(64 * GIB)
    assert design("tiny-dense", options).plan.total_bytes >= alone.plan.total_bytes
    room = alone.plan.total_bytes // 2
    gpu(int((room + weights) / DEVICE_SHARE))
    assert room // 2 < design("tiny-dense", options).plan.total_bytes <= room
    gpu(weights)
    with pytest.raises(DoesNotFit, match="0 bytes is left for rows and states"):
        design("tiny-dense", options)


def test_what_the_interpreter_runs_is_not_captured() -> None:
    with pytest.raises(Refused, match="kernels in Triton's interpreter cannot be captured; turn capture off"):
        design("tiny-dense", EngineOptions(kernel_backend="triton", capture="on"))
    blueprint = design("tiny-dense", EngineOptions(kernel_backend="triton"))
    assert not captures(blueprint.options, blueprint.kernels, blueprint.device)
