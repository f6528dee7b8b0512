from __future__ import annotations

import json
import math
import random
import re
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import truekv
from truekv import LLM, Refused, SamplingParams
from truekv.core.errors import ConstraintFailed
from truekv.core.options import Speculation, StructuredOutputs
from truekv.engine import constrain
from truekv.engine.constrain import Constraint, Grammars
from truekv.engine.events import Ended, Failed, Sampled
from truekv.engine.generate import Asked
from truekv.engine.sample import Sampler
from truekv.engine.tokens import Tokenizer

DENSE = Path(truekv.__file__).parent / "tiny" / "dense"
END, OTHER_END = 1010, 1008
# More ids than the tokenizer has, as checkpoints with padded embeddings do.
VOCAB = 1100
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "kind": {"enum": ["cat", "dog", None]},
        "tags": {"type": "array", "items": {"type": "boolean"}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "kind", "tags"],
    "additionalProperties": False,
}


@cache
def tokenizer() -> Tokenizer:
    found = Tokenizer.open(DENSE)
    assert found is not None
    return found


@cache
def grammars(ends: frozenset[int] = frozenset({END, OTHER_END})) -> Grammars:
    return Grammars(tokenizer(), VOCAB, ends)


def ids(text: str) -> list[int]:
    return tokenizer().encode(text, add_special_tokens=False)


def start(ends: frozenset[int] = frozenset({END, OTHER_END}), **wanted: Any) -> Constraint:
    return grammars(ends).compile(StructuredOutputs(**wanted))


def admitted(constraint: Constraint) -> set[int]:
    """The tokens that may come next."""
    return {int(token) for token in (constraint.mask(torch.zeros(VOCAB)) == 0).nonzero()}


@cache
def lengths() -> torch.Tensor:
    return torch.tensor([3.0 * len(tokenizer().piece(token)) for token in range(VOCAB)])


def rows(kind: str, seed: int) -> Any:
    """Rows that know nothing of the grammar, some of them set against it."""
    generator = torch.Generator().manual_seed(seed)
    spaces = ids(" ") + ids("\n") + ids("\t")
    while True:
        row = torch.randn(VOCAB, generator=generator)
        if kind == "forbidden":  # ids without text, special tokens and ends first
            row[1008:] += 1000
        elif kind == "spaces":
            row[spaces] += 50
        elif kind == "long":
            row += lengths()
        elif kind == "bytes":  # single bytes, those inside of characters too
            row[:256] += 100
        yield row


def answer(kind: str, temperature: float, seed: int, **wanted: Any) -> str:
    """Answer until the grammar or an end token ends it, as an engine does; drafts are guessed on the way."""
    constraint = start(**wanted)
    ends = frozenset({END, OTHER_END})
    sampler = Sampler(SamplingParams(temperature=temperature, seed=seed, max_tokens=3000), [5], VOCAB, ends, constraint)
    tokens: list[int] = []
    for row, _ in zip(rows(kind, seed), range(3000), strict=False):
        tokens.append(sampler.choose(row))
        if tokens[-1] in ends:
            assert sampler.finished
            break
        if sampler.finished:
            break
    else:
        raise AssertionError("the answer does not end")
    assert max(tokens) < 1015
    return tokenizer().decode(tokens)


KINDS = [("random", 1.0), ("random", 0.0), ("forbidden", 1.0), ("spaces", 1.0), ("long", 0.0), ("bytes", 1.0)]


@pytest.mark.parametrize(("kind", "temperature"), KINDS)
def test_every_answer_follows_its_json_schema(kind: str, temperature: float) -> None:
    for seed in range(2):
        value = json.loads(answer(kind, temperature, seed, json=SCHEMA if seed % 2 else json.dumps(SCHEMA)))
        assert set(value) == {"name", "age", "kind", "tags"}
        assert isinstance(value["name"], str)
        assert len(value["name"]) <= 6
        assert isinstance(value["age"], int)
        assert 0 <= value["age"] <= 150
        assert value["kind"] in {"cat", "dog", None}
        assert 1 <= len(value["tags"]) <= 3
        assert all(isinstance(tag, bool) for tag in value["tags"])


@pytest.mark.parametrize(("kind", "temperature"), KINDS)
def test_every_answer_matches_its_expression(kind: str, temperature: float) -> None:
    for expression in (r"[a-f]{2,5}-[0-9]{3}(x|yz)?", r"(é|😀|日本){1,4}!", r"\s{1,3}[^a-z\n]{0,9}", r"a\.b\\[\"']"):
        for seed in range(2):
            assert re.fullmatch(expression, answer(kind, temperature, seed, regex=expression))


