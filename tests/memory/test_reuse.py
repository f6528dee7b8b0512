"""Any order of open, step, draft, reject, preempt, abort, hit and evict: outputs equal a run without a cache.

Every request follows one of a few texts that begin alike, so one plain run of each text is the oracle.
"""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule, run_state_machine_as_test
from memory.toys import Toy, formats_of, gdn, gqa, mamba2, mla, model_spec, random_tokens

from truekv.core.batch import Chunk, Sequence
from truekv.kernels.table import select
from truekv.memory.arena import Arena, OutOfPages
from truekv.memory.plan import plan

if TYPE_CHECKING:
    from truekv.kernels.table import Kernels
    from truekv.memory.plan import MemoryPlan

TOYS = {
    "gqa": Toy((gqa(1, 16), gqa(1, 16, window=9))),
    "mla": Toy((mla(16, 16),)),
    "gdn": Toy((gdn(1, 1, 4, 4), gqa(1, 16))),
    "mamba2": Toy((gqa(1, 16, window=40), mamba2(1, 4, 1, 4))),
}
DRAFTS, SLOTS, PAGES, CHECKPOINTS, LENGTH = 3, 3, 6, 3, 100
ENDS = ("close", "preempt", "close", "close", "preempt", "close", "suspect", "empty")
# They part inside a page, at its edge, and one token behind it.
STEM, OTHER = random_tokens(LENGTH, seed=1), random_tokens(LENGTH, seed=2)
TEXTS = tuple(
    (*stem[:shared], (stem[shared] + 1) % 64, *random_tokens(LENGTH - 1 - shared, seed=shared))
    for stem, shared in ((STEM, 99), (STEM, 70), (STEM, 64), (STEM, 45), (STEM, 33), (OTHER, 99), (OTHER, 31))
)


@functools.cache
def planned(toy: Toy) -> tuple[MemoryPlan, Kernels]:
    spec, formats = model_spec(toy.layers), formats_of(toy.layers)
    asked = {"max_model_len": LENGTH, "max_num_seqs": SLOTS, "drafts": DRAFTS}
    asked["checkpoints"] = CHECKPOINTS * any(not formats for formats in formats)
    roomy = plan(spec, formats, **asked)
    less = (PAGES - roomy.pages) * roomy.page_bytes
    return plan(spec, formats, memory=roomy.total_bytes + less, **asked), select(spec, formats)


@dataclass(eq=False)
class Reader:
    """One request: it follows its text, whatever happens to its memory."""

    text: tuple[int, ...]
    salt: str
    sequence: Sequence
    known: int
    """Tokens that were given or sampled; memory holds fewer."""
    pending: tuple[int, int] | None = None
    """(certain tokens, right drafts) of the step under way."""


