"""The schedule alone, on a pretended memory."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import pytest
from hypothesis import given
from hypothesis import strategies as st

from truekv import Refused, SamplingParams
from truekv.core.batch import Sequence
from truekv.engine.activations import Parts
from truekv.engine.request import Request
from truekv.engine.schedule import AGEING, PATIENCE, Schedule, Share

if TYPE_CHECKING:
    from collections.abc import Iterator

PAGE = 16


@dataclass
class Pretended:
    """Pages that are counted and hold nothing."""

    free: int
    draft_limits: dict[int, int] = field(default_factory=dict[int, int])
    stop_every: int = 1 << 20

    @property
    def available_pages(self) -> int:
        return self.free

    def new_pages(self, request: Request) -> int:
        return self.pages_for(len(request.tokens) + 1)

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // PAGE)

    def certain_limit(self, sequence: Sequence) -> int:
        return self.stop_every - sequence.position % self.stop_every

    def draft_limit(self, sequence: Sequence) -> int:
        return self.draft_limits.get(id(sequence), 1 << 20)

    def release(self, request: Request) -> None:
        assert request.held is not None
        self.free += len(request.held.pages)
        request.held = None

    def store(self, share: Share, accepted: int) -> None:
        """Do what a step does: take the pages of all lines, give back those beyond the real tokens."""
        held = share.request.held
        assert held is not None
        missing = self.pages_for(held.position + share.lines) - len(held.pages)
        self.free -= max(0, missing)
        assert self.free >= 0
        held.pages.extend([0] * missing)
        held.position += share.count + accepted
        kept = self.pages_for(held.position)
        self.free += len(held.pages) - kept
        del held.pages[kept:]


def request(identity: int, prompt: int, limit: int, priority: int = 0) -> Request:
    tokens = list(range(prompt))
    return Request(identity, tuple(tokens), SamplingParams(max_tokens=limit), limit, priority, tokens=tokens)


def schedule(pages: int = 100, sequences: int = 3, step_tokens: int = 64, draft_room: int = 0) -> Schedule:
    return Schedule(pages=pages, page_tokens=PAGE, sequences=sequences, step_tokens=step_tokens, draft_room=draft_room)


def admit(engine: Schedule, memory: Pretended) -> list[int]:
    admitted: list[int] = []
    while item := engine.admit(memory):
        item.held = Sequence()
        admitted.append(item.identity)
    return admitted


def turns(engine: Schedule, memory: Pretended, accept: int = 0) -> Iterator[dict[int, int]]:
    """Yield {request: certain tokens} of each step until all have ended; `accept` of the drafts are right."""
    while engine.running or engine.waiting:
        admit(engine, memory)
        shares = engine.shares(memory)
        assert len(engine.running) <= engine.sequences
        assert 0 < sum(share.count + len(share.drafts) for share in shares) <= engine.step_tokens
        assert len({share.request.identity for share in shares}) == len(shares)
        yield {share.request.identity: share.count for share in shares}
        for share in shares:
            item = share.request
            pending = item.pending
            good = min(accept, len(share.drafts))
            memory.store(share, good)
            assert share.samples == (share.count == pending)
            assert not share.drafts or share.samples
            if share.samples:
                item.tokens += [0] * (good + 1)
                assert len(item.generated) <= item.limit
                if not item.remaining:
                    memory.release(item)
                    engine.end(item)
    assert memory.free == engine.pages


def play(engine: Schedule, requests: list[Request], memory: Pretended | None = None) -> list[dict[int, int]]:
    for item in requests:
        engine.add(item)
    return list(turns(engine, memory or Pretended(engine.pages)))


@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 12), st.integers(-1, 1)), min_size=1, max_size=8),
    st.integers(4, 12),
    st.integers(1, 4),
    st.integers(1, 30),
    st.integers(0, 3),
    st.integers(0, 2),
    st.sampled_from((5, 16, 1 << 20)),
)
def test_every_request_ends_whatever_memory_and_budget(
    sizes: list[tuple[int, int, int]],
    pages: int,
    sequences: int,
    step_tokens: int,
    guesses: int,
    room: int,
    stop_every: int,
) -> None:
    engine = schedule(pages, sequences, step_tokens, room)
    requests = [request(index, *size) for index, size in enumerate(sizes)]
    for item in requests:
        item.guess = [0] * guesses
        engine.add(item)
    for count, _ in enumerate(turns(engine, Pretended(pages, stop_every=stop_every), accept=2)):
        assert count < 20_000
    assert [len(item.generated) for item in requests] == [limit for _, limit, _ in sizes]


def test_a_long_prompt_does_not_stall_an_answer_under_way() -> None:
    steps = play(schedule(sequences=2, step_tokens=8), [request(0, 4, 20), request(1, 60, 2)])
    assert steps[0] == {0: 4, 1: 4}
    # Request 0 gets its token in every step while the other's prompt is stored with what is left.
    assert steps[1:9] == [{0: 1, 1: 7}] * 8


def test_an_answer_under_way_goes_before_an_earlier_prompt() -> None:
    steps = play(schedule(sequences=2, step_tokens=8), [request(0, 60, 2), request(1, 1, 20)])
    assert steps[:8] == [{1: 1, 0: 7}] * 8


def test_a_prompt_starves_no_longer_than_patience_lasts() -> None:
    # Three answers take all of a step of three tokens, yet the prompt is stored.
    requests = [request(index, 1, 200) for index in range(3)]
    steps = play(schedule(sequences=4, step_tokens=3), [*requests, request(3, 9, 1)])
    first = next(index for index, step in enumerate(steps) if 3 in step)
    assert first <= PATIENCE + 2


def test_first_come_is_first_served_even_if_a_later_one_would_fit() -> None:
    engine, memory = schedule(pages=4), Pretended(4)
    for item in (request(0, 20, 10), request(1, 50, 10), request(2, 1, 1)):
        engine.add(item)
    assert admit(engine, memory) == [0]


def test_priority_decides_who_enters_and_whose_memory_is_taken() -> None:
    engine, memory = schedule(pages=5, sequences=2), Pretended(5)
    for item in (request(0, 20, 30), request(1, 20, 30, priority=-1), request(2, 20, 30, priority=-2)):
        engine.add(item)
    seen = list(turns(engine, memory))
    assert set(seen[0]) == {1, 2}
    assert engine.preemptions > 0
    ends = [max(index for index, step in enumerate(seen) if identity in step) for identity in range(3)]
    assert ends[2] < ends[1] < ends[0]


def test_whoever_waits_long_enough_goes_first() -> None:
    engine, memory = schedule(pages=8, sequences=1), Pretended(8)
    low = request(0, 4, 4, priority=1)
    engine.add(low)
    engine.add(request(1, 4, 4))
    identity, steps = 2, 0
    running = turns(engine, memory)
    while low.remaining:
        next(running)
        steps += 1
        # There is always another one of a higher priority.
        if len(engine.waiting) < 2:
            engine.add(request(identity, 4, 4))
            identity += 1
        assert steps < 2 * AGEING
    assert steps > AGEING // 2


def test_when_pages_run_out_the_last_one_computes_again() -> None:
    engine, memory = schedule(pages=4, sequences=2), Pretended(4)
    requests = [request(0, 16, 33), request(1, 16, 33)]
    steps = play(engine, requests, memory)
    assert engine.preemptions == 1
    # It stores its own answer so far once more, in one step, and is sampled from at its end.
    assert any(step.get(1, 0) > 16 for step in steps)
    # The first one took part in every step until it ended.
    assert all(0 in step for step in steps[:33])


def test_guesses_give_way_before_anybody_loses_memory() -> None:
    engine, memory = schedule(pages=3, sequences=2, draft_room=2), Pretended(3)
    requests = [request(0, 15, 8), request(1, 15, 8)]
    for item in requests:
        item.guess = [0, 0, 0, 0]
        engine.add(item)
    assert admit(engine, memory) == [0, 1]
    for share in engine.shares(memory):
        memory.store(share, 0)
        share.request.tokens.append(0)
    first, second = engine.shares(memory)
    # A page is left for the guesses of one; the other goes on without.
    assert (first.count, first.drafts, first.room) == (1, [0] * 4, 2)
    assert (second.count, second.drafts, second.room) == (1, [], 0)
    assert engine.preemptions == 0


def test_guesses_never_exceed_the_answer_the_budget_or_a_boundary() -> None:
    engine, memory = schedule(sequences=2, step_tokens=6), Pretended(100)
    first, second = request(0, 1, 30), request(1, 1, 3)
    for item in (first, second):
        item.guess = [0] * 9
        engine.add(item)
    admit(engine, memory)
    shares = {share.request.identity: share for share in engine.shares(memory)}
    # One token of each, four more of budget; the later one may still generate three.
    assert len(shares[0].drafts) == 4
    assert len(shares[1].drafts) == 0
    assert first.held is not None
    memory.draft_limits[id(first.held)] = 1
    shares = {share.request.identity: share for share in engine.shares(memory)}
    assert len(shares[0].drafts) == 1
    assert len(shares[1].drafts) == 2


def test_a_chunk_ends_where_a_state_is_to_be_kept() -> None:
    engine, memory = schedule(sequences=1, step_tokens=64), Pretended(100, stop_every=48)
    steps = play(engine, [request(0, 100, 1)], memory)
    assert [step[0] for step in steps] == [48, 48, 4]


def test_what_can_never_run_is_refused_with_numbers() -> None:
    engine = schedule(pages=2, sequences=1)
    engine.add(request(0, 30, 3))
    with pytest.raises(Refused, match=r"needs 33 tokens of KV cache \(3 pages\), but the cache has 2 pages of 16"):
        engine.add(request(1, 30, 4))


def test_a_suspect_runs_alone() -> None:
    engine, memory = schedule(pages=20), Pretended(20)
    requests = [request(index, 5, 4) for index in range(3)]
    for item in requests:
        engine.add(item)
    admit(engine, memory)
    requests[1].alone = requests[2].alone = 5
    assert [share.request.identity for share in engine.shares(memory)] == [1]
    requests[1].alone = 0
    assert [share.request.identity for share in engine.shares(memory)] == [2]
    requests[2].alone = 0
    assert len(engine.shares(memory)) == 3


def left_to_merge(parts: Parts, shares: list[Share], memory: Pretended) -> int:
    """What attention on a GPU would leave to be merged in a step of these shares."""
    lines = [share.count + len(share.drafts) for share in shares]
    ends = [share.request.held.position + share.lines for share in shares if share.request.held]
    return parts.of(sum(lines), max(lines), memory.pages_for(max(ends)))


@given(
    prompts=st.lists(st.sampled_from([1, 3, 9, 40, 50, 200]), min_size=3, max_size=9),
    group=st.sampled_from([1, 4, 16]),
    drafts=st.sampled_from([0, 3]),
)
def test_no_step_leaves_more_to_be_merged_than_was_planned(prompts: list[int], group: int, drafts: int) -> None:
    sequences, step_tokens, memory = 6, 256, Pretended(4000)
    widest = memory.pages_for(9000 + 40)
    parts = Parts(group, PAGE).planned(sequences, 1 + drafts, step_tokens, widest)
    engine = Schedule(
        pages=4000, page_tokens=PAGE, sequences=sequences, step_tokens=step_tokens, drafts=drafts, parts=parts
    )
    shares = engine.shares

    def seen(given: Pretended) -> list[Share]:
        for item in engine.running:
            item.guess = [0] * drafts
        found = shares(given)
        assert left_to_merge(parts, found, memory) <= parts.most
        return found

    engine.shares = seen  # type: ignore[assignment, method-assign]
    items = [request(index, tokens, 20) for index, tokens in enumerate([9000, *prompts])]
    play(engine, items, memory)
    assert all(len(item.generated) == 20 for item in items)


def test_prompts_wait_for_one_another_beside_a_long_context_alone() -> None:
    for depth, together in ((9000, 1), (200, 5)):
        memory = Pretended(4000)
        parts = Parts(1, PAGE).planned(6, 1, 256, memory.pages_for(9100))
        engine = Schedule(pages=4000, page_tokens=PAGE, sequences=6, step_tokens=256, parts=parts)
        long = request(0, depth + 1, 8)
        engine.add(long)
        admit(engine, memory)
        long.held = Sequence(position=depth, pages=array("q", [0]) * memory.pages_for(depth))
        memory.free -= memory.pages_for(depth)
        for index in range(1, 6):
            engine.add(request(index, 40, 4))
        admit(engine, memory)
        shares = engine.shares(memory)
        assert [share.request.identity for share in shares] == list(range(together + 1))
        assert left_to_merge(parts, shares, memory) <= parts.most
