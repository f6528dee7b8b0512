from __future__ import annotations

import io
import json
import resource
import signal
import subprocess
import sys
import time
from typing import TYPE_CHECKING

import pytest

from truekv import LLM, Refused, SamplingParams
from truekv.core.options import StructuredOutputs
from truekv.serve import progress
from truekv.serve.flags import cache_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from command_line import Outcome

    Call = Callable[..., Outcome]

QUIET = ["--max-tokens", "4", "--max-model-len", "128"]


def test_help_answers_without_torch_and_fast() -> None:
    code = (
        "import sys, time; from truekv.serve import cli; cli.run(['--help']);"
        "sys.exit('torch' in sys.modules or 'tokenizers' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
    spent = []
    for _ in range(5):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "truekv.serve.cli", "--help"]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    assert "generate" in done.stdout
    # Processor time, best of five: waiting for other processes of a busy machine is not the command's time.
    assert min(spent) < 0.5


def test_every_command_explains_itself(truekv: Call) -> None:
    for command in ("generate", "chat", "plan", "formats", "doctor", "calibrate", "demo"):
        done = truekv(command, "--help")
        assert done.code == 0
        assert f"truekv {command}" in done.out
        assert "example" in done.out.lower()
        assert f"\n {command}" not in done.out
    assert truekv("--version").out.startswith("truekv 0.")
    assert "Usage: truekv" in truekv().out


def test_generate_prints_the_answer_and_nothing_else(truekv: Call, dense: Path) -> None:
    expected = LLM(str(dense), max_model_len=128).generate("hello", SamplingParams(max_tokens=4))[0]
    done = truekv("generate", str(dense), "hello", *QUIET)
    assert (done.code, done.out, done.err) == (0, f"{expected.text}\n", "")


def test_generate_reads_the_prompt_from_stdin(truekv: Call, dense: Path) -> None:
    named = truekv("generate", str(dense), "hällo 😀\nyou", *QUIET, "--json")
    piped = truekv("generate", str(dense), "-", *QUIET, "--json", stdin="hällo 😀\nyou".encode())
    assert json.loads(named.out) == json.loads(piped.out)


def test_json_is_one_object_with_the_effective_plan(truekv: Call, dense: Path) -> None:
    done = truekv(
        "generate", str(dense), "hello", *QUIET, "--json", "--logprobs", "3", "-ctk", "q8_0", "-ctv", "q4_0"
    )  # fmt: skip
    value = json.loads(done.out)
    assert done.out.count("\n") == 1
    assert [len(place["top"]) for place in value["logprobs"]] == [3] * len(value["tokens"])
    assert [layer["formats"] for layer in value["kv_plan"]["layers"]] == [{"k": "q8_0", "v": "q4_0"}] * 2
    assert value["usage"] == {
        "prompt_tokens": 1,
        "completion_tokens": len(value["tokens"]),
        "cached_tokens": 0,
    }


def test_sampling_options_reach_the_sampler(truekv: Call, dense: Path) -> None:
    options = ["--temperature", "1.5", "--top-p", "0.9", "--top-k", "40", "--seed", "3", "--max-tokens", "8"]
    params = SamplingParams(temperature=1.5, top_p=0.9, top_k=40, seed=3, max_tokens=8)
    expected = LLM(str(dense), max_model_len=128).generate("hello", params)[0]
    done = json.loads(truekv("generate", str(dense), "hello", "--max-model-len", "128", "--json", *options).out)
    assert (done["tokens"], done["seed"]) == (expected.tokens, 3)


def test_an_empty_answer_to_bare_text_names_the_chat_template(truekv: Call) -> None:
    silent = truekv("generate", "tiny-hybrid", "What is 3 * 9 + 2 * 4?")
    assert (silent.code, silent.out) == (0, "\n")
    assert "try --chat" in silent.err
    spoken = truekv("generate", "tiny-hybrid", "What is 3 * 9 + 2 * 4?", "--chat")
    assert spoken.out == "3 * 9 + 2 * 4 = 27 + 8 = 35\n"
    assert "try --chat" not in spoken.err


def test_stop_strings_can_be_repeated(truekv: Call, dense: Path) -> None:
    text = LLM(str(dense), max_model_len=128).generate("hello", SamplingParams(max_tokens=30))[0].text
    stop = text[5:8]
    done = truekv(
        "generate", str(dense), "hello", "--max-tokens", "30", "--max-model-len", "128", "--stop", "no", "--stop", stop
    )
    assert done.out == text[: text.index(stop)] + "\n"


def test_messages_and_chat_use_the_template(truekv: Call, dense: Path, tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "hello"}]
    expected = LLM(str(dense), max_model_len=128).chat(messages, SamplingParams(max_tokens=4))
    file = tmp_path / "talk.json"
    for value in (messages, {"messages": messages, "tools": None}):
        file.write_text(json.dumps(value))
        done = truekv("generate", str(dense), "--messages", str(file), *QUIET, "--json")
        assert json.loads(done.out)["tokens"] == expected.tokens
    done = truekv("generate", str(dense), "hello", "--chat", *QUIET, "--json")
    assert json.loads(done.out)["usage"]["prompt_tokens"] == expected.usage.prompt_tokens
    assert json.loads(done.out)["tokens"] == expected.tokens


