"""Failure 5: drafts, quantized rows and capture together give the logits of the plain path, position by position."""

from __future__ import annotations

from dataclasses import replace

import pytest

from truekv.serve.demo import capture
from truekv.serve.demo.capture import DRAFTS, FreshTokensOnly, KeepsRejected, Replayed, difference, speculate
from truekv.serve.demo.questions import Question, draw
from truekv.serve.demo.stage import Stage

pytestmark = pytest.mark.xdist_group("hybrid")
SAME = 1e-4
FORMATS = ("f32", "bf16", "fp8_e4m3", "int8", "kv4", "turboquant_4bit_nc", "turboquant_3bit_nc", "q4_0+hadamard")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage("tiny-hybrid")


@pytest.fixture(scope="module")
def question(stage: Stage) -> Question:
    (found,) = draw(stage, {"tool_call": 1}, seed=5)
    return found


def width(question: Question) -> int:
    return -(-len(question.prompt) // 32) + 3


@pytest.mark.parametrize("seed", [0, 1])
def test_the_case_ends_as_it_should(seed: int) -> None:
    case = capture.run(seed)
    assert case.truekv.correct
    assert not case.naive.correct
    assert case.passed


@pytest.mark.parametrize("name", FORMATS)
def test_logits_with_drafts_and_capture_equal_those_without(stage: Stage, question: Question, name: str) -> None:
    (plain,) = stage.answer(stage.arena(name), [question.prompt])
    arena = stage.arena(name, sequences=2, drafts=DRAFTS)
    model = Replayed(stage.model, arena, width(question))
    answer, accepted, rejected = speculate(stage, model, arena, question.prompt)
    assert accepted > 0
    assert rejected > 0
    assert difference(answer, plain) <= SAME
    arena.check()
    assert arena.held_pages == 0


def test_mutant_a_capture_that_bakes_a_length_is_caught(stage: Stage, question: Question) -> None:
    (plain,) = stage.answer(stage.arena("int8"), [question.prompt])
    kernels = stage.arena("int8").kernels
    arena = stage.arena(
        "int8", sequences=2, drafts=DRAFTS, kernels=replace(kernels, paged=FreshTokensOnly(kernels.paged))
    )
    answer, _, _ = speculate(stage, Replayed(stage.model, arena, width(question)), arena, question.prompt)
    assert difference(answer, plain) > SAME


def test_the_same_shortcut_is_right_without_a_capture(stage: Stage, question: Question) -> None:
    """Which is why nobody saw it: only the captured step is wrong."""
    (plain,) = stage.answer(stage.arena("int8"), [question.prompt])
    kernels = stage.arena("int8").kernels
    arena = stage.arena(
        "int8", sequences=2, drafts=DRAFTS, kernels=replace(kernels, paged=FreshTokensOnly(kernels.paged))
    )
    answer, _, _ = speculate(stage, stage.model, arena, question.prompt)
    assert difference(answer, plain) <= SAME


def test_mutant_a_state_that_keeps_rejected_drafts_is_caught(stage: Stage, question: Question) -> None:
    (plain,) = stage.answer(stage.arena("int8"), [question.prompt])
    arena = stage.arena("int8", sequences=2, drafts=DRAFTS, kind=KeepsRejected, guards=False)
    answer, _, rejected = speculate(stage, stage.model, arena, question.prompt)
    assert rejected > 0
    shared = min(len(answer.tokens), len(plain.tokens))
    assert float((answer.logits[:shared] - plain.logits[:shared]).abs().max()) > SAME
