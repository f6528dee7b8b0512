"""Failure 1: scales are measured on real prompts through opened state, or not at all."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_hybrid

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.engine.run import Runner
from truekv.formats.frame import Frame
from truekv.memory.arena import Arena
from truekv.memory.states import StateLayer
from truekv.models.weights import Checkpoint
from truekv.serve.demo import calibration
from truekv.serve.demo.questions import ask, draw
from truekv.serve.demo.stage import Stage
from truekv.trust import observe
from truekv.trust.calibrate import Calibration, calibrate
from truekv.trust.observe import places

if TYPE_CHECKING:
    from truekv.core.batch import Sequence
    from truekv.core.protocols import Model

pytestmark = pytest.mark.xdist_group("hybrid")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage("tiny-hybrid")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Model:
    return Checkpoint.open(str(save_hybrid(tmp_path_factory.mktemp("hybrid")))).load("float32")


@pytest.mark.parametrize("seed", [0, 1])
def test_the_case_ends_as_it_should(seed: int) -> None:
    case = calibration.run(seed)
    assert case.reference.correct
    assert case.truekv.correct
    assert not case.naive.correct
    assert case.naive.kl is not None
    assert case.truekv.kl is not None
    assert case.naive.kl > 1000 * case.truekv.kl
    assert case.passed


def test_the_hybrid_cannot_answer_without_its_cache(stage: Stage) -> None:
    """Or no damage to the cache could ever be seen on it: with every key and value clipped to nothing it must fail."""
    questions = draw(stage, {"fact": 4}, seed=2)
    nothing = {
        place: Frame(scale=torch.full((item.heads, item.dim), 1e-9)) for place, item in places(stage.spec).items()
    }
    result = ask(stage, stage.arena("fp8_e4m3", sequences=len(questions), frames=nothing), questions)
    assert sum(result.right) < len(questions)


def measure(model: Model) -> Calibration:
    rng = random.Random(0)
    prompts = [[rng.randrange(300) for _ in range(100)] for _ in range(30)]
    return calibrate(model, prompts, dtype="float32", source="test", decode=2)


class Used(Arena):
    """Memory that somebody used before: every state slot holds finite junk."""

    def __init__(self, *given: Any, **named: Any) -> None:
        super().__init__(*given, **named)
        junk = torch.Generator().manual_seed(5)
        for layer in self.layers:
            if isinstance(layer, StateLayer):
                for slab in layer.state.values():
                    slab.copy_(torch.randn(slab.shape, generator=junk) * 30)


class UsedAndUnopened(Used, calibration.Unopened):
    """The mutant: such memory, handed out as it is."""


def same(one: Calibration, other: Calibration) -> bool:
    """Whether two calibrations measured the same centres and scales."""
    pairs = [(one.frames[place], other.frames[place]) for place in one.frames]
    return all(torch.equal(getattr(a, part), getattr(b, part)) for a, b in pairs for part in ("centre", "scale"))


def test_what_was_in_memory_before_changes_no_scale(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    clean = measure(model)
    monkeypatch.setattr(observe, "Arena", Used)
    assert same(measure(model), clean)


def test_mutant_state_that_is_not_zeroed_changes_scales(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """The check above fails when open() does not zero: it can see what it is meant to see."""
    clean = measure(model)
    monkeypatch.setattr(observe, "Arena", UsedAndUnopened)
    assert not same(measure(model), clean)


def test_mutant_scales_of_a_dummy_pass_are_refused(model: Model) -> None:
    with pytest.raises(Refused, match="needs at least 24 different prompts, and got 1"):
        calibrate(model, [[0] * calibration.DUMMY_TOKENS], dtype="float32", source="test")
    dummies = [[token] * (100 + token) for token in range(30)]
    with pytest.raises(Refused, match="dummy tokens measure garbage"):
        calibrate(model, dummies, dtype="float32", source="test")


def test_the_naive_pass_really_runs_on_what_another_conversation_left(stage: Stage) -> None:
    (question,) = draw(stage, {"fact": 1}, seed=3)
    frozen = calibration.dummy_scales(stage, question.prompt)
    assert frozen.keys() == places(stage.spec).keys()
    assert all(0 < scale < float("inf") for scale in frozen.values())
    # Dummy tokens and stale state give other scales than the prompts that are asked.
    real = calibration.prompt_scales(stage, [question])
    assert any(abs(frozen[place] / real[place] - 1) > 0.2 for place in frozen)


def test_an_unopened_slot_keeps_what_it_held_and_an_opened_one_does_not(stage: Stage) -> None:
    def left(arena: Arena) -> float:
        first: Sequence = arena.open()
        Runner(stage.model, arena).step([Chunk(first, [5, 6, 7])], [0])
        arena.close(first)
        again = arena.open()
        states = [layer.state["state"] for layer in arena.layers if isinstance(layer, StateLayer)]
        return max(float(state[again.slot].abs().max()) for state in states)

    assert left(stage.arena("f32", kind=calibration.Unopened, guards=False)) > 0
    assert left(stage.arena("f32", guards=False)) == 0