def test_logprobs_go_to_stderr_as_a_table(truekv: Call, dense: Path) -> None:
    done = truekv("generate", str(dense), "hello", *QUIET, "--logprobs", "2")
    assert "most likely" in done.err
    assert "most likely" not in done.out


def test_prompt_logprobs_are_a_table_or_numbers(truekv: Call) -> None:
    asked = ["generate", "tiny-dense", "What is 7 * 8?", *QUIET]
    tokens = LLM("tiny-dense", max_model_len=128).tokens("What is 7 * 8?")
    expected = LLM("tiny-dense", max_model_len=128).generate(tokens, SamplingParams(max_tokens=4, prompt_logprobs=2))[0]
    assert expected.prompt_logprobs is not None
    value = json.loads(truekv(*asked, "--json", "--prompt-logprobs", "2").out)
    assert [place["chosen"]["token"] for place in value["prompt_logprobs"]] == tokens[1:]
    for place, wanted in zip(value["prompt_logprobs"], expected.prompt_logprobs, strict=True):
        assert place["chosen"]["logprob"] == wanted.chosen.logprob
        assert [item["token"] for item in place["top"]] == [item.token for item in wanted.top]
    assert len(value["prompt_logprobs"][0]["top"]) == 2
    assert value["logprobs"] is None
    plain = json.loads(truekv(*asked, "--json").out)
    assert plain["prompt_logprobs"] is None
    assert plain["tokens"] == value["tokens"]
    table = truekv(*asked, "--prompt-logprobs", "0", "--logprobs", "1")
    assert table.out == truekv(*asked).out
    prompt, answer = table.err.index("token of the prompt"), table.err.rindex("most likely")
    assert prompt < answer
    shown = f"{expected.prompt_logprobs[0].chosen.logprob:.3f}"
    assert shown in table.err[prompt:answer]
    refused = truekv(*asked, "--prompt-logprobs", "21")
    assert refused.code == 2
    assert "prompt_logprobs" in refused.err


def test_the_two_spellings_of_a_cache_format() -> None:
    def join(
        both: str | None = None, k: str | None = None, v: str | None = None, *, khad: bool = False, vhad: bool = False
    ) -> str:
        return cache_dtype(both, k, v, khad=khad, vhad=vhad)

    assert join() == "auto"
    assert join("int8/kv4") == "int8/kv4"
    assert join(k="q8_0", v="q4_0") == "q8_0/q4_0"
    assert join(k="q8_0") == "q8_0/bf16"
    assert join(v="q4_0") == "bf16/q4_0"
    assert join(k="q4_0", v="q4_0", khad=True, vhad=True) == "q4_0+hadamard/q4_0+hadamard"
    assert join(k="q4_0", v="q4_0", khad=True) == "q4_0+hadamard/q4_0"
    assert join("q4_0", vhad=True) == "q4_0/q4_0+hadamard"
    for wrong in ({"both": "int8", "k": "q8_0"}, {"khad": True}):
        with pytest.raises(Refused):
            join(**wrong)


def test_hadamard_flags_run(truekv: Call, dense: Path) -> None:
    done = truekv("generate", str(dense), "hello", *QUIET, "--json", "-ctk", "q4_0", "-ctv", "q4_0", "-khad", "-vhad")
    formats = json.loads(done.out)["kv_plan"]["layers"][0]["formats"]
    assert formats == {"k": "q4_0+hadamard", "v": "q4_0+hadamard"}


def test_plan_answers_from_the_config_alone(truekv: Call, dense: Path, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((dense / "config.json").read_bytes())
    done = truekv("plan", str(tmp_path), "--json", "--kv-cache-dtype", "int8", "--memory", "1GiB")
    assert done.code == 0
    assert json.loads(done.out)["layers"][0]["bytes_per_token"] == 264
    small = truekv("plan", str(tmp_path), "--memory", "1KiB")
    assert (small.code, small.out, small.err.count("\n")) == (1, "", 1)


def test_a_command_takes_no_option_of_another(truekv: Call) -> None:
    done = truekv("generate", "tiny-hybrid", "x", "--memroy", "1")
    assert (done.code, done.out) == (2, "")
    assert done.err.count("\n") == 1
    assert "--memroy" in done.err


def test_debug_shows_the_traceback_and_only_then(truekv: Call) -> None:
    plain = truekv("generate", "tiny-hybird", "x")
    assert (plain.code, plain.err.count("\n")) == (2, 1)
    for arguments in (["--debug", "generate", "tiny-hybird", "x"], ["generate", "tiny-hybird", "x", "--debug"]):
        loud = truekv(*arguments)
        assert loud.code == 2
        assert "Traceback" in loud.err
        assert loud.err.endswith(plain.err)
    # Behind -- it is a prompt.
    assert "Traceback" not in truekv("generate", "tiny-hybird", "--", "--debug").err


def test_a_reader_that_leaves_sees_no_traceback(dense: Path) -> None:
    command = f"{sys.executable} -m truekv.serve.cli generate {dense} hello --max-tokens 100 --max-model-len 128"
    done = subprocess.run(["bash", "-c", f"{command} | head -c 1"], capture_output=True, check=False)
    assert (done.stdout != b"", done.stderr) == (True, b"")


def test_ctrl_c_ends_quietly_with_130(dense: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "truekv.serve.cli", "chat", str(dense), "--max-model-len", "128"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        # A shell's background jobs ignore it, and so would their children.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509 (takes no lock)
    )  # fmt: skip
    assert process.stdin is not None
    assert process.stdout is not None
    process.stdin.write(b"/help\n")
    process.stdin.flush()
    assert process.stdout.readline().startswith(b"/kv")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err.strip()) == (130, b"")


