"""Any model in any format along any path: the same logits, stored rows and states as from nothing in one chunk."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any, Final

import pytest
from exact.checkpoints import MODELS
from exact.paths import PATHS, TAKEN

from truekv import Refused
from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from exact.stage import Stage

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
FORMATS: Final = ("bf16", "fp8", "int8", "kv4", "turboquant_3bit_nc", "q4_0")
DTYPES: Final = ("float32", "bfloat16")
HEADLESS: Final = ("dense", "mamba2")
"""Models without a prediction head."""
Case = tuple[str, str, str, str]


def product() -> list[Case]:
    """Every model, path, format and compute dtype that go together."""
    cases = itertools.product(MODELS, PATHS, FORMATS, DTYPES)
    return [case for case in cases if not ("mtp" in PATHS[case[1]] and case[0] in HEADLESS)]


def pairs(case: Case) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(enumerate(case), 2))


def pairwise(cases: list[Case]) -> list[Case]:
    """Few cases in which every two values that go together meet: always the one that brings most new pairs."""
    missing = set[tuple[Any, ...]]().union(*map(pairs, cases))
    chosen: list[Case] = []
    while missing:
        best = max(cases, key=lambda case: len(pairs(case) & missing))
        missing -= pairs(best)
        chosen.append(best)
    return chosen


PAIRWISE: Final = pairwise(product())


def name(case: Case) -> str:
    return "-".join(case)


def follow(stage: Stage, case: Case) -> None:
    model, path, cache_format, dtype = case
    counts = stage.play(model, PATHS[path], cache_format, dtype)
    for feature in PATHS[path]:
        assert TAKEN[feature](counts), f"{feature} was asked for and did not happen: {counts}"


@pytest.mark.parametrize("case", PAIRWISE, ids=name)
def test_a_path_changes_no_bit(case: Case, stage: Stage) -> None:
    follow(stage, case)


@pytest.mark.campaign
@pytest.mark.parametrize("case", [case for case in product() if case not in PAIRWISE], ids=name)
def test_no_path_changes_a_bit(case: Case, stage: Stage) -> None:
    follow(stage, case)


@pytest.mark.parametrize("model", HEADLESS)
def test_a_model_without_a_prediction_head_says_so(model: str, stage: Stage) -> None:
    with pytest.raises(Refused, match="multi-token-prediction head"):
        stage.llm(model, PATHS["mtp"])


def test_all_pairs_are_among_the_chosen_cases() -> None:
    assert set[Any]().union(*map(pairs, PAIRWISE)) == set[Any]().union(*map(pairs, product()))
    assert len(PAIRWISE) < len(product()) / 5
