"""Every mistake a user can make is one sentence, exit code 2, no traceback, and nothing is loaded for it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from truekv.models.weights import Checkpoint
from truekv.serve.template import _WORKER

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from command_line import Outcome

    Call = Callable[..., Outcome]


@pytest.fixture(autouse=True, scope="module")
def _stop_the_worker() -> Iterator[None]:
    yield
    _WORKER.stop()


def assert_refused(done: Outcome, sentence: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("truekv: ")
    assert done.err.count("\n") == 1
    assert "Traceback" not in done.err
    assert sentence in done.err


@pytest.fixture
def no_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nobody load weights."""

    def load(*_: object) -> None:
        pytest.fail("weights were loaded before the check")

    monkeypatch.setattr(Checkpoint, "load", load)


@pytest.fixture
def checkpoint(dense: Path, tmp_path: Path) -> Path:
    """A checkpoint that a test may damage."""
    return shutil.copytree(dense, tmp_path / "model")


BEFORE_LOADING = {
    "unknown format": (["--kv-cache-dtype", "imt8"], "unknown KV cache format 'imt8': did you mean 'int8'?"),
    "unknown llama.cpp format": (["-ctk", "q8_O", "-ctv", "q4_0"], "did you mean 'q8_0'?"),
    "both spellings": (["--kv-cache-dtype", "int8", "-ctk", "q8_0"], "name the same thing"),
    "a map of no layer": (["--kv-cache-map", "7=int8"], "layer 7 does not exist; the layers with a KV cache are 0-1"),
    "a map that is none": (["--kv-cache-map", "int8"], "is not LAYER=FORMAT"),
    "an uncalibrated format": (["--kv-cache-dtype", "fp8"], "run 'truekv calibrate"),
    "frames that are not there": (
        ["--kv-cache-frames", "/nowhere/frames"],
        "is not a file; make it with 'truekv calibrate",
    ),
    "a context beyond the checkpoint": (["--max-model-len", "100000"], "positions for 1 to 512 tokens"),
    "no context": (["--max-model-len", "0"], "max_model_len is 0"),
    "negative temperature": (["--temperature", "-1"], "temperature is -1.0, but must be a number from 0 to 100"),
    "NaN temperature": (["--temperature", "nan"], "temperature is nan"),
    "infinite temperature": (["--temperature", "inf"], "temperature is inf"),
    "temperature in words": (["--temperature", "warm"], "Invalid value for '--temperature'"),
    "top_p of 0": (["--top-p", "0"], "top_p is 0, which keeps no token"),
    "NaN top_p": (["--top-p", "nan"], "top_p is nan"),
    "top_p over 1": (["--top-p", "1.5"], "top_p is 1.5"),
    "negative top_k": (["--top-k", "-2"], "top_k is -2"),
    "no tokens": (["--max-tokens", "0"], "max_tokens is 0"),
    "a seed of 2^70": (["--seed", str(2**70)], f"seed is {2**70}"),
    "an empty stop string": (["--stop", ""], "stop has '', but takes texts of 1 to 1000 characters"),
    "too many logprobs": (["--logprobs", "21"], "logprobs is 21"),
    "an unknown dtype": (["--dtype", "float64"], "float64"),
    "two prompts": (["--messages", "x.json"], "give either a PROMPT"),
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("name", BEFORE_LOADING)
def test_options_are_checked_before_anything_is_loaded(truekv: Call, dense: Path, name: str) -> None:
    options, sentence = BEFORE_LOADING[name]
    assert_refused(truekv("generate", str(dense), "hello", *options), sentence)


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize(
    ("arguments", "stdin", "sentence"),
    [
        ([], b"", "give either a PROMPT ('-' reads it from stdin) or --messages FILE"),
        ([""], b"", "the prompt is empty"),
        (["-"], b"", "the prompt on stdin is empty"),
        (["-"], b"hell\xff\xfe", "stdin is not valid UTF-8: byte 4 is 0xff"),
        (["-"], "hällo".encode("latin-1"), "stdin is not valid UTF-8: byte 1 is 0xe4"),
    ],
)
def test_prompts_are_checked_before_anything_is_loaded(
    truekv: Call, dense: Path, arguments: list[str], stdin: bytes, sentence: str
) -> None:
    assert_refused(truekv("generate", str(dense), *arguments, stdin=stdin), sentence)


CONVERSATIONS = {
    b"": "is not valid JSON",
    b"{": "is not valid JSON",
    b"[" * 100_000: "is not valid JSON",
    b'["\xff"]': "is not valid UTF-8: byte 2 is 0xff",
    b"[]": "must be a non-empty list",
    b'"hello"': "must be a non-empty list",
    b"{}": "must be a non-empty list",
    b"[1]": "messages[0] is int, but must be an object",
    b'[{"content": "x"}]': "messages[0] has role None, but a role is one of system, developer, user",
    b'[{"role": "user", "content": "a"}, {"role": "bot", "content": "x"}]': "messages[1] has role 'bot'",
    b'[{"role": "user"}]': "messages[0] has content of type NoneType",
    b'[{"role": "user", "content": 5}]': "messages[0] has content of type int",
    b'[{"role": "user", "content": [{"type": "image_url"}]}]': "content[0] is not a text part",
    b'[{"role": "assistant", "content": "", "tool_calls": 5}]': "tool_calls must be a list of objects with 'function'",
    b'[{"role": "assistant", "tool_calls": [{"name": "f", "arguments": "{"}]}]': "'arguments' is not valid JSON",
    b'{"messages": [{"role": "user", "content": "x"}], "tools": {}}': "tools must be a list",
}


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("data", CONVERSATIONS, ids=lambda data: repr(data[:60]))
def test_conversations_are_checked_before_anything_is_loaded(
    truekv: Call, dense: Path, tmp_path: Path, data: bytes
) -> None:
    file = tmp_path / "talk.json"
    file.write_bytes(data)
    assert_refused(truekv("generate", str(dense), "--messages", str(file)), CONVERSATIONS[data])


def test_a_file_of_messages_that_is_not_there(truekv: Call, dense: Path, tmp_path: Path) -> None:
    done = truekv("generate", str(dense), "--messages", str(tmp_path / "none.json"))
    assert_refused(done, "none.json cannot be read: No such file or directory")
    assert_refused(truekv("generate", str(dense), "--messages", str(tmp_path)), "cannot be read: Is a directory")


@pytest.mark.usefixtures("no_weights")
@pytest.mark.parametrize("command", [["generate", "{}", "hello"], ["chat", "{}"], ["plan", "{}"]])
def test_models_that_cannot_run(truekv: Call, checkpoint: Path, command: list[str]) -> None:
    def call() -> Outcome:
        return truekv(*(part.format(checkpoint) for part in command))

    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "model_type": "qwen33"}))
    assert_refused(call(), "model_type 'qwen33' is not implemented; did you mean 'qwen3'?")
    (checkpoint / "config.json").write_text("{")
    assert_refused(call(), "config.json")
    (checkpoint / "config.json").unlink()
    assert_refused(call(), "holds no config.json")
    shutil.rmtree(checkpoint)
    assert_refused(call(), "is neither a directory nor a hub id")


