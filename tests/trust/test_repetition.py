"""What counts as an answer that goes round in circles, and what does not."""

from __future__ import annotations

import random

import pytest

from truekv.trust.repetition import DISTINCT, LEAST, PERIOD, REPEATS, WINDOW, Repetition

PROMPT = [1, 2, 3]


def first_alarm(answer: list[int], prompt: list[int] = PROMPT, stride: int = 1) -> int | None:
    """After how many tokens of an answer, shown `stride` at a time, the alarm is raised."""
    follower = Repetition()
    for end in range(stride, len(answer) + stride, stride):
        if follower.look([*prompt, *answer[:end]], len(prompt)):
            return min(end, len(answer))
    return None


def varied(count: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(count)]


@pytest.mark.parametrize("period", [1, 2, 3, 7, 16, 40, PERIOD])
def test_exact_repeats_raise_the_alarm_at_the_fourth(period: int) -> None:
    before, loop = varied(50), varied(period, seed=period)
    assert first_alarm(before + loop * 40) == len(before) + max(LEAST, REPEATS * period)


@pytest.mark.parametrize("word", ["aabb", "aaaaaaab", "abab" + "abac", "aab" * 3 + "c"])
def test_a_loop_that_repeats_itself_inside_is_found(word: str) -> None:
    alarm = first_alarm([ord(letter) for letter in word] * 20)
    assert alarm is not None
    # A wrong guess at the period costs one period at most.
    assert alarm <= max(LEAST, REPEATS * len(word)) + len(word)


def test_tokens_that_come_several_at_a_time_count_alike() -> None:
    answer = varied(30) + varied(5, seed=5) * 12
    alarm = first_alarm(answer)
    assert alarm is not None
    for stride in (2, 3, 8):
        assert first_alarm(answer, stride=stride) == -(-alarm // stride) * stride


def test_few_different_tokens_raise_the_alarm() -> None:
    rng = random.Random(0)
    assert first_alarm([rng.randrange(DISTINCT - 1) for _ in range(300)]) == WINDOW
    assert first_alarm([rng.randrange(DISTINCT + 6) for _ in range(300)]) is None


def test_lists_and_tables_raise_none() -> None:
    bullets = [token for row in range(60) for token in (7, 8, 100 + row, 9, 10, 11, 12)]
    table = [token for row in range(40) for token in (5, 200 + row, 5, 300 + row * row, 5, 6)]
    rule = [5, *[30, 5] * 10, 6]
    code = [token for row in range(30) for token in (40, 40, 40, 41, 42, 500 + row % 9, 43, 600 + row % 7, 44)]
    for text in (bullets, table, rule + table, code, varied(2000)):
        assert first_alarm(text) is None


def test_the_prompt_may_repeat_itself() -> None:
    assert first_alarm(varied(100), prompt=[5] * 500) is None
    assert first_alarm([5] * 500, prompt=[5] * 500) == LEAST


def test_memory_does_not_grow_with_the_answer() -> None:
    follower = Repetition()
    follower.look(varied(5000), 0)
    assert len(follower._seen) <= PERIOD
    assert sum(follower._counts.values()) == WINDOW