@pytest.mark.parametrize(("kind", "temperature"), KINDS)
def test_every_answer_is_one_of_the_choices(kind: str, temperature: float) -> None:
    choices = ["yes", "no", "no way", "näh 😀", 'a "b"\n', "x|y.*(", "<|im_end|>", " "]
    for seed in range(6):
        assert answer(kind, temperature, seed, choice=choices) in {*choices, ""}


@settings(max_examples=30, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=12), min_size=1, max_size=5))
def test_any_text_can_be_a_choice_and_nothing_else_is(choices: list[str]) -> None:
    for text in choices:
        tokens, constraint = ids(text), start(choice=choices)
        assert constraint.admits(tokens) == len(tokens)
        for token in tokens:
            constraint.advance(token)
        longer = [other for other in choices if other != text and other.startswith(text)]
        assert constraint.finished == (not longer)
    odd = "~" * 13
    assert start(choice=choices).admits(ids(odd)) < len(ids(odd))


@pytest.mark.parametrize(("kind", "temperature"), KINDS)
def test_every_answer_is_a_sentence_of_its_grammar(kind: str, temperature: float) -> None:
    grammar = 'start: term (("+" | "-") term){0,3} "="\nterm: NUMBER | "(" term ")"\nNUMBER: /[0-9]{1,3}/'
    for seed in range(3):
        text = answer(kind, temperature, seed, grammar=grammar)
        assert re.fullmatch(r"[(]*\d{1,3}[)]*([-+][(]*\d{1,3}[)]*){0,3}=", text)
        assert text.count("(") == text.count(")")


def test_ends_are_admitted_where_the_grammar_may_end_and_nowhere_else() -> None:
    constraint = start(regex="ab|abc")
    assert not admitted(constraint) & {END, OTHER_END}
    for token in ids("a") + ids("b"):
        assert not constraint.finished
        constraint.advance(token)
    assert admitted(constraint) == {END, OTHER_END, *ids("c")}
    constraint.advance(END)
    assert constraint.finished


def test_a_checkpoint_without_ends_answers_until_the_grammar_ends() -> None:
    constraint = start(frozenset(), regex="a{1,3}")
    for _ in range(3):
        assert not constraint.finished
        assert all(set(tokenizer().piece(token)) == {"a"} for token in admitted(constraint))
        constraint.advance(ids("a")[0])
    assert constraint.finished


def test_a_grammar_that_was_asked_for_before_is_not_compiled_again() -> None:
    compiler = Grammars(tokenizer(), VOCAB, frozenset({END}))
    first, second = (compiler.compile(StructuredOutputs(json=SCHEMA)) for _ in range(2))
    assert compiler.compiled == 1
    start = admitted(second)
    first.advance(ids("{")[0])
    assert admitted(first) != start
    assert admitted(second) == start, "each request has a place of its own"
    second.advance(ids("{")[0])
    assert admitted(second) == admitted(first)
    assert admitted(compiler.compile(StructuredOutputs(json=SCHEMA))) == start
    assert compiler.compiled == 1
    # The same text as another kind of grammar is another grammar.
    compiler.compile(StructuredOutputs(regex="a|b"))
    compiler.compile(StructuredOutputs(choice=("a|b",)))
    assert compiler.compiled == 3
    for count in range(constrain._KEPT):
        compiler.compile(StructuredOutputs(regex=f"a{{{count + 1}}}"))
    compiler.compile(StructuredOutputs(json=SCHEMA))
    assert compiler.compiled == 4 + constrain._KEPT, "of many, those that were asked for last are kept"


def test_no_request_fails_for_what_others_made_of_a_shared_grammar(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constrain, "_STATES", 1000)
    monkeypatch.setattr(constrain, "_MOST_COPIES", 20)
    wanted = StructuredOutputs(regex="(a|b)*a(a|b){12}")
    compiler = Grammars(tokenizer(), VOCAB, frozenset({END}))
    a, b = ids("a")[0], ids("b")[0]
    anew = 0
    for request in range(60):
        constraint, before = compiler.compile(wanted), compiler.compiled
        drawn = random.Random(request)
        for _ in range(60):
            assert {a, b} <= admitted(constraint)
            constraint.advance(drawn.choice((a, b)))
        anew += compiler.compiled - before
    assert anew > 0, "the bound of the shared automaton is met in the middle of an answer"
    assert compiler.compiled < 30, "which most requests do not notice"
    monkeypatch.setattr(constrain, "_STATES", 20)
    constraint = Grammars(tokenizer(), VOCAB, frozenset({END})).compile(wanted)

    def answer() -> None:
        for _ in range(60):
            admitted(constraint)
            constraint.advance(a)

    with pytest.raises(ConstraintFailed, match="too many states"):
        answer()


