"""The invariants of memory and of steps, each as small as it can be and still fail under its mutants.

Every engine here runs on poisoned memory, and whatever becomes real is compared with the oracle: the logits of
each position, the bytes stored for it, the state after it, and after each step that every page is accounted for.
"""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Final

import pytest
import torch
from exact.paths import DRAWN, GREEDY, PROMPTS, PUNISHED, TAKEN, Scripted, Watch, drawn

from truekv.core.batch import Chunk
from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from exact.paths import Wave
    from exact.stage import Stage

    from truekv.engine.request import Request
    from truekv.engine.speculate.drafting import Verified

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
HYBRIDS: Final = ("gdn", "mamba2")


def taken(stage: Stage, model: str, *features: str, cache_format: str = "int8") -> None:
    counts = stage.play(model, frozenset(features), cache_format)
    for feature in features:
        assert TAKEN[feature](counts), f"{feature} was asked for and did not happen: {counts}"


def test_one_request_after_the_other_starts_from_nothing(stage: Stage) -> None:
    taken(stage, "gdn")


def test_a_prompt_in_chunks_is_a_prompt_in_one(stage: Stage) -> None:
    for model in ("gdn", "mla"):
        taken(stage, model, "chunked")


def test_companions_change_nothing(stage: Stage) -> None:
    for model in ("dense", "mamba2"):
        taken(stage, model, "batched")


def test_whoever_loses_memory_goes_on_as_if_nothing_had_happened(stage: Stage) -> None:
    taken(stage, "gdn", "batched", "preempted")
    taken(stage, "gdn", "batched", "robbed")


def test_drafts_change_no_sampled_token(stage: Stage) -> None:
    taken(stage, "dense", "drafted")


def test_the_second_turn_starts_from_the_first(stage: Stage) -> None:
    taken(stage, "gdn", "prefix")
    taken(stage, "mla", "prefix")


def test_guesses_of_the_prediction_head_change_nothing(stage: Stage) -> None:
    taken(stage, "gdn", "mtp", "batched")


class Uneven(Scripted):
    """As many drafts as the identity and the length of the request decide."""

    def follow(self, verified: Sequence[Verified], hidden: torch.Tensor) -> None:
        super().follow(verified, hidden)
        for item in verified:
            request = item.share.request
            request.guess = request.guess[: (request.identity + len(request.generated)) % (self.count + 1)]


def test_a_replayed_step_computes_with_its_own_contents(stage: Stage) -> None:
    taken(stage, "dense", "captured", "batched", "drafted")
    # Rows become fewer in a step of as many tokens, so that rows of the step before would be left over.
    engine = stage.llm("gdn", frozenset({"captured", "batched", "drafted"}))._engine
    watch = Watch(engine, oracle := stage.oracle("gdn"))
    engine.drafting = Uneven(oracle, lambda request: len(request.generated) % 2)
    wave = [(drawn(9, row), dataclasses.replace(GREEDY, max_tokens=8 + 4 * row)) for row in range(4)]
    watch.settle(watch.serve(wave, together=True), wave)
    assert engine.runner.forward.replays > engine.runner.forward.recorded


def accept_every_vector(stage: Stage, model: str, drafts: int, rows: int) -> None:
    """Verify drafts of `rows` requests at once, of which each accepts 0 to `drafts`: every vector of these once."""
    oracle = stage.oracle(model)
    vectors = list(itertools.product(range(drafts + 1), repeat=rows))
    engine = stage.llm(model, frozenset({"batched", "drafted"}))._engine
    watch = Watch(engine, oracle)
    length = 1 + sum(vector[0] + 1 for vector in vectors) + drafts
    params = dataclasses.replace(GREEDY, max_tokens=length)
    wave = [(drawn(7 + 3 * row, row), params) for row in range(rows)]
    assert len(wave[-1][0]) + length <= engine.max_model_len
    requests = [engine.add(*item) for item in wave]
    left: dict[int, list[int]] = {}

    def right(request: Request) -> int:
        return left[request.identity].pop(0) if left[request.identity] else 0

    for row, request in enumerate(requests):
        left[request.identity] = [vector[row] for vector in vectors]
    engine.drafting = Scripted(oracle, right, drafts)
    seen: list[tuple[int, ...]] = []
    engine.step()
    while any(left.values()) or len(seen) < len(vectors):
        before = [len(request.tokens) for request in requests]
        engine.step()
        seen.append(tuple(len(request.tokens) - old - 1 for request, old in zip(requests, before, strict=True)))
    assert seen == vectors
    assert watch.counts["accepted"] == sum(map(sum, vectors)) > 0
    assert watch.counts["rejected"] > 0
    for request in requests:
        engine.abort(request)
    watch.rest()


