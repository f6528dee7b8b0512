from __future__ import annotations

import itertools
from typing import TYPE_CHECKING, Any

import pytest
import torch

from truekv import LLM, Corrupted, OutOfMemory, Refused, SamplingParams
from truekv.core.batch import Chunk
from truekv.core.options import Speculation
from truekv.engine.events import Ended, Failed, Sampled, Stored
from truekv.engine.run import Runner
from truekv.engine.speculate.mtp import Predictor

if TYPE_CHECKING:
    from pathlib import Path

    from truekv.engine.generate import Engine

PROMPTS = [list(range(10, 50)), [7], list(range(200, 135, -1)), [5, 6, 5, 6, 5, 6, 9]]
FREE = SamplingParams(max_tokens=12, ignore_eos=True, logprobs=20)


def engine_of(llm: LLM) -> Engine:
    return llm._engine


def assert_all_returned(llm: LLM) -> None:
    engine = engine_of(llm)
    arena = engine.runner.arena
    arena.check()
    # The padding of captured steps has a slot and a page.
    scratch = arena.plan.slots - llm.options.max_num_seqs
    assert (arena.plan.pages - arena.available_pages, arena.held_pages) == (scratch, scratch)
    assert arena.free_slots == llm.options.max_num_seqs
    assert not engine.schedule.running
    assert not engine.schedule.waiting
    assert not engine._answers