def test_min_tokens_yields_to_a_grammar_that_admits_only_an_end() -> None:
    ends = frozenset({END, OTHER_END})
    row = torch.zeros(VOCAB).index_fill(0, torch.tensor([END]), 50.0)
    sampler = Sampler(SamplingParams(min_tokens=2), [5], VOCAB, ends, start(regex="a{1,9}"))
    tokens = [sampler.choose(row) for _ in range(3)]
    assert END not in tokens[:2]
    assert tokens[2] == END
    sampler = Sampler(SamplingParams(min_tokens=5, stop_token_ids=ids("b")), [5], VOCAB, ends, start(regex="ab"))
    assert [sampler.choose(row) for _ in range(2)] == ids("a") + ids("b")
    assert sampler.finished


def test_drafts_are_cut_where_the_grammar_ends_them_and_the_place_stays() -> None:
    sampler = Sampler(SamplingParams(), [5], VOCAB, frozenset({END}), start(regex="[0-9]{2}(a|b)c?"))
    drafts = ids("1") + ids("2") + ids("a")
    for _ in range(2):
        assert sampler.allowed([*drafts, *ids("z"), *ids("c")]) == drafts
    assert sampler.allowed([*drafts, END]) == [*drafts, END]
    assert sampler.allowed([VOCAB - 1]) == []
    assert sampler.allowed(ids("x")) == []
    assert sampler.allowed([]) == []
    row = torch.zeros(VOCAB).index_fill(0, torch.tensor(ids("7")), 5.0)
    assert sampler.choose(row) == ids("7")[0]
    assert sampler.allowed([*drafts[:1], *drafts]) == drafts[:1]
    free = Sampler(SamplingParams(), [5], VOCAB, frozenset({END}))
    assert free.allowed(drafts) == drafts


def test_verified_drafts_change_no_token_of_a_constrained_answer() -> None:
    def answered(seed: int, *, speculative: bool) -> list[int]:
        params = SamplingParams(temperature=1.3, seed=seed, max_tokens=500)
        sampler = Sampler(params, [5], VOCAB, frozenset({END}), start(json=SCHEMA))
        guesses = torch.Generator().manual_seed(seed)
        table = torch.randn((VOCAB, VOCAB), generator=torch.Generator().manual_seed(1))
        tokens = [0]
        while not sampler.finished and tokens[-1] != END:
            # The beginning of the answer is guessed right, the rest hardly ever.
            drafts = torch.randint(1008, (2,), generator=guesses).tolist()
            drafts = sampler.allowed([int(x) for x in [*ids('{"name'), *drafts][:3]]) if speculative else []
            for place, token in enumerate([tokens[-1], *drafts]):
                tokens.append(sampler.choose(table[token]))
                if sampler.finished or place == len(drafts) or tokens[-1] != drafts[place]:
                    break
                accepted.append(place)
        return tokens

    accepted: list[int] = []
    for seed in range(4):
        assert answered(seed, speculative=True) == answered(seed, speculative=False)
    assert accepted


def test_rows_shorter_and_longer_than_the_vocabulary_are_masked() -> None:
    constraint = start(regex="[a-z]+")
    for size in (500, VOCAB, 2000):
        masked = constraint.mask(torch.zeros(size))
        assert masked.shape == (size,)
        assert torch.isneginf(masked[1008:]).all()
        assert float(masked[ids("a")[0]]) == 0.0
    with pytest.raises(ConstraintFailed):
        constraint.mask(torch.zeros(ids("a")[0]))


