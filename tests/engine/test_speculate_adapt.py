"""How many drafts are asked for follows what was accepted, and wastes little where nothing is."""

from __future__ import annotations

import itertools
import random

import pytest

from truekv.engine.speculate.adapt import DraftLength

COST = 0.3


def follow(length: DraftLength, steps: int, chance: float, seed: int = 0) -> tuple[list[int], int]:
    """Verify drafts that are right with a chance each; return what was asked for and how many tokens came out."""
    source = random.Random(seed)
    asked: list[int] = []
    tokens = 0
    for _ in range(steps):
        count = length.ask()
        accepted = 0
        while accepted < count and source.random() < chance:
            accepted += 1
        length.report(count, accepted)
        asked.append(count)
        tokens += 1 + accepted
    return asked, tokens


@pytest.mark.parametrize("most", [1, 3, 8])
@pytest.mark.parametrize("tokens", [16, 50, 250, 2000])
def test_where_nothing_is_accepted_it_costs_less_than_five_percent(most: int, tokens: int) -> None:
    length = DraftLength(most, COST)
    asked, _ = follow(length, tokens, 0.0)
    assert 1 / (1 + length.cost * sum(asked) / tokens) > 0.95
    assert sum(asked[-200:]) >= 1 or tokens < 200, "it still probes"
    assert max(asked) == 1


def test_pauses_grow_and_end() -> None:
    asked, _ = follow(DraftLength(4, COST), 1000, 0.0)
    probes = [step for step, count in enumerate(asked) if count]
    pauses = [after - before - 1 for before, after in itertools.pairwise(probes)]
    assert pauses == [0, 16, 32, 64, *[128] * len(pauses[4:])]
    assert len(pauses) > 7


def test_it_asks_for_all_soon_when_all_are_accepted() -> None:
    asked, tokens = follow(DraftLength(5, COST), 20, 1.0)
    assert asked[0] == 1
    assert asked == sorted(asked)
    assert set(asked[6:]) == {5}
    assert tokens == 20 + sum(asked)


def test_it_comes_back_after_a_long_time_without_luck() -> None:
    length = DraftLength(3, COST)
    follow(length, 1000, 0.0)
    asked, _ = follow(length, 140, 1.0)
    first = next(step for step, count in enumerate(asked) if count)
    assert first <= 128
    assert set(asked[first + 6 :]) == {3}


@pytest.mark.parametrize("chance", [0.3, 0.5, 0.7, 0.9, 0.97])
def test_it_beats_plain_steps_and_keeps_up_with_the_best_fixed_length(chance: float) -> None:
    """Speed in tokens per time, where a step takes 1 and each draft in it `cost` more."""
    length = DraftLength(6, COST)
    asked, tokens = follow(length, 4000, chance)
    speed = tokens / (len(asked) + length.cost * sum(asked))
    fixed = [
        sum(chance**draft for draft in range(count + 1)) / (1 + length.cost * count) for count in range(length.most + 1)
    ]
    assert speed > 0.9 * max(fixed)
    assert speed > 0.97


def test_the_same_history_asks_the_same() -> None:
    assert follow(DraftLength(4, COST), 300, 0.6, seed=1) == follow(DraftLength(4, COST), 300, 0.6, seed=1)


def test_a_step_without_drafts_teaches_nothing() -> None:
    length = DraftLength(4, COST)
    before = (length.rate, length.ask())
    length.report(0, 0)
    assert (length.rate, length.ask()) == before