def test_every_vector_of_acceptance_in_a_gdn_hybrid(stage: Stage) -> None:
    accept_every_vector(stage, "gdn", 2, 2)


def test_every_vector_of_acceptance_in_a_mamba2_hybrid(stage: Stage) -> None:
    accept_every_vector(stage, "mamba2", 2, 2)


def test_every_vector_of_acceptance_in_rows_alone(stage: Stage) -> None:
    accept_every_vector(stage, "dense", 2, 2)
    accept_every_vector(stage, "mla", 2, 2)


@pytest.mark.campaign
@pytest.mark.parametrize(("drafts", "rows"), [(3, 2), (2, 3), (1, 4), (1, 1), (3, 1)])
@pytest.mark.parametrize("model", ["dense", "gdn", "mamba2", "mla"])
def test_every_vector_of_acceptance(stage: Stage, model: str, drafts: int, rows: int) -> None:
    accept_every_vector(stage, model, drafts, rows)


def test_rows_without_drafts_beside_rows_with_drafts(stage: Stage) -> None:
    for model in HYBRIDS:
        oracle, engine = stage.oracle(model), stage.llm(model, frozenset({"batched", "drafted"}))._engine
        watch = Watch(engine, oracle)
        scripted = Scripted(oracle, lambda request: len(request.generated) % 3)
        follow = scripted.follow

        def every_other(*arguments: object, follow: object = follow, engine: object = engine) -> None:
            follow(*arguments)
            for request in engine.schedule.running:
                if (request.identity + len(request.generated)) % 2:
                    request.guess = []

        scripted.follow = every_other
        engine.drafting = scripted
        wave = usual()
        watch.settle(watch.serve(wave, together=True), wave)
        assert TAKEN["drafted"](watch.counts)


def usual() -> Wave:
    return [(list(prompt), params) for prompt, params in PROMPTS]


def test_memory_may_be_lost_after_any_step(stage: Stage) -> None:
    wave = [(drawn(30, 1), PUNISHED), (drawn(35, 2), GREEDY)]
    oracle = stage.oracle("mamba2")
    steps = 0
    while True:
        engine = stage.llm("mamba2", frozenset({"batched", "chunked", "drafted"}))._engine
        watch = Watch(engine, oracle)
        engine.drafting = Scripted(oracle, lambda request: len(request.generated) % 4)

        def rob(_: object, watch: Watch = watch, last: int = steps) -> None:
            if watch.counts["steps"] == last and not watch.counts["robbed"]:
                watch.rob(began=False)

        watch.settle(watch.serve(wave, together=True, before=rob), wave)
        if watch.counts["steps"] <= steps:
            break
        assert watch.counts["robbed"] == (steps > 0)
        steps += 1
    assert steps > 4


def test_a_request_may_be_aborted_after_any_step(stage: Stage) -> None:
    wave = [(drawn(40, 1), GREEDY), (drawn(40, 1) + drawn(20, 2), DRAWN), (drawn(3, 3), GREEDY)]
    oracle = stage.oracle("gdn")
    for step in range(8):
        engine = stage.llm("gdn", frozenset({"batched", "chunked", "prefix", "drafted"}))._engine
        watch = Watch(engine, oracle)
        engine.drafting = Scripted(oracle, lambda request: len(request.generated) % 4)

        def abort(requests: list[Request], watch: Watch = watch, last: int = step) -> None:
            if watch.counts["steps"] == last:
                watch.engine.abort(requests[1])

        requests = watch.serve(wave, together=True, before=abort)
        answers = [oracle.answer(*item) for item in wave]
        assert [requests[0].generated, requests[2].generated] == [answers[0], answers[2]]
        assert requests[1].generated == answers[1][: len(requests[1].generated)]
        watch.rest()