@pytest.mark.usefixtures("no_weights")
def test_a_misspelt_embedded_model(truekv: Call) -> None:
    assert_refused(truekv("generate", "tiny-hybird", "x"), "did you mean 'tiny-hybrid'?")


def test_a_prompt_longer_than_the_context(truekv: Call, dense: Path) -> None:
    done = truekv("generate", str(dense), "x" * 65, "--max-model-len", "64")
    assert_refused(
        done, "the prompt has 65 tokens, but the context holds 64 and the answer needs at least 1; shorten it"
    )


def test_a_prompt_that_is_not_unicode(truekv: Call, dense: Path) -> None:
    # What Python makes of an argument that is not UTF-8.
    assert_refused(truekv("generate", str(dense), "ab\udcff", "--max-model-len", "64"), "lone surrogate at character 2")


@pytest.mark.parametrize("command", [["generate", "--chat", "{}", "hello"], ["chat", "{}"]])
@pytest.mark.parametrize(
    ("template", "sentence"),
    [
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "did not finish within 2 s"),
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "reaches for what the sandbox forbids"),
        ("{{ 'x' * 5000000000 }}", "the chat template"),
        ("{% if %}", "is not valid jinja2"),
    ],
)
def test_a_template_that_loops_or_reaches_out(
    truekv: Call, checkpoint: Path, command: list[str], template: str, sentence: str
) -> None:
    (checkpoint / "chat_template.jinja").write_text(template)
    done = truekv(*(part.format(checkpoint) for part in command), "--max-model-len", "64")
    assert_refused(done, sentence)


def test_text_for_a_checkpoint_without_a_tokenizer(truekv: Call, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").unlink()
    short = ["--max-model-len", "64"]
    assert_refused(
        truekv("generate", str(checkpoint), "hello", *short), "has no tokenizer.json, so it cannot read text"
    )
    assert_refused(
        truekv("generate", str(checkpoint), "x", "--chat", *short), "has no tokenizer.json, so it cannot chat"
    )
    assert_refused(truekv("chat", str(checkpoint), *short), "has no tokenizer.json, so it cannot chat")


def test_chat_with_a_checkpoint_without_a_template(truekv: Call, checkpoint: Path) -> None:
    (checkpoint / "chat_template.jinja").unlink()
    assert_refused(truekv("chat", str(checkpoint), "--max-model-len", "64"), "has no chat template, so it cannot chat")


@pytest.mark.usefixtures("no_weights")
def test_a_damaged_tokenizer(truekv: Call, checkpoint: Path) -> None:
    (checkpoint / "tokenizer.json").write_text("{")
    assert_refused(truekv("generate", str(checkpoint), "hello"), "tokenizer.json cannot be read as a tokenizer")
    (checkpoint / "tokenizer_config.json").write_text("[]")
    assert_refused(truekv("chat", str(checkpoint)), "truekv: ")


def test_invalid_utf8_in_chat(truekv: Call, dense: Path) -> None:
    assert_refused(truekv("chat", str(dense), "--max-model-len", "64", stdin=b"\xff\n"), "stdin is not valid UTF-8")


def test_refusals_need_no_torch(dense: Path) -> None:
    code = (
        "import sys; from truekv.serve import cli;"
        f"code = cli.run(['generate', {str(dense)!r}, 'hello', '--kv-cache-dtype', 'imt8']);"
        "print(code, 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "2 False\n"
    assert done.stderr.count("\n") == 1


def test_token_ids_out_of_range_and_other_wrong_tokens_are_refused_in_python(dense: Path) -> None:
    from truekv import LLM, Refused

    llm = LLM(str(dense), max_model_len=64)
    for ids in ([320], [-1], [2**70], [1.0], [None]):
        with pytest.raises(Refused, match=r"token 0 of the prompt is .*, but ids are integers from 0 to 319"):
            llm.generate([ids])
        with pytest.raises(Refused, match=r"token 0 of the prompt"):
            llm.logits(ids)
    with pytest.raises(Refused, match="chunk is 0"):
        llm.logits([1], chunk=0)