BAD: list[tuple[dict[str, Any], str]] = [
    ({"json": "{"}, "not valid JSON"),
    ({"json": "[" * 100_000}, "not valid JSON"),
    ({"json": "[1]"}, "must be a JSON object"),
    ({"json": {"x": {1, 2}}}, "not valid JSON"),
    ({"json": {"type": "strong"}}, "cannot be compiled"),
    ({"json": {"$ref": "http://example.org/schema"}}, "cannot be compiled"),
    ({"json": {"not": {"type": "string"}}}, "cannot be compiled"),
    ({"json": {"type": "string", "minLength": 5, "maxLength": 2}}, "cannot be compiled"),
    ({"json": {"$ref": "#"}}, "matches no text"),
    ({"json": {"const": "\ud800"}}, "cannot be compiled"),
    ({"json": {"type": "integer", "multipleOf": 1234567}}, "multipleOf"),
    ({"json": {"allOf": [{"multipleOf": 9973}, {"multipleOf": 9967}]}}, "multipleOf"),
    ({"json": {"type": "number", "multipleOf": 1e-300}}, "multipleOf"),
    ({"json": {"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in range(9)]} for i in range(9)]}}, "too large"),
    ({"json": {"enum": ["x" * 1000] * 300}}, "at most 262144"),
    ({"regex": "("}, "unclosed group"),
    ({"regex": "(?=a)b"}, "look-around"),
    ({"regex": "(" * 5000 + "a" + ")" * 5000}, "cannot be compiled"),
    ({"regex": ""}, "matches no text"),
    ({"regex": r"[^\s\S]"}, "matches no text"),
    ({"regex": "\ud800"}, "not valid Unicode"),
    ({"regex": "a" * 300_000}, "at most 262144"),
    ({"choice": ["x" * 200_000, "y" * 200_000]}, "at most 262144"),
    ({"grammar": ""}, "Empty grammar"),
    ({"grammar": "start: other"}, "unknown name"),
    ({"grammar": "start: start"}, "matches no text"),
    ({"grammar": 'start: ""'}, "matches no text"),
    ({"grammar": "start: " + "(" * 50_000}, "too deeply nested"),
    ({"grammar": "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60)) + '\nA60: "a"'}, "too big"),
    ({"grammar": 'start: %json {"type": "integer", "multiple\\u004ff": 1234567}'}, "multipleOf"),
]


@pytest.mark.parametrize(("wanted", "says"), BAD, ids=lambda value: value if isinstance(value, str) else "")
def test_a_grammar_that_is_invalid_empty_or_too_large_is_refused_in_one_sentence(
    wanted: dict[str, Any], says: str
) -> None:
    grammars()._prepare()
    began = time.process_time()
    with pytest.raises(Refused, match=re.escape(says)) as refused:
        start(**wanted)
    assert time.process_time() - began < 2
    sentence = str(refused.value)
    assert sentence.startswith("structured_outputs")
    assert "\n" not in sentence
    assert len(sentence) < 400


def test_harmless_multiples_compile() -> None:
    price = {"type": "number", "multipleOf": 0.01, "minimum": 1, "maximum": 2}
    assert start(json={"type": "array", "items": price}).admits(ids("[1.25]")) == len(ids("[1.25]"))
    assert start(json={"const": '"multipleOf": 1234567'}).finished is False


def test_a_checkpoint_without_tokenizer_refuses() -> None:
    with pytest.raises(Refused, match=r"no tokenizer\.json"):
        Grammars(None, VOCAB, frozenset()).compile(StructuredOutputs(regex="a"))


# Each of its tokens may be one of astronomically many parses, which shows only after the first.
AMBIGUOUS = "start: r0\n" + "\n".join(f"r{i}: r{i + 1} r{i + 1}" for i in range(60)) + '\nr60: "a"'


def test_a_step_beyond_the_limits_ends_that_answer_with_an_error_of_its_own() -> None:
    sampler = Sampler(SamplingParams(), [5], VOCAB, frozenset({END}), start(grammar=AMBIGUOUS))
    with pytest.raises(ConstraintFailed, match="cannot be continued") as failed:
        [sampler.choose(torch.zeros(VOCAB)) for _ in range(100)]
    assert "\n" not in str(failed.value)


def test_a_failed_constraint_stays_failed_and_never_admits_an_end() -> None:
    constraint = start(regex="a{1000}{1000}")
    with pytest.raises(ConstraintFailed, match="too many expressions"):
        constraint.advance(ids("a")[0])
    with pytest.raises(ConstraintFailed, match="too many expressions"):
        constraint.mask(torch.zeros(VOCAB))
    constraint = start(regex="ab")
    with pytest.raises(ConstraintFailed, match="cannot be continued"):
        constraint.advance(ids("b")[0])


def test_the_engine_answers_in_the_grammar_and_ends_with_stop(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=256)
    wanted = StructuredOutputs(choice=["hello world", "good bye"])
    for params in (SamplingParams(structured_outputs=wanted), SamplingParams(temperature=2, structured_outputs=wanted)):
        result = llm.generate("hello", params)[0]
        assert result.text in {"hello world", "good bye"}
        # What is complete needs no end token and no step for it.
        assert not llm._engine.ends & set(result.tokens)
        assert result.finish_reason == "stop"
    cut = llm.generate("hello", SamplingParams(max_tokens=3, structured_outputs=StructuredOutputs(regex="x{9}")))[0]
    assert (cut.text, cut.finish_reason) == ("xxx", "length")


def test_the_engine_ends_at_stop_tokens_and_counts_penalties(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=256)
    free = llm.generate("hello", SamplingParams(max_tokens=20, ignore_eos=True, repetition_penalty=5.0))[0]
    assert len(set(free.tokens)) > 10
    stop = free.tokens[7]
    ended = llm.generate(
        "hello", SamplingParams(max_tokens=20, ignore_eos=True, repetition_penalty=5.0, stop_token_ids=[stop])
    )[0]
    assert (ended.finish_reason, ended.tokens) == ("stop", free.tokens[: free.tokens.index(stop) + 1])


def test_a_failing_grammar_ends_its_request_and_leaves_the_others_bitwise_unchanged(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=256)
    engine, plain = llm._engine, SamplingParams(max_tokens=12, temperature=1.0, seed=3, logprobs=3, ignore_eos=True)
    alone = llm.generate("hello", plain)[0]
    prompts = [llm.tokens("hello"), llm.tokens("hallo")]
    bad = SamplingParams(structured_outputs=StructuredOutputs(regex="("))
    with pytest.raises(Refused, match="structured_outputs"):
        engine.add_all([Asked(prompts[0], plain), Asked(prompts[1], bad)])
    assert not engine._answers
    failing = SamplingParams(structured_outputs=StructuredOutputs(grammar=AMBIGUOUS))
    good, bad_one = engine.add_all([Asked(prompts[0], plain), Asked(prompts[1], failing)])
    events = list(engine.run([good, bad_one]))
    failed = [event for event in events if isinstance(event, Failed)]
    assert [event.request for event in failed] == [bad_one.identity]
    assert isinstance(failed[0].error, ConstraintFailed)
    sampled = [event for event in events if isinstance(event, Sampled) and event.request == good.identity]
    assert [event.token for event in sampled] == alone.tokens
    assert [event.logprob.logprob for event in sampled if event.logprob] == [
        place.chosen.logprob for place in alone.logprobs or []
    ]
    assert any(isinstance(event, Ended) and event.request == good.identity for event in events)
    assert not engine._answers


def test_logprobs_stay_those_of_the_raw_model(dense: Path) -> None:
    llm = LLM(str(dense), max_model_len=256)
    params = SamplingParams(
        max_tokens=2, logprobs=2, structured_outputs=StructuredOutputs(regex="[xyz]{2}"), logit_bias={3: 50.0}
    )
    result = llm.generate("hello", params)[0]
    logits = llm.logits([*llm.tokens("hello"), *result.tokens])[-3:-1]
    expected = torch.log_softmax(logits, 1)
    assert result.logprobs is not None
    for place, row in zip(result.logprobs, expected, strict=True):
        assert place.chosen.logprob == pytest.approx(float(row[place.chosen.token]), abs=1e-5)
        assert place.top[0].token == int(row.argmax())
        assert math.exp(place.chosen.logprob) < 1


def test_speculation_and_batching_change_no_token_of_a_constrained_answer(dense: Path) -> None:
    wanted = StructuredOutputs(regex="(ab(cd|ce|xy)){6,9}")
    params = [SamplingParams(temperature=1.0, seed=seed, structured_outputs=wanted) for seed in range(3)]
    alone = LLM(str(dense), max_model_len=256)
    expected = [alone.generate("abcdabcd", one)[0].tokens for one in params]
    guessing = LLM(str(dense), max_model_len=256, speculative_config=Speculation(method="ngram", adaptive=False))
    assert [result.tokens for result in guessing.generate(["abcdabcd"] * 3, params)] == expected
    assert guessing._engine.drafting is not None
    assert guessing._engine.steps < max(map(len, expected))
