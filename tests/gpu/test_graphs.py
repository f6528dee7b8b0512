"""Steps replayed as CUDA graphs and eager ones give the same bits, in hidden states and in memory, under poison."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from engine.test_capture_steps import DRAFTS, FAMILIES, SEQUENCES, Twins, differences

from truekv.core.batch import Chunk
from truekv.engine import capture
from truekv.engine.recording import CudaRecording
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    return functools.cache(lambda family: Checkpoint.open(str(FAMILIES[family](tmp_path_factory.mktemp(family)))))


@pytest.fixture(autouse=True)
def _narrow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "NARROWEST", 1)


@pytest.mark.parametrize(("kv", "dtype"), [("bf16", "bfloat16"), ("int8", "float32"), ("kv4", "bfloat16")])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_are_bitwise_those_run_eagerly(
    checkpoint: Callable[[str], Checkpoint], family: str, kv: str, dtype: str
) -> None:
    twins = Twins(checkpoint(family), kv, "triton", dtype, "cuda")
    assert not list(differences(twins, steps=48))
    assert twins.graphs.replays >= 40
    assert all(isinstance(one._recording, CudaRecording) for one in twins.graphs._captured.values())
    twins.captured.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_with_every_number_of_accepted_drafts(checkpoint: Callable[[str], Checkpoint], family: str) -> None:
    twins = Twins(checkpoint(family), "int8", "triton", "bfloat16", "cuda")
    twins.graphs.warm(1, progress=lambda _done, _total: None)
    recorded = twins.graphs.recorded
    for rows in range(1, SEQUENCES + 1):
        for drafts in range(DRAFTS + 1):
            for accepted in range(drafts + 1):
                asked = {row: ([row, *range(drafts)], drafts, accepted) for row in range(rows)}
                eager, captured = twins.step(asked)
                assert eager.equal(captured), (rows, drafts, accepted)
    # Poison included, which as numbers equals nothing.
    for name, *sides in twins.memories():
        ours, theirs = (side.contiguous().view(torch.uint8) for side in sides)
        assert ours.equal(theirs), name
    assert twins.graphs.replays >= 40
    assert twins.graphs.recorded >= recorded


def test_a_step_that_waits_for_the_device_is_refused(checkpoint: Callable[[str], Checkpoint]) -> None:
    from truekv.core.errors import Refused

    twins = Twins(checkpoint("dense"), "int8", "triton", "float32", "cuda")
    graphs = capture.StepGraphs(
        lambda step: twins.model.forward(step, twins.captured.layers) * float(step.position.max()),
        twins.captured,
        twins.graphs.scratch,
    )
    with pytest.raises(Refused, match="cannot be captured as a CUDA graph"):
        graphs(twins.captured.reserve([Chunk(twins.held[0][1], [5])]))
