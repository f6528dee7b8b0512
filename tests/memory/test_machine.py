"""Any order of open, reserve, advance and close, under poison: outputs equal a plain run, and nothing leaks."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from memory.toys import Toy, formats_of, gdn, gqa, mamba2, mla, model_spec, random_tokens

from truekv.core.batch import Chunk, Sequence
from truekv.kernels.table import select
from truekv.memory.arena import Arena, OutOfPages, OutOfSlots
from truekv.memory.plan import plan

LAYERS = (gdn(1, 2, 4, 4), gqa(1, 16), mamba2(2, 4, 1, 4), mla(16, 16), gqa(1, 16, window=9))
TOY = Toy(LAYERS)
DRAFTS, SLOTS, PAGES, CONTEXT = 3, 3, 6, 110


@dataclass(eq=False)
class Expected:
    """What the test itself knows of a sequence."""

    sequence: Sequence
    real: list[int] = field(default_factory=list[int])
    pending: list[int] = field(default_factory=list[int])
    drafts: int = 0


class Schedules(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 1 << 16))
    def start(self, seed: int) -> None:
        spec, formats = model_spec(LAYERS), formats_of(LAYERS)
        roomy = plan(spec, formats, max_model_len=CONTEXT, max_num_seqs=SLOTS, drafts=DRAFTS)
        memory = PAGES * roomy.page_bytes + SLOTS * roomy.state_bytes_per_sequence
        planned = plan(spec, formats, memory=memory, max_model_len=CONTEXT, max_num_seqs=SLOTS, drafts=DRAFTS)
        self.arena = Arena(spec, planned, select(spec, formats), poison=True)
        self.open: list[Expected] = []
        self.closed = 0
        self.seed = seed

    def tokens(self, count: int) -> list[int]:
        self.seed += 1
        return random_tokens(count, seed=self.seed)

    @rule()
    def open_one(self) -> None:
        try:
            self.open.append(Expected(self.arena.open()))
        except OutOfSlots:
            assert len(self.open) == SLOTS
        else:
            assert len(self.open) <= SLOTS

    @precondition(lambda self: any(not item.pending for item in self.open))
    @rule(data=st.data())
    def run_a_step(self, data: st.DataObject) -> None:
        idle = [item for item in self.open if not item.pending]
        turn = data.draw(st.lists(st.sampled_from(idle), min_size=1, unique=True))
        chunks: list[Chunk] = []
        for item in turn:
            count = data.draw(st.sampled_from((1, 1, 2, 4, 5, 31, 32, 33, 40)))
            count = min(count, CONTEXT - len(item.real))
            drafts = data.draw(st.integers(0, min(DRAFTS, count)))
            if count:
                chunks.append(Chunk(item.sequence, self.tokens(count), drafts))
        if not chunks:
            return
        turn = [item for item in turn if any(item.sequence is chunk.sequence for chunk in chunks)]
        needed = sum(-(-(len(item.real) + len(chunk.tokens)) // 32) for item, chunk in zip(turn, chunks, strict=True))
        held = sum(len(item.sequence.pages) for item in turn)
        try:
            step = self.arena.reserve(chunks)
        except OutOfPages:
            assert needed - held > self.arena.free_pages
            return
        out = TOY.forward(step, self.arena.layers)
        for item, chunk, got in zip(turn, chunks, out.split([len(chunk.tokens) for chunk in chunks]), strict=True):
            item.pending, item.drafts = chunk.tokens, chunk.drafts
            assert torch.equal(got, TOY.plain((*item.real, *chunk.tokens))[len(item.real) :])

    @precondition(lambda self: any(item.pending for item in self.open))
    @rule(data=st.data())
    def advance_one(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from([item for item in self.open if item.pending]))
        count = len(item.pending) - data.draw(st.integers(0, item.drafts))
        self.arena.advance(item.sequence, count)
        item.real += item.pending[:count]
        item.pending = []
        assert item.sequence.position == len(item.real)
        assert len(item.sequence.pages) == -(-len(item.real) // 32)

    @precondition(lambda self: self.open)
    @rule(data=st.data())
    def close_one(self, data: st.DataObject) -> None:
        item = data.draw(st.sampled_from(self.open))
        self.arena.close(item.sequence)
        self.open.remove(item)
        assert not item.sequence.pages
        assert item.sequence.slot == -1

    @invariant()
    def every_page_and_slot_is_free_or_held_once(self) -> None:
        if hasattr(self, "arena"):
            self.arena.check()
            assert self.arena.free_pages + self.arena.held_pages == PAGES
            assert self.arena.free_slots + len(self.open) == SLOTS

    def teardown(self) -> None:
        if hasattr(self, "arena"):
            for item in self.open:
                self.arena.close(item.sequence)
            self.arena.check()
            assert (self.arena.free_pages, self.arena.free_slots) == (PAGES, SLOTS)
            assert all((layer.data == 0xFF).all() for layer in self.arena._paged())
            assert all(torch.isnan(slab).all() for layer in self.arena._states() for slab in layer.state.values())


TestSchedules = Schedules.TestCase
TestSchedules.settings = settings(
    max_examples=100, stateful_step_count=16, deadline=None, suppress_health_check=list(HealthCheck)
)
