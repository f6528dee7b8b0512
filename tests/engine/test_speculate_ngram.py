"""Prompt lookup proposes what a naive scan would, at any length, and costs next to nothing."""

from __future__ import annotations

import random
import time

import pytest

from truekv.engine.speculate.ngram import Ngram


def naive(tokens: list[int], limit: int, longest: int, shortest: int) -> list[int]:
    for size in range(min(longest, len(tokens) - 1), shortest - 1, -1):
        for start in range(len(tokens) - size - 1, -1, -1):
            if tokens[start : start + size] == tokens[-size:]:
                text = list(tokens)
                for place in range(start + size, start + size + limit):
                    text.append(text[place])
                return text[len(tokens) :]
    return []


@pytest.mark.parametrize(("longest", "shortest"), [(4, 1), (3, 3), (1, 1), (6, 2), (64, 1)])
def test_it_proposes_what_a_naive_scan_finds_as_tokens_arrive(longest: int, shortest: int) -> None:
    source = random.Random(longest)
    found = nothing = 0
    for case in range(40):
        proposer, tokens = Ngram(longest, shortest), []
        # Few different tokens repeat themselves at once, many hardly ever.
        while len(tokens) < 60:
            tokens += [source.randrange(2 + 6 * (case % 7)) for _ in range(source.randint(0, 5))]
            proposed = proposer.propose(tokens, 5)
            assert proposed == naive(tokens, 5, longest, shortest), tokens
            found += bool(proposed)
            nothing += not proposed
    assert found > 50
    assert nothing > 10


def test_a_loop_is_guessed_as_far_as_one_may_guess() -> None:
    proposer = Ngram()
    assert proposer.propose([3, 9, 9, 9], 5) == [9] * 5
    assert Ngram().propose([3, 7, 8, 9, 7, 8, 9, 7, 8, 9], 7) == [7, 8, 9, 7, 8, 9, 7]


def test_long_texts_outgrow_the_first_array_and_are_the_same() -> None:
    source = random.Random(0)
    text = [source.randrange(3000) for _ in range(2500)]
    tokens = text + text[100:104]
    proposer = Ngram()
    for end in (1000, 1500, len(tokens)):
        assert proposer.propose(tokens[:end], 3) == naive(tokens[:end], 3, 4, 1)
    assert proposer.propose(tokens, 3) == text[104:107]


def test_a_text_that_shrank_or_changed_is_read_anew() -> None:
    proposer = Ngram()
    assert proposer.propose([5, 6, 7, 5, 6], 2) == [7, 5]
    assert proposer.propose([1, 2, 1], 4) == [2, 1, 2, 1]
    assert proposer.propose([8, 9, 3, 8, 9], 1) == [3]
    assert proposer.propose([], 3) == []
    assert proposer.propose([4], 3) == []


def test_a_token_of_32k_context_costs_less_than_a_millisecond() -> None:
    source = random.Random(0)
    tokens = [source.randrange(200) for _ in range(32_768)]
    proposer = Ngram()
    proposer.propose(tokens, 4)
    times: list[float] = []
    for _ in range(50):
        tokens.append(source.randrange(200))
        start = time.perf_counter()
        proposer.propose(tokens, 4)
        times.append(time.perf_counter() - start)
    assert sorted(times)[25] < 1e-3
