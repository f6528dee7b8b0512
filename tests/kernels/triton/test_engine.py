"""The whole engine on the Triton kernels, in the interpreter: every family's logits are those of the reference."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_dense, save_hybrid, save_latent, save_mamba

from truekv import LLM, SamplingParams
from truekv.core.options import Speculation
from truekv.core.sampling import Draw
from truekv.engine import sample
from truekv.engine.events import Failed
from truekv.engine.run import Runner
from truekv.kernels.triton import chunks, gdn, mamba2, ops
from truekv.kernels.triton.interpreter import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from truekv.engine.run import Ran

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels run on a GPU only: make gpu tests them there")

FAMILIES: dict[str, Callable[[Path], Path]] = {
    "dense": save_dense,
    "gdn": save_hybrid,
    "mamba2": save_mamba,
    "mla": save_latent,
}
PROMPT = [5, 9, 2, 7, 5, 9, 2]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], str]:
    return functools.cache(lambda family: str(FAMILIES[family](tmp_path_factory.mktemp(family))))


def load(model: str, backend: str, **options: Any) -> LLM:
    return LLM(model, kernel_backend=backend, max_model_len=64, max_num_seqs=1, sentinel=False, **options)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_the_reference(saved: Callable[[str], str], family: str) -> None:
    ours, theirs = (load(saved(family), name, kv_cache_dtype="int8") for name in ("triton", "reference"))
    assert {backend for op, backend in ours.kv_plan["kernels"].items() if not op.startswith("sample ")} == {"triton"}
    # A chunk, a token alone, and a chunk upon both.
    got, expected = (llm.logits([*PROMPT, 1], chunk=[5, 1, 2]) for llm in (ours, theirs))
    # int8 codes may flip where two backends round a row differently, each by one step of 1 in 127.
    assert (got - expected).abs().max() <= 2e-2 * expected.abs().max()
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


@pytest.mark.parametrize("family", ["gdn", "mamba2"])
def test_a_prompt_in_chunks_gives_the_logits_of_tokens_alone(
    saved: Callable[[str], str], family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rules = {"gdn": gdn, "mamba2": mamba2}
    asked: list[int] = []
    most_long = chunks.most_long
    monkeypatch.setattr(rules[family], "most_long", lambda *given: asked.append(1) or most_long(*given))
    ours, theirs = (load(saved(family), name, kv_cache_dtype="f32") for name in ("triton", "reference"))
    tokens = [(place * 7 + 3) % 50 for place in range(chunks.LONG + 20)]
    # A chunk of the rule's, a token alone upon it, and the rest.
    got, expected = (llm.logits(tokens, chunk=[chunks.LONG + 9, 1, 10]) for llm in (ours, theirs))
    assert asked
    assert (got - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("family", ["gdn", "mamba2"])
def test_answers_with_drafts_are_those_without(saved: Callable[[str], str], family: str) -> None:
    drafts = Speculation(num_speculative_tokens=2, prompt_lookup_max=3, adaptive=False)
    ours = load(saved(family), "triton", kv_cache_dtype="f32", speculative_config=drafts)
    # Two tokens that the prompt has, so that there is something to guess.
    params = SamplingParams(max_tokens=6, logit_bias={5: 50.0, 9: 50.0})
    (answer,) = ours.generate([PROMPT], params)
    (expected,) = load(saved(family), "reference", kv_cache_dtype="f32").generate([PROMPT], params)
    assert answer.tokens == expected.tokens
    assert sum(ours.stats["drafted"]) > 0


@pytest.mark.parametrize("drafts", [0, 2])
def test_tokens_are_chosen_where_the_logits_are(
    saved: Callable[[str], str], drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy ones and those of temperature alone, beside others, of which all logits or the best of them are read.

    Drafts are verified like any token.
    """
    speculation = Speculation(num_speculative_tokens=drafts, adaptive=False) if drafts else None
    options = {"kv_cache_dtype": "f32", "speculative_config": speculation, "max_num_seqs": 5}
    ours, theirs = (
        LLM(saved("dense"), kernel_backend=name, max_model_len=64, sentinel=False, **options)  # type: ignore[arg-type]
        for name in ("triton", "native")
    )
    steps: list[Ran] = []
    shapes: list[tuple[int, ...]] = []
    run, largest = Runner.run, ops.OPS.largest

    def seen(*given: Any) -> Ran:
        steps.append(run(*given))
        return steps[-1]

    def found(x: torch.Tensor) -> torch.Tensor:
        shapes.append((*x.shape,))
        return largest(x)

    params = [
        SamplingParams(max_tokens=10, ignore_eos=True),
        SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.9, seed=5),
        SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.9, top_k=1),
        SamplingParams(max_tokens=10, ignore_eos=True, temperature=1.1, top_k=30, top_p=0.95, min_p=0.01, seed=7),
        SamplingParams(max_tokens=10, ignore_eos=True, temperature=0.9, logprobs=1, seed=5),
    ]
    prompts = [PROMPT, PROMPT[1:], PROMPT[2:], PROMPT[3:], PROMPT[4:]]
    expected = theirs.generate(prompts, params)
    # Of the CPU's sampler too, which is given every row of the reference's logits.
    for place in (0, 2):
        logits = theirs.logits(prompts[place] + expected[place].tokens)[len(prompts[place]) - 1 : -1]
        draws = [Draw(row, 0.0, 0, 1.0, 0.0, 0.0) for row in logits]
        assert theirs._blueprint.kernels.sampling.draw(draws) == expected[place].tokens
    monkeypatch.setattr(Runner, "run", seen)
    monkeypatch.setattr(ops.OPS, "largest", found)
    assert [answer.tokens for answer in ours.generate(prompts, params)] == [answer.tokens for answer in expected]
    whole = [ran for ran in steps if len(ran.rows) == 5]
    assert whole
    for ran in whole:
        drawn, best, read = (len(ran.likeliest[index]) for index in (1, 3, 4))
        shapes_of = [tuple(part.shape) for part in ran.rows if isinstance(part, torch.Tensor)]
        assert shapes_of == [(0, 320), (0, 320), (0, 320), (best, 31), (read, 320)]
        assert [len(tokens) for tokens in ran.drawn] == [0, drawn, 0, 0, 0]
        assert all(len(places) >= 1 for places in ran.likeliest)
    assert [shape for shape in shapes if shape[1] == 320] == [(sum(map(len, ran.likeliest)), 320) for ran in steps]
    # One call for the rows that are whole, and one for those of which there are the best alone.
    read = [len({part.shape[1] for part in ran.rows if len(part)}) for ran in steps]  # type: ignore[arg-type, union-attr]
    assert ours._blueprint.kernels.calls["sample"] == sum(read)
    # Some of the drafts were right, some wrong.
    assert drafts == 0 or 0 < sum(ours.stats["accepted"]) < sum(ours.stats["drafted"])


