"""Steps replayed as CUDA graphs and eager ones give the same bits, in hidden states and in memory, under poison."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from engine.test_capture_steps import DRAFTS, FAMILIES, SEQUENCES, Twins, differences
from gpu.place import CAPTURED, DEVICE, ON_DEVICE

from truekv.engine import capture
from truekv.engine.padding import PaddedStep, nobody
from truekv.engine.recording import CudaRecording, Recording
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.batch import Step


STEPS = 48 if ON_DEVICE else 8


class PaddedTwins(Twins):
    """Both run steps of the captured sizes: bits of a product may depend on how many rows it has."""

    def eagerly(self, step: Step) -> torch.Tensor:
        size = self.graphs.sizes.holding(step)
        if size is None:
            return super().eagerly(step)
        scratch = self.graphs.scratch
        padded = PaddedStep(nobody(size, scratch.slot, scratch.pages[0], self.eager.device))
        padded.put(step)
        return super().eagerly(padded.step)[: len(step.tokens)]


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
    twins = PaddedTwins(checkpoint(family), kv, CAPTURED, dtype, DEVICE)
    assert not list(differences(twins, steps=STEPS))
    assert twins.graphs.replays >= STEPS - SEQUENCES
    kind = CudaRecording if ON_DEVICE else Recording
    assert all(isinstance(one._recording, kind) for one in twins.graphs._captured.values())
    twins.captured.check()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_size_with_every_number_of_accepted_drafts(checkpoint: Callable[[str], Checkpoint], family: str) -> None:
    twins = PaddedTwins(checkpoint(family), "int8", CAPTURED, "bfloat16", DEVICE)
    twins.graphs.warm(1, progress=lambda _done, _total: None)
    recorded = twins.graphs.recorded
    for rows in range(1, SEQUENCES + 1) if ON_DEVICE else (1, 3):
        for drafts in range(DRAFTS + 1) if ON_DEVICE else (0, DRAFTS):
            for accepted in range(drafts + 1):
                asked = {row: ([row, *range(drafts)], drafts, accepted) for row in range(rows)}
                eager, captured = twins.step(asked)
                assert eager.equal(captured), (rows, drafts, accepted)
    # Poison included, which as numbers equals nothing.
    for name, *sides in twins.memories():
        ours, theirs = (side.contiguous().view(torch.uint8) for side in sides)
        assert ours.equal(theirs), name
    assert twins.graphs.replays >= (40 if ON_DEVICE else 10)
    assert twins.graphs.recorded >= recorded