class Terminal(io.StringIO):
    """A terminal's stderr."""

    def isatty(self) -> bool:
        return True


def test_a_bar_appears_only_after_two_seconds_and_only_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    def show(target: io.StringIO, seconds: float) -> str:
        monkeypatch.setattr(sys, "stderr", target)
        with progress.Bar("reading the prompt") as bar:
            bar.update(1, 4)
            time.sleep(seconds)
            bar.update(2, 4)
        return target.getvalue()

    monkeypatch.setattr(progress, "PATIENCE_SECONDS", 0.3)
    assert show(Terminal(), 0.0) == ""
    assert show(io.StringIO(), 0.8) == ""
    assert "reading the prompt" in show(Terminal(), 0.8)


def test_every_sampling_flag_reaches_the_sampler(monkeypatch: pytest.MonkeyPatch, truekv: Call, tmp_path: Path) -> None:
    taken: list[SamplingParams] = []
    monkeypatch.setattr("truekv.serve.generate.run", lambda *args, **_: taken.append(args[4]))
    monkeypatch.setattr("truekv.serve.chat.run", lambda *args: taken.append(args[2]))
    numbers = {
        "max_tokens": 9, "min_tokens": 2, "temperature": 0.5, "top_p": 0.8, "top_k": 4, "min_p": 0.1,
        "repetition_penalty": 1.2, "presence_penalty": 0.3, "frequency_penalty": -0.4, "seed": 7,
    }  # fmt: skip
    flags = [part for name, value in numbers.items() for part in (f"--{name.replace('_', '-')}", str(value))]
    flags += ["--logit-bias", "3=-100", "--logit-bias", "4=1.5", "--stop-token-ids", "5", "--stop-token-ids", "6"]
    flags += ["--stop", "x", "--choice", "yes", "--choice", "no"]
    wanted = SamplingParams(
        **numbers, logit_bias={3: -100.0, 4: 1.5}, stop_token_ids=(5, 6), stop=("x",),
        structured_outputs=StructuredOutputs(choice=["yes", "no"]),
    )  # fmt: skip
    assert truekv("generate", "tiny-dense", "hello", *flags).code == 0
    assert truekv("chat", "tiny-dense", *flags).code == 0
    assert taken == [wanted, wanted]
    schema, grammar = tmp_path / "schema.json", tmp_path / "answer.lark"
    schema.write_text('{"type": "object"}')
    grammar.write_text('start: "é"', encoding="utf-8")
    for flag, value, asked in (
        ("--json-schema", str(schema), {"json": '{"type": "object"}'}),
        ("--json-schema", ' {"type": "null"}', {"json": ' {"type": "null"}'}),
        ("--grammar", str(grammar), {"grammar": 'start: "é"'}),
        ("--regex", "a+", {"regex": "a+"}),
    ):
        assert truekv("generate", "tiny-dense", "hello", flag, value).code == 0
        assert taken.pop() == SamplingParams(logit_bias={}, structured_outputs=StructuredOutputs(**asked))


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--logit-bias", "3"], "--logit-bias is '3', but must be ID=BIAS"),
        (["--json-schema", "nowhere.json"], "--json-schema names nowhere.json, which cannot be read: No such file"),
        (["--regex", "a", "--choice", "b"], "structured_outputs names regex and choice"),
        (["--min-tokens", "300"], "min_tokens is 300"),
        (["--regex", "("], "unclosed group"),
        (["--stop-token-ids", "99999"], "stop_token_ids names token 99999"),
    ],
)
def test_bad_sampling_flags_are_one_sentence(truekv: Call, dense: Path, flags: list[str], says: str) -> None:
    done = truekv("generate", str(dense), "hello", *QUIET, *flags)
    assert (done.code, done.out, done.err.count("\n")) == (2, "", 1)
    assert says in done.err
