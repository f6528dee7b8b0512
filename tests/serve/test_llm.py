from __future__ import annotations

import json
import math
import shutil
from dataclasses import fields
from typing import TYPE_CHECKING

import msgspec
import pytest

from truekv import LLM, EngineOptions, Refused, SamplingParams
from truekv.serve.llm import EngineKeywords, Result
from truekv.serve.template import _WORKER

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

SHORT = SamplingParams(max_tokens=4, ignore_eos=True)


@pytest.fixture(scope="module")
def llm(dense: Path) -> Iterator[LLM]:
    yield LLM(str(dense), max_model_len=128, kv_cache_dtype="int8")
    _WORKER.stop()


def test_keywords_are_the_engine_options() -> None:
    names = {field.name for field in fields(EngineOptions)}
    assert set(EngineKeywords.__annotations__) == names


def test_prompts_come_in_four_shapes(llm: LLM) -> None:
    ids = llm.tokens("hello")
    expected = llm.generate("hello", SHORT)[0]
    assert llm.generate(ids, SHORT) == [expected]
    assert llm.generate(["hello", "hello"], SHORT) == [expected, expected]
    assert llm.generate([ids, ids], SHORT) == [expected, expected]
    assert llm.generate((ids, ids), [SHORT, SHORT]) == [expected, expected]
    assert len(llm.generate("hello", SamplingParams(max_tokens=2, ignore_eos=True))[0].tokens) == 2


def test_what_is_no_prompt_is_refused(llm: LLM) -> None:
    for prompts, sentence in (
        ("", "the prompt is empty"),
        ([], "give a prompt"),
        ([""], "the prompt is empty"),
        ([[]], "the prompt is empty"),
        (["a", [1]], "of different kinds"),
        ([1, "a"], "of different kinds"),
        ([1.5], "token 0 of the prompt is 1.5"),
        (7, "give a prompt"),
        ("ab\udc80", "lone surrogate at character 2"),
    ):
        with pytest.raises(Refused, match=sentence):
            llm.generate(prompts, SHORT)
    with pytest.raises(Refused, match="there are 2 prompts and 1 params"):
        llm.generate(["a", "b"], [SHORT])


def test_a_result_says_everything_and_is_json(llm: LLM) -> None:
    params = SamplingParams(max_tokens=3, logprobs=2, temperature=0.5, seed=9, ignore_eos=True)
    (result,) = llm.generate("hello", params)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (1, 3)
    assert (result.finish_reason, result.seed) == ("length", 9)
    assert result.logprobs is not None
    assert [place.chosen.token for place in result.logprobs] == result.tokens
    assert all(len(place.top) == 2 for place in result.logprobs)
    assert all(math.exp(place.chosen.logprob) <= 1 for place in result.logprobs)
    layer = result.kv_plan["layers"][0]
    # int8: one byte for each of 2 heads of 64, and one fp16 scale a head; for K and V.
    assert (layer["formats"], layer["bytes_per_token"]) == ({"k": "int8", "v": "int8"}, 2 * 2 * (64 + 2))
    assert result.kv_plan["kernels"]["attend k=int8 2x64, v=int8 2x64"] == "native"
    data = msgspec.json.encode(result)
    assert msgspec.json.decode(data, type=Result) == result
    assert list(json.loads(data)) == [field.name for field in fields(Result)]


def test_the_kv_plan_is_what_the_arena_holds(llm: LLM) -> None:
    arena = llm._engine.runner.arena
    assert llm.kv_plan["cache_bytes"] == arena.nbytes
    assert llm.max_model_len == 128


def test_chat_is_the_template_and_generate(llm: LLM) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hello 😀"}]
    text = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhello 😀<|im_end|>\n<|im_start|>assistant\n"
    tokens = llm.conversation(messages)
    assert tokens == llm._blueprint.tokenizer.encode(text, add_special_tokens=False)
    assert tokens[0] == llm._blueprint.tokenizer.find("<|im_start|>")
    first, second = llm.chat(messages, SHORT), llm.generate(tokens, SHORT)[0]
    assert (first.tokens, first.text) == (second.tokens, second.text)
    assert second.usage.cached_tokens == len(tokens) - 1
    tool = {"type": "function", "function": {"name": "get_weather"}}
    assert len(llm.conversation(messages, [tool])) > len(tokens)


def test_a_checkpoint_without_a_tokenizer_takes_token_ids(dense: Path, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(dense, bare)
    for name in ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json"):
        (bare / name).unlink()
    llm = LLM(str(bare), max_model_len=64)
    result = llm.generate([3, 4], SamplingParams(max_tokens=2, logprobs=1, ignore_eos=True))[0]
    assert (result.text, len(result.tokens)) == (None, 2)
    assert result.logprobs[0].chosen.text is None
    with pytest.raises(Refused, match=r"no tokenizer.json, so it cannot read text; give token ids"):
        llm.generate("hello")
    with pytest.raises(Refused, match=r"has no tokenizer.json, so it cannot chat"):
        llm.chat([{"role": "user", "content": "x"}])
    with pytest.raises(Refused, match="stop strings need a tokenizer"):
        llm.generate([3, 4], SamplingParams(stop=("x",)))


def test_everything_is_refused_before_a_weight_is_read(dense: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(dense, broken)
    weights = broken / "model.safetensors"
    data = bytearray(weights.read_bytes())
    # Every weight becomes NaN, so whoever reads one raises Corrupted instead of Refused.
    start = 8 + int.from_bytes(data[:8], "little")
    data[start:] = b"\xff" * (len(data) - start)
    weights.write_bytes(data)
    for options, sentence in (
        ({"kv_cache_dtype": "imt8"}, "did you mean 'int8'"),
        ({"kv_cache_map": "9=int8"}, "layer 9 does not exist"),
        ({"max_model_len": 10_000}, "positions for 1 to 512 tokens"),
        ({"memory": 1000}, "of memory"),
        ({"kv_cache_frames": str(tmp_path / "none")}, r"is not a file; make it with 'truekv calibrate"),
        ({"kv_cache_dtype": "fp8"}, r"run 'truekv calibrate .*broken' first, or use --kv-cache-dtype int8"),
        ({"max_modl_len": 5}, "unknown option 'max_modl_len': did you mean 'max_model_len'"),
        ({"max_num_seqs": 0}, "max_num_seqs is 0"),
    ):
        with pytest.raises(Refused, match=sentence):
            LLM(str(broken), **options)
    with pytest.raises(Exception, match="NaN"):
        LLM(str(broken))


def test_a_misspelt_embedded_model_is_not_looked_for_on_the_hub() -> None:
    with pytest.raises(Refused, match="unknown embedded model 'tiny-hybird': did you mean 'tiny-hybrid'"):
        LLM("tiny-hybird")