class Requests(RuleBasedStateMachine):
    """Requests of few texts in little memory, so that they hit, evict and reject all the time."""

    toy: Toy
    seen: Counter[str]

    def __init__(self) -> None:
        super().__init__()
        plan, kernels = planned(self.toy)
        self.arena = Arena(model_spec(self.toy.layers), plan, kernels, poison=True, prefix_interval=64)
        self.open: list[Reader] = []
        self.salts: set[str] = set()

    @initialize(texts=st.lists(st.sampled_from(TEXTS), max_size=2))
    def fill(self, texts: list[tuple[int, ...]]) -> None:
        """Let some requests run before all others, so that there is something to hit and to evict."""
        for text in texts:
            self.open_one(text, LENGTH - 3, 0)
            while self.open:
                self.run(0)
                self.advance(0)

    @precondition(lambda self: len(self.open) < SLOTS)
    @rule(text=st.sampled_from(TEXTS), length=st.sampled_from((97, 65, 30, 62, 46, 33, 94, 1)), odd=st.integers(0, 15))
    def open_one(self, text: tuple[int, ...], length: int, odd: int) -> None:
        salt, reuse = "other" if odd == 1 else "", odd != 2
        sequence = self.arena.open(text[:length], salt=salt, reuse=reuse)
        self.open.append(Reader(text, salt, sequence, length))
        assert sequence.position < length
        assert salt in self.salts or not sequence.position
        self.salts.add(salt)
        assert reuse or not sequence.position
        self.verify()

    @precondition(lambda self: any(not item.pending for item in self.open))
    @rule(moves=st.lists(st.integers(0, (1 << 30) - 1), min_size=1, max_size=4), stays=st.integers(0, 3))
    def run_steps(self, moves: list[int], stays: int) -> None:
        for move in moves[:-1]:
            self.run(move)
            self.advance(move & 1)
        self.run(moves[-1])
        if stays:
            self.advance(0)
        self.verify()

    def run(self, moves: int) -> None:
        turn: list[Reader] = []
        chunks: list[Chunk] = []
        for place, item in enumerate(self.open):
            chunk = None if item.pending else self.chunk(item, moves >> 10 * place)
            if chunk:
                turn.append(item)
                chunks.append(chunk)
        if not chunks:
            return
        ends = [chunk.sequence.position + len(chunk.tokens) for chunk in chunks]
        needed = sum(-(-end // 32) - len(chunk.sequence.pages) for end, chunk in zip(ends, chunks, strict=True))
        try:
            step = self.arena.reserve(chunks)
        except OutOfPages:
            assert needed > self.arena.available_pages
            self.seen["full"] += 1
            for item in turn:
                item.pending = None
            return
        assert needed <= self.arena.plan.pages
        out = self.toy.forward(step, self.arena.layers)
        for item, chunk, got in zip(turn, chunks, out.split([len(chunk.tokens) for chunk in chunks]), strict=True):
            assert item.pending
            start, count = item.sequence.position, sum(item.pending)
            # What is made of a wrong draft decides nothing: the draft before it was rejected.
            assert torch.equal(got[:count], self.toy.plain(item.text)[start : start + count])
            if len(chunk.tokens) != count:
                self.seen["rejection"] += 1

    def chunk(self, item: Reader, move: int) -> Chunk | None:
        """Draw what a reader brings: skipped or not, within what the cache asks for or not, drafts right or wrong."""
        arena, sequence, start = self.arena, item.sequence, item.sequence.position
        if move & 7 == 7:
            return None
        heeds = move >> 3 & 3 != 3
        certain = min((97, 1, 32, 31, 33, 5, 64, 2)[move >> 5 & 7], item.known - start)
        if heeds:
            certain = min(certain, arena.certain_limit(sequence))
        drafts = 0
        if start + certain == item.known:
            drafts = min(move & 3, LENGTH - item.known)
            if heeds:
                drafts = min(drafts, arena.draft_limit(sequence) if certain == 1 else 0)
        right = min(drafts, move >> 8 & 3)
        item.pending = certain, right
        tokens = list(item.text[start : start + certain + drafts])
        for place in range(certain + right, len(tokens)):
            tokens[place] = (tokens[place] + 1) % 64
        return Chunk(sequence, tokens, drafts)

    @precondition(lambda self: any(item.pending for item in self.open))
    @rule(fewer=st.integers(0, 2))
    def advance_all(self, fewer: int) -> None:
        self.advance(fewer)
        self.verify()

    def advance(self, fewer: int) -> None:
        for item in [item for item in self.open if item.pending]:
            assert item.pending
            certain, right = item.pending
            self.arena.advance(item.sequence, certain + max(0, right - fewer))
            item.pending = None
            item.known = max(item.known, item.sequence.position + 1)
            if item.known > LENGTH:
                self.open.remove(item)
                self.arena.close(item.sequence)

    @precondition(lambda self: self.open)
    @rule(place=st.integers(0, SLOTS - 1), how=st.sampled_from(ENDS))
    def end_one(self, place: int, how: str) -> None:
        item = self.open[place % len(self.open)]
        self.seen["abort" if item.pending else how] += 1
        if how == "empty":
            self.arena.drop_cache()
            assert self.arena.cached_pages == 0
        elif how == "preempt":
            self.arena.close(item.sequence)
            item.sequence, item.pending = self.arena.open(item.text[: item.known], salt=item.salt), None
        else:
            self.arena.close(item.sequence, suspect=how == "suspect")
            self.open.remove(item)
        self.verify()

    def verify(self) -> None:
        arena = self.arena
        arena.check()
        assert arena.free_pages + arena.held_pages + arena.cached_pages == PAGES
        assert arena.free_slots + len(self.open) == SLOTS

    def teardown(self) -> None:
        arena = self.arena
        self.seen += Counter(
            hit=arena.prefix.hits, page=arena.prefix.evicted_pages, state=arena.prefix.evicted_checkpoints
        )
        for item in self.open:
            arena.close(item.sequence)
        arena.drop_cache()
        arena.check()
        assert (arena.free_pages, arena.free_slots, arena.held_pages) == (PAGES, SLOTS, 0)
        assert all((layer.data == 0xFF).all() for layer in arena._paged())
        assert all(torch.isnan(slab).all() for layer in arena._states() for slab in layer.state.values())


@pytest.mark.parametrize("part", [1, 2])
@pytest.mark.parametrize("name", sorted(TOYS))
def test_requests_that_share_memory_compute_what_each_computes_alone(name: str, part: int) -> None:
    seen = Counter[str]()
    machine = type(f"{name.title()}{part}", (Requests,), {"toy": TOYS[name], "seen": seen})
    # In all 2,000 examples; the profile "campaign" makes it 100,000.
    examples = settings.default.max_examples * 5 // 2
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    happened = {"hit", "page", "rejection", "close", "preempt", "abort", "suspect", "empty"}
    assert not happened - set(seen), seen
    assert ("state" in seen) == (name in {"gdn", "mamba2"})