def test_a_hit_is_a_miss_at_every_length(stage: Stage) -> None:
    for model, lengths in (("dense", (1, 2, 31, 32, 33, 47, 63, 64, 65, 70)), ("gdn", (1, 32, 33, 64, 65, 70))):
        hit_is_miss(stage, model, lengths)


@pytest.mark.campaign
@pytest.mark.parametrize("model", ["dense", "gdn", "mamba2", "mla"])
def test_a_hit_is_a_miss_at_each_and_every_length(stage: Stage, model: str) -> None:
    hit_is_miss(stage, model, range(1, 72))


def hit_is_miss(stage: Stage, model: str, lengths: Iterable[int]) -> None:
    """Prompts that share their first tokens with one that was served, for each number of shared tokens."""
    known = drawn(72, 5)
    short = dataclasses.replace(GREEDY, max_tokens=2)
    engine = stage.llm(model, frozenset({"prefix"}), pages=400)._engine  # nothing is evicted
    watch = Watch(engine, stage.oracle(model))
    watch.settle(watch.serve([(known, short)], together=False), [(known, short)])
    hits: set[int] = set()
    for length in lengths:
        wave = [([*known[:length], (known[length - 1] + 1 + length) % 64, *drawn(2, length)], short)]
        requests = watch.serve(wave, together=False)
        watch.settle(requests, wave)
        hit = requests[0].cached or 0
        assert hit <= length, "tokens were reused that differ"
        hits.add(hit)
        assert model != "dense" or hit == length, "tokens that are there were not reused"
    assert len(hits) > 2


def test_a_hit_needs_the_same_tokens(stage: Stage) -> None:
    wave = [(drawn(40, 5), GREEDY), (drawn(40, 5), GREEDY)]
    wave[1][0][3] += 1
    engine = stage.llm("dense", frozenset({"prefix"}))._engine
    watch = Watch(engine, stage.oracle("dense"))
    requests = watch.serve(wave, together=False)
    watch.settle(requests, wave)
    assert requests[1].cached == 3


def test_a_salt_keeps_conversations_apart(stage: Stage) -> None:
    engine = stage.llm("dense", frozenset({"prefix"}))._engine
    requests: list[Request] = []
    for salt in ("", "a", "b", "a", ""):
        requests.append(engine.add(drawn(40, 5), GREEDY, salt=salt))
        list(engine.run(requests[-1:]))
    assert [request.cached for request in requests] == [0, 0, 0, 39, 39]


def test_what_was_not_committed_is_not_published(stage: Stage) -> None:
    for model in ("dense", "gdn"):
        llm = stage.llm(model, frozenset({"prefix", "drafted"}))
        arena, forward = llm._engine.runner.arena, llm._engine.runner.model.forward
        tokens = drawn(70, 5)
        with torch.inference_mode():
            # Ends in the middle of a step.
            held = arena.open(tokens)
            forward(arena.reserve([Chunk(held, tokens[:32])]), arena.layers)
            arena.advance(held, 32)
            forward(arena.reserve([Chunk(held, tokens[32:64])]), arena.layers)
            arena.close(held)
            arena.check()
            held = arena.open(tokens)
            assert held.position == 32
            # Two of the three drafts are rejected: none of the three may be found.
            forward(arena.reserve([Chunk(held, tokens[32:63])]), arena.layers)
            arena.advance(held, 31)
            forward(arena.reserve([Chunk(held, tokens[63:67], drafts=3)]), arena.layers)
            arena.advance(held, 1)
            arena.check()
            arena.close(held)
            held = arena.open(tokens)
            assert held.position == 64
            arena.close(held)
