"""A step that cannot be captured is refused. Last of all, for a capture that failed may leave its pool open."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from engine.test_capture_steps import FAMILIES, Twins
from gpu.place import DEVICE

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.engine import capture
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path


def test_a_step_that_waits_for_the_device_is_refused(tmp_path: Path) -> None:
    twins = Twins(Checkpoint.open(str(FAMILIES["dense"](tmp_path))), "int8", "triton", "float32", DEVICE)
    graphs = capture.StepGraphs(
        lambda step: twins.model.forward(step, twins.captured.layers) * float(step.position.max()),
        twins.captured,
        twins.graphs,
    )
    with pytest.raises(Refused, match="cannot be captured as a CUDA graph"):
        graphs(twins.captured.reserve([Chunk(twins.held[0][1], [5])]))