@pytest.fixture(scope="module", params=["dense", "hybrid"])
def directory(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


@pytest.fixture(scope="module", params=["f32", "int8"])
def llm(directory: Path, request: pytest.FixtureRequest) -> LLM:
    return LLM(str(directory), kv_cache_dtype=request.param, max_model_len=128, debug_poison=True)


def bar(llm: LLM) -> float:
    """How far logits may be apart: not at all with native kernels, whose rows know nothing of other rows.

    The reference's matrix products sum rows in an order that depends on how many there are. That is worth 1e-5
    here; with int8 it can push a value over a rounding border, worth 1e-3.
    """
    if llm._blueprint.kernels.backend == "native":
        return 0.0
    return 1e-4 if llm.options.kv_cache_dtype == "f32" else 1e-2


def rows_of(result: object) -> torch.Tensor:
    """The reported logprobs of each position as [positions, 20], ordered by token."""
    return torch.tensor([[item.logprob for item in place.top] for place in result.logprobs])


def test_greedy_is_the_argmax_of_teacher_forced_logits(llm: LLM) -> None:
    for prompt, result in zip(PROMPTS, llm.generate(PROMPTS, FREE), strict=True):
        logits = llm.logits(prompt + result.tokens)[len(prompt) - 1 : -1]
        assert logits.argmax(-1).tolist() == result.tokens
        logprobs = torch.log_softmax(logits, -1)
        for row, place in zip(logprobs, result.logprobs, strict=True):
            assert place.chosen.logprob == pytest.approx(float(row[place.chosen.token]), abs=5e-3)
            for item in place.top:
                assert item.logprob == pytest.approx(float(row[item.token]), abs=5e-3)
            assert sum(item.logprob for item in place.top) == pytest.approx(float(row.topk(20).values.sum()), abs=0.05)
    assert_all_returned(llm)


def test_a_batch_is_its_prompts_one_by_one(llm: LLM) -> None:
    together = llm.generate(PROMPTS, FREE)
    alone = [llm.generate(prompt, FREE)[0] for prompt in PROMPTS]
    assert [result.tokens for result in together] == [result.tokens for result in alone]
    # Tokens alone would not show a small leak between rows; the numbers behind them do.
    for first, second in zip(together, alone, strict=True):
        assert (rows_of(first) - rows_of(second)).abs().max() <= bar(llm)


@pytest.mark.parametrize("chunk", [1, 3, 32, 33, [31, 2, 5]])
def test_any_chunks_give_the_same_logits(llm: LLM, chunk: int | list[int]) -> None:
    tokens = PROMPTS[2]
    whole = llm.logits(tokens, chunk=len(tokens))
    assert whole.shape == (len(tokens), 320)
    assert whole.dtype == torch.float32
    assert (llm.logits(tokens, chunk=chunk) - whole).abs().max() <= bar(llm)
    assert_all_returned(llm)


def test_small_steps_change_no_answer(directory: Path) -> None:
    wide = LLM(str(directory), max_model_len=128)
    narrow = LLM(str(directory), max_model_len=128, max_num_batched_tokens=5, max_num_seqs=2)
    for first, second in zip(wide.generate(PROMPTS, FREE), narrow.generate(PROMPTS, FREE), strict=True):
        assert first.tokens == second.tokens
        assert (rows_of(first) - rows_of(second)).abs().max() < 1e-4
    assert_all_returned(narrow)


def test_the_same_seed_gives_the_same_tokens_in_any_company(llm: LLM) -> None:
    def params(seed: int) -> SamplingParams:
        return SamplingParams(max_tokens=12, temperature=1.2, top_p=0.95, seed=seed, ignore_eos=True)

    alone = llm.generate(PROMPTS[0], params(5))[0]
    company = llm.generate(
        [PROMPTS[2], PROMPTS[0], PROMPTS[0], PROMPTS[1]], [params(5), params(6), params(5), params(5)]
    )
    assert company[2].tokens == alone.tokens
    assert company[1].tokens != alone.tokens
    assert alone.seed == 5
    drawn = llm.generate(PROMPTS[0], SamplingParams(max_tokens=12, temperature=1.2, ignore_eos=True))[0]
    assert drawn.seed is not None
    again = SamplingParams(max_tokens=12, temperature=1.2, ignore_eos=True, seed=drawn.seed)
    assert llm.generate(PROMPTS[0], again)[0].tokens == drawn.tokens


def test_a_step_draws_in_one_call_what_depends_on_its_logits_alone(dense: Path) -> None:
    def answers(counted: list[int], **asked: Any) -> list[list[int]]:
        params = [SamplingParams(max_tokens=6, temperature=1.0, seed=seed, ignore_eos=True) for seed in range(3)]
        params.append(SamplingParams(max_tokens=6, temperature=1.0, seed=9, ignore_eos=True, **asked))
        llm = LLM(str(dense), max_model_len=128)
        tokens = [result.tokens for result in llm.generate(PROMPTS, params)]
        kernels = llm._blueprint.kernels
        assert {where for what, where in kernels.describe() if what.startswith("sample")} == {kernels.backend}
        counted += [kernels.calls["sample"], engine_of(llm).steps]
        return tokens

    plain, punished = list[int](), list[int]()
    together, apart = answers(plain), answers(punished, presence_penalty=1e-3)
    assert plain == [6, 6]
    # A penalty knows its tokens only when they are drawn: that request asks for each of them alone.
    assert punished == [12, 6]
    assert together == apart


def test_drafts_are_verified_with_logits_for_every_token(directory: Path) -> None:
    llm = LLM(
        str(directory), max_model_len=128, speculative_config=Speculation(num_speculative_tokens=3), debug_poison=True
    )
    runner, tokens = engine_of(llm).runner, PROMPTS[0]
    expected = llm.logits(tokens)
    for accepted in range(4):
        held = runner.arena.open()
        runner.step([Chunk(held, tokens[:20])], [0])
        # The guesses are right up to the accepted one; what was rejected must leave no trace.
        guesses = [token if place < accepted else 1 for place, token in enumerate(tokens[21:24])]
        (logits,) = runner.step([Chunk(held, [tokens[20], *guesses], drafts=3)], [4])
        assert not isinstance(logits, Corrupted)
        assert (logits[: accepted + 1] - expected[20 : 21 + accepted]).abs().max() < 1e-4
        runner.arena.advance(held, 1 + accepted)
        (rest,) = runner.step([Chunk(held, tokens[21 + accepted :])], [len(tokens) - 21 - accepted])
        assert not isinstance(rest, Corrupted)
        assert (rest - expected[21 + accepted :]).abs().max() < 1e-4
        runner.arena.close(held)
    assert_all_returned(llm)


def test_events_tell_the_story_in_order(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=128, max_num_batched_tokens=16)
    engine = engine_of(llm)
    request = engine.add(PROMPTS[0], SamplingParams(max_tokens=3, ignore_eos=True))
    events = list(engine.run([request]))
    assert [(event.done, event.total) for event in events if isinstance(event, Stored)] == [
        (16, 40),
        (32, 40),
        (40, 40),
    ]
    assert [type(event) for event in events[3:]] == [Sampled, Sampled, Sampled, Ended]
    assert events[-1].reason == "length"


def test_leaving_early_and_aborting_give_everything_back(llm: LLM) -> None:
    engine = engine_of(llm)
    requests = [engine.add(prompt, FREE) for prompt in PROMPTS]
    list(itertools.islice(engine.run(requests), 7))
    assert_all_returned(llm)
    requests = [engine.add(prompt, FREE) for prompt in PROMPTS]
    engine.step()
    engine.abort(requests[1])
    engine.abort(requests[1])
    events = list(engine.run(requests))
    assert {event.request for event in events if isinstance(event, Ended)} == {
        requests[place].identity for place in (0, 2, 3)
    }
    assert_all_returned(llm)


def test_the_end_token_ends_and_is_no_text(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=128)
    free = llm.generate("hello", SamplingParams(max_tokens=8, ignore_eos=True))[0]
    engine_of(llm).ends = frozenset({free.tokens[3]})
    ended = llm.generate("hello", SamplingParams(max_tokens=8))[0]
    first = free.tokens.index(free.tokens[3])
    assert ended.tokens == free.tokens[: first + 1]
    assert ended.finish_reason == "stop"
    assert ended.usage.completion_tokens == first + 1
    assert ended.text == llm._blueprint.tokenizer.decode(free.tokens[:first])


def test_a_stop_string_across_tokens_ends_the_answer(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=256)
    free = llm.generate("hello", SamplingParams(max_tokens=40, ignore_eos=True))[0]
    assert free.text is not None
    stop = free.text[7:11]
    place = free.text.index(stop)
    result = llm.generate("hello", SamplingParams(max_tokens=40, ignore_eos=True, stop=("never ever", stop)))[0]
    assert result.text == free.text[:place]
    assert result.finish_reason == "stop"
    assert result.tokens == free.tokens[: len(result.tokens)]
    assert len(result.tokens) < 40
    assert_all_returned(llm)


def break_rows_of(layer: Any, token: int, *, raises: bool) -> None:
    """Let a paged layer's rows become NaN while a token is among them, as a faulty kernel's would."""
    attend = layer.attend

    def broken(queries: Any, rows: Any, scale: float, step: Any) -> torch.Tensor:
        out = attend(queries, rows, scale, step)
        bad = step.tokens == token
        if raises and bool(bad.any()):
            raise Corrupted("a row is not finite")
        return out.masked_fill(bad[:, None, None], float("nan"))

    layer.attend = broken


@pytest.mark.parametrize("raises", [False, True])
def test_a_corrupted_request_ends_alone(dense: Path, *, raises: bool) -> None:
    # A step that stops half-way can only be one that is not replayed.
    llm = LLM(str(dense), max_model_len=128, capture="off" if raises else "on")
    engine = engine_of(llm)
    healthy = [result.tokens for result in llm.generate(PROMPTS, FREE)]
    arena = engine.runner.arena
    break_rows_of(arena.layers[-1], 99, raises=raises)
    requests = [engine.add(prompt, FREE) for prompt in (PROMPTS[0], [4, 99, 3], *PROMPTS[1:])]
    events = list(engine.run(requests))
    assert [event.request for event in events if isinstance(event, Failed)] == [requests[1].identity]
    answers = [item.generated for item in requests]
    assert answers[1] == []
    assert [answers[0], *answers[2:]] == healthy
    assert_all_returned(llm)
    with pytest.raises(Corrupted):
        llm.generate([PROMPTS[0], [4, 99, 3]], FREE)
    assert_all_returned(llm)


def test_rows_that_cannot_be_stored_end_their_request_in_the_step_that_all_share(
    dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A prompt's step is not replayed, but no more stopped by one request's rows than a replay is."""
    llm = LLM(str(dense), max_model_len=128, capture="on")
    engine = engine_of(llm)
    layer: Any = engine.runner.arena.layers[0]
    attend, run, sizes = layer.attend, Runner.run, list[int]()

    def spoiled(queries: Any, rows: Any, scale: float, step: Any) -> torch.Tensor:
        bad = (step.tokens == 99)[:, None, None]
        return attend(queries, tuple(part.masked_fill(bad, torch.inf) for part in rows), scale, step)

    def counted(self: Runner, chunks: Any, *given: Any) -> Any:
        sizes.append(len(chunks))
        return run(self, chunks, *given)

    monkeypatch.setattr(layer, "attend", spoiled)
    monkeypatch.setattr(Runner, "run", counted)
    requests = [engine.add(prompt, FREE) for prompt in (PROMPTS[0], [4, 99, 3], *PROMPTS[1:])]
    failed = [event.request for event in engine.run(requests) if isinstance(event, Failed)]
    assert failed == [requests[1].identity]
    assert sizes[:2] == [len(requests), len(requests) - 1]
    assert llm._engine.runner.forward.eager >= 1
    assert_all_returned(llm)


def run_out_of_memory(layer: Any, most: int, token: int = -1) -> None:
    """Let steps of more tokens than `most`, and those with one token, find no room, after some of their work."""
    attend = layer.attend

    def crowded(queries: Any, rows: Any, scale: float, step: Any) -> torch.Tensor:
        if len(step.tokens) > most or bool((step.tokens == token).any()):
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")
        return attend(queries, rows, scale, step)

    layer.attend = crowded


def test_a_step_without_room_is_taken_in_smaller_ones(directory: Path, caplog: pytest.LogCaptureFixture) -> None:
    asked: dict[str, Any] = {"max_model_len": 128, "capture": "off", "kv_cache_dtype": "int8", "debug_poison": True}
    healthy = [result.tokens for result in LLM(str(directory), **asked).generate(PROMPTS, FREE)]
    llm = LLM(str(directory), **asked)
    engine = engine_of(llm)
    run_out_of_memory(engine.runner.arena.layers[-1], most=30)
    assert [result.tokens for result in llm.generate(PROMPTS, FREE)] == healthy
    # 40 + 1 + 65 + 7 tokens did not fit (fewer where a state is kept on the way), nor did the half of them.
    said = [record.getMessage() for record in caplog.records]
    assert [text.endswith(f"steps have {count} tokens") for text in said for count in (52, 56, 26, 28)].count(True) == 2
    assert said[-1].endswith(("have 26 tokens", "have 28 tokens"))
    # They have ended, and whoever comes next finds steps as they were.
    assert engine.schedule.step_tokens == 512
    assert all("has no room on the device beside the weights and the cache; lower --max-num" in text for text in said)
    assert_all_returned(llm)


def test_a_prompt_alone_without_room_is_taken_in_smaller_steps(dense: Path, caplog: pytest.LogCaptureFixture) -> None:
    llm = LLM(str(dense), max_model_len=128, capture="off")
    engine = engine_of(llm)
    (healthy,) = llm.generate([PROMPTS[2]], FREE)
    engine.runner.arena.drop_cache()
    run_out_of_memory(engine.runner.arena.layers[-1], most=20)
    (got,) = llm.generate([PROMPTS[2]], FREE)
    assert got.tokens == healthy.tokens
    # 65 tokens did not fit, nor did the half of them.
    assert [record.getMessage().endswith("steps have 16 tokens") for record in caplog.records] == [False, True]
    assert engine.schedule.step_tokens == 512
    assert_all_returned(llm)


def test_who_has_no_room_alone_ends_alone(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=128, capture="off")
    engine = engine_of(llm)
    healthy = [result.tokens for result in llm.generate(PROMPTS, FREE)]
    run_out_of_memory(engine.runner.arena.layers[-1], most=512, token=99)
    requests = [engine.add(prompt, FREE) for prompt in (PROMPTS[0], [4, 99, 3], *PROMPTS[1:])]
    failed = [event for event in engine.run(requests) if isinstance(event, Failed)]
    assert [(event.request, type(event.error)) for event in failed] == [(requests[1].identity, OutOfMemory)]
    assert [request.generated for request in (requests[0], *requests[2:])] == healthy
    # It is gone, and others take steps as before.
    assert engine.schedule.step_tokens == 512
    assert_all_returned(llm)
    with pytest.raises(OutOfMemory, match="a step of 2 tokens for 1 sequence has no room on the device beside"):
        llm.logits([4, 99])
    assert_all_returned(llm)


def test_guesses_without_room_end_the_requests_of_their_step(monkeypatch: pytest.MonkeyPatch) -> None:
    llm = LLM("tiny-hybrid", max_model_len=128, speculative_config=Speculation(method="mtp", adaptive=False))
    prompts = [PROMPTS[1], PROMPTS[3]]
    healthy = [result.tokens for result in llm.generate(prompts, FREE)]

    def crowded(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB.")

    with monkeypatch.context() as patched:
        patched.setattr(Predictor, "propose", crowded)
        with pytest.raises(OutOfMemory, match="for 2 sequences has no room on the device"):
            llm.generate(prompts, FREE)
        assert_all_returned(llm)
    assert [result.tokens for result in llm.generate(prompts, FREE)] == healthy


def test_prompts_are_checked_before_any_runs(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=64)
    for prompt, sentence in (
        ([], "the prompt is empty"),
        ([3, 320], "token 1 of the prompt is 320, but ids are integers from 0 to 319"),
        ([-1], "token 0 of the prompt is -1"),
        ([True], "token 0 of the prompt is True"),
        ([1] * 64, "the prompt has 64 tokens, but the context holds 64 and the answer needs at least 1"),
    ):
        with pytest.raises(Refused, match=sentence):
            llm.generate([[1, 2], prompt])
        assert_all_returned(llm)
    with pytest.raises(Refused, match="the prompt has 65 tokens, but the context holds 64;"):
        llm.logits([1] * 65)
    assert llm.logits([1] * 64).shape == (64, 320)
    last = llm.generate([[1] * 63], SamplingParams(max_tokens=50, ignore_eos=True))[0]
    assert (last.usage.completion_tokens, last.finish_reason) == (1, "length")
