"""Failure 3: low-bit rows on a hybrid. The kernel table is total or refuses, and no block format breaks numbers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from truekv.core.errors import Refused
from truekv.formats.choice import choose_formats
from truekv.kernels import table
from truekv.kernels.reference import paged
from truekv.serve.demo import lowbit
from truekv.serve.demo.questions import ask, draw
from truekv.serve.demo.stage import Stage

pytestmark = pytest.mark.xdist_group("hybrid")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage("tiny-hybrid")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_case_ends_as_it_should(seed: int) -> None:
    case = lowbit.run(seed)
    assert case.reference.correct
    assert case.truekv.correct
    assert not case.naive.correct
    assert case.naive.kl is None or (case.truekv.kl is not None and case.truekv.kl < case.naive.kl / 10)
    assert case.passed


@pytest.mark.parametrize("name", lowbit.FAMILY)
@pytest.mark.parametrize("suffix", ["", "+hadamard"])
def test_every_block_format_runs_on_the_hybrid_with_finite_logits(stage: Stage, name: str, suffix: str) -> None:
    (question,) = draw(stage, {"fact": 1}, seed=3)
    arena = stage.arena(name + suffix)
    logits = stage.score(arena, question.prompt, question.reference.tokens)
    assert bool(torch.isfinite(logits).all())
    rows = [call for call in arena.kernels.calls if call.startswith("attend")]
    assert rows == [f"attend[{name + suffix}/{name + suffix}]"]
    assert arena.kernels.calls["scan[gdn]"] > 0


def test_a_kernel_that_is_missing_is_refused_at_load(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    """The reported cause: the kernel for that type was not compiled in, and nothing refused."""
    formats = choose_formats(stage.spec, "q4_0", "", "float32")
    monkeypatch.setattr(paged, "refusal", lambda _layer, chosen: f"no attend kernel for {chosen[0].name}; use q8_0")
    with pytest.raises(Refused, match="no attend kernel for q4_0; use q8_0"):
        table.select(stage.spec, [chosen or () for chosen in formats])


def test_mutant_a_table_that_falls_through_breaks_numbers(stage: Stage) -> None:
    """With the missing kernel passed over in silence, the answer is made from memory that nobody wrote."""
    (question,) = draw(stage, {"fact": 1}, seed=3)
    arena = stage.arena("q4_0+hadamard", guards=False)
    holes = SimpleNamespace(refusal=paged.refusal, store=lambda *_: None, attend=paged.attend)
    broken = stage.arena("q4_0+hadamard", kernels=dataclasses.replace(arena.kernels, paged=holes), guards=False)
    for layer in broken.layers:
        if hasattr(layer, "data"):
            layer.data.fill_(0xFF)
    assert ask(stage, broken, [question]).kl is None


def test_mutant_without_the_frame_the_case_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the rotated formats replaced by plain ones, as the naive method runs them, truekv would be wrong too."""
    plain = Stage.arena
    monkeypatch.setattr(
        Stage, "arena", lambda self, name, **options: plain(self, name.removesuffix("+hadamard"), **options)
    )
    assert not lowbit.run(0).passed


def test_formats_are_per_layer(stage: Stage) -> None:
    layers = [index for index, chosen in enumerate(choose_formats(stage.spec, "bf16", "", "float32")) if chosen]
    mixed = choose_formats(stage.spec, "bf16", f"{layers[0]}=q8_0+hadamard/iq4_nl", "float32")
    assert [[item.name for item in mixed[index] or ()] for index in layers] == [
        ["q8_0+hadamard", "iq4_nl"],
        *[["bf16", "bf16"]] * (len(layers) - 1),
    ]
