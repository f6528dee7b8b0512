"""A step makes the host wait once: nothing is sent to the device between the forward pass and that."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_dense

from truekv.core.batch import Chunk
from truekv.core.lazy import torch as lazy
from truekv.core.sampling import Reading
from truekv.engine.run import Runner
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from pathlib import Path

    from truekv.core.batch import Step


@pytest.mark.parametrize("wanted", [(1, 1), (0, 2), (0, 0), (3, 2)])
def test_the_places_of_wanted_rows_are_sent_before_the_forward_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, wanted: tuple[int, int]
) -> None:
    checkpoint = Checkpoint.open(str(save_dense(tmp_path)))
    spec = checkpoint.architecture.spec
    formats = choose_formats(spec, "f32", "", "float32")
    kernels = select(spec, formats)
    arena = Arena(spec, plan(spec, formats, max_model_len=64, max_num_seqs=2), kernels)
    model = checkpoint.load("float32", kernels.ops)
    made: list[str] = []
    tensor = torch.tensor

    def seen(*given: Any, **options: Any) -> torch.Tensor:
        made.append("tensor")
        return tensor(*given, **options)

    def forward(step: Step) -> torch.Tensor:
        hidden = model.forward(step, arena.layers)
        made.append("forward")
        return hidden

    monkeypatch.setattr(lazy, "tensor", seen)
    chunks = [Chunk(arena.open(), [3, 4, 5]), Chunk(arena.open(), [6, 7])]
    ran = Runner(model, arena, forward).run(chunks, wanted, [Reading(0), Reading(0)])
    monkeypatch.undo()
    assert made[-1] == "forward"
    assert made.count("tensor") == (0 < sum(wanted) < 5)
    with torch.inference_mode():
        best = model.logits(ran.hidden).argmax(-1).tolist()
    # The last of each chunk's.
    assert ran.likeliest == [best[3 - wanted[0] : 3], best[5 - wanted[1] : 5]]
    assert [tuple(rows.shape) for rows in ran.rows if isinstance(rows, torch.Tensor)] == [(0, spec.vocab_size)] * 2
