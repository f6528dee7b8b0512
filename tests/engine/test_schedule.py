from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truekv import Refused, SamplingParams
from truekv.core.batch import Sequence
from truekv.engine.schedule import Request, Schedule


def request(identity: int, prompt: int, limit: int) -> Request:
    tokens = list(range(prompt))
    return Request(identity, tuple(tokens), SamplingParams(max_tokens=limit), limit, tokens)


def play(schedule: Schedule, requests: list[Request]) -> list[dict[int, int]]:
    """Run all requests to their full length on a pretended memory; returns {request: tokens} of each step."""
    for item in requests:
        schedule.add(item)
    steps: list[dict[int, int]] = []
    while schedule.running or schedule.waiting:
        for item in schedule.admit():
            item.held = Sequence()
        shares = schedule.shares()
        held = sum(-(-item.most_tokens // schedule.page_tokens) for item in schedule.running)
        assert held <= schedule.pages
        assert len(schedule.running) <= schedule.sequences
        assert 0 < sum(share.count for share in shares) <= schedule.step_tokens
        assert len({share.request.identity for share in shares}) == len(shares)
        steps.append({share.request.identity: share.count for share in shares})
        for share in shares:
            assert share.request.held is not None
            share.request.held.position += share.count
            assert share.samples == (share.request.pending == 0)
            if share.samples:
                share.request.tokens.append(0)
                if len(share.request.generated) == share.request.limit:
                    assert share.request.held.position == share.request.most_tokens
                    schedule.end(share.request)
    return steps


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12)), min_size=1, max_size=8),
    st.integers(4, 12),
    st.integers(1, 4),
    st.integers(1, 30),
)
def test_every_request_ends_and_no_step_takes_more_than_there_is(
    sizes: list[tuple[int, int]], pages: int, sequences: int, step_tokens: int
) -> None:
    schedule = Schedule(pages=pages, page_tokens=16, sequences=sequences, step_tokens=step_tokens)
    requests = [request(index, *size) for index, size in enumerate(sizes)]
    steps = play(schedule, requests)
    assert [len(item.generated) for item in requests] == [limit for _, limit in sizes]
    for item in requests:
        assert sum(step.get(item.identity, 0) for step in steps) == item.most_tokens


def test_a_long_prompt_does_not_stall_an_answer_under_way() -> None:
    schedule = Schedule(pages=100, page_tokens=16, sequences=2, step_tokens=8)
    steps = play(schedule, [request(0, 4, 20), request(1, 60, 2)])
    assert steps[0] == {0: 4, 1: 4}
    # Request 0 gets its token in every step while the other's prompt is stored with what is left.
    assert steps[1:9] == [{0: 1, 1: 7}] * 8


def test_an_answer_under_way_goes_before_an_earlier_prompt() -> None:
    schedule = Schedule(pages=100, page_tokens=16, sequences=2, step_tokens=8)
    steps = play(schedule, [request(0, 60, 2), request(1, 1, 20)])
    assert steps[:8] == [{1: 1, 0: 7}] * 8


def test_first_come_is_first_served_even_if_a_later_one_would_fit() -> None:
    schedule = Schedule(pages=4, page_tokens=16, sequences=3, step_tokens=64)
    for item in (request(0, 20, 10), request(1, 50, 10), request(2, 1, 1)):
        schedule.add(item)
    assert [item.identity for item in schedule.admit()] == [0]
    assert schedule.admit() == []


def test_what_can_never_run_is_refused_with_numbers() -> None:
    schedule = Schedule(pages=2, page_tokens=16, sequences=1, step_tokens=8)
    schedule.add(request(0, 30, 3))
    with pytest.raises(Refused, match=r"needs 33 tokens of KV cache \(3 pages\), but the cache has 2 pages of 16"):
        schedule.add(request(1, 30, 4))


def test_a_suspect_runs_alone() -> None:
    schedule = Schedule(pages=20, page_tokens=16, sequences=3, step_tokens=64)
    requests = [request(index, 5, 4) for index in range(3)]
    for item in requests:
        schedule.add(item)
    for item in schedule.admit():
        item.held = Sequence()
    requests[1].alone = requests[2].alone = 5
    assert [share.request.identity for share in schedule.shares()] == [1]
    requests[1].alone = 0
    assert [share.request.identity for share in schedule.shares()] == [2]
    requests[2].alone = 0
    assert len(schedule.shares()) == 3
