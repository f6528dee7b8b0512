"""Every mutant is noticed by the test that is named for it, which passes without it."""

from __future__ import annotations

import pytest
from exact.stage import Stage
from mutants.every import MUTANTS
from mutants.mutant import Mutant, noticed

from truekv.kernels.native.library import library

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("mutants"))


@pytest.fixture(scope="session")
def sound() -> set[tuple[object, ...]]:
    """The cases that have passed without any mutant."""
    return set()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_is_noticed(mutant: Mutant, stage: Stage, sound: set[tuple[object, ...]]) -> None:
    if mutant.missing:
        pytest.skip(mutant.missing)
    if mutant.case not in sound:
        error = mutant.without().run(stage)
        assert error is None, error
        sound.add(mutant.case)
    error = mutant.run(stage)
    assert error is not None, f"{mutant.test_name} did not notice: {mutant.breaks}"
    assert noticed(error), f"{mutant.test_name} broke down instead of noticing: {error!r}"


def test_there_are_as_many_as_were_promised() -> None:
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS) >= 50
    assert sum(mutant.test_name.startswith("kernels/") for mutant in MUTANTS) >= 12