@pytest.mark.parametrize("drafts", [0, 2])
def test_rows_whose_point_is_at_an_edge_are_read_whole(
    saved: Callable[[str], str], drafts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A point of zero is the edge of the first token that weighs; what is drawn ahead may be the one at the edge."""
    number = sample.draw
    monkeypatch.setattr(sample, "draw", lambda seed, index: 0.0 if index % 4 == 3 else number(seed, index))
    speculation = Speculation(num_speculative_tokens=drafts, prompt_lookup_max=2, adaptive=False) if drafts else None
    options = {"kv_cache_dtype": "f32", "speculative_config": speculation, "max_num_seqs": 2}
    ours, theirs = (
        LLM(saved("dense"), kernel_backend=name, max_model_len=64, sentinel=False, **options)  # type: ignore[arg-type]
        for name in ("triton", "native")
    )
    steps: list[tuple[list[int], Ran]] = []
    run = Runner.run

    def seen(runner: Runner, chunks: Any, wanted: list[int], read: Any) -> Ran:
        steps.append((wanted, run(runner, chunks, wanted, read)))
        return steps[-1][1]

    # So cold that it repeats itself, and drafts come true.
    params = [SamplingParams(max_tokens=12, ignore_eos=True, temperature=0.05, seed=seed) for seed in (1, 2)]
    prompts = [PROMPT, PROMPT[1:]]
    expected = [answer.tokens for answer in theirs.generate(prompts, params)]
    monkeypatch.setattr(Runner, "run", seen)
    assert [answer.tokens for answer in ours.generate(prompts, params)] == expected
    assert expected[0][3] == expected[1][3] == 0
    found = [one for wanted, ran in steps for one in zip(wanted, ran.rows, ran.drawn, strict=True) if one[0]]
    for count, rows, drawn in found:
        # The tokens, or what they are drawn from.
        assert (len(rows), len(drawn)) in {(count, 0), (0, count)}  # type: ignore[arg-type]
    assert {len(drawn) > 0 for _, _, drawn in found} == {True, False}
    if not drafts:
        assert sum(not drawn for _, _, drawn in found) == 2 * 3
    else:
        assert {count for count, _, drawn in found if drawn} >= {1, 3}
        assert max(count for count, _, drawn in found if not drawn) == 3


def test_of_rows_that_are_not_finite_no_token_is_drawn(
    saved: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The request ends and says why; another, whose token is drawn in the same pass, goes on."""
    llm = LLM(
        saved("dense"), kernel_backend="triton", max_model_len=64, sentinel=False, kv_cache_dtype="f32", max_num_seqs=2
    )
    engine, params = llm._engine, SamplingParams(max_tokens=6, ignore_eos=True, temperature=1.0, seed=3)
    (healthy,) = llm.generate([PROMPT[1:]], params)
    logits, rows = engine.runner.model.logits, list[int]()

    def spoilt(hidden: torch.Tensor) -> torch.Tensor:
        found = logits(hidden)
        rows.append(len(found))
        if len(rows) == 3:
            found[0, 100] = torch.nan
        return found

    monkeypatch.setattr(engine.runner.model, "logits", spoilt)
    requests = [engine.add(prompt, params) for prompt in (PROMPT, PROMPT[1:])]
    events = list(engine.run(requests))
    (failed,) = (event for event in events if isinstance(event, Failed))
    assert failed.request == requests[0].identity
    assert "are not finite; no token was made from them" in str(failed.error)
    assert len(requests[0].generated) == 2
    assert requests[1].generated == healthy.tokens
    assert rows == [2, 2, 2, 1, 1, 1]
