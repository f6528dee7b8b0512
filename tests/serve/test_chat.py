from __future__ import annotations

import re
from typing import TYPE_CHECKING

from truekv import LLM, SamplingParams
from truekv.serve.chat import kv_table

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from command_line import Outcome

    Call = Callable[..., Outcome]

QUIET = ["--max-tokens", "5", "--max-model-len", "256"]
PARAMS = SamplingParams(max_tokens=5)


def play(model: Path, system: str | None, *lines: str) -> str:
    """What a conversation prints, from `LLM.chat` alone."""
    llm = LLM(str(model), max_model_len=256)
    messages = [{"role": "system", "content": system}] if system else []
    out = ""
    for line in lines:
        messages.append({"role": "user", "content": line})
        answer = llm.chat(messages, PARAMS).text
        messages.append({"role": "assistant", "content": answer})
        out += f"{answer}\n"
    return out


def test_a_conversation_remembers_its_turns(truekv: Call, hybrid: Path) -> None:
    done = truekv("chat", str(hybrid), *QUIET, "--system", "Be brief.", stdin="hello\n\nand you? 😀\n".encode())
    assert (done.code, done.err) == (0, "")
    assert done.out == play(hybrid, "Be brief.", "hello", "and you? 😀")


def test_reset_forgets_all_but_the_system_prompt(truekv: Call, dense: Path) -> None:
    done = truekv("chat", str(dense), *QUIET, "--system", "Be brief.", stdin=b"hello\n/reset\nagain\n/quit\nnever\n")
    first, second = play(dense, "Be brief.", "hello"), play(dense, "Be brief.", "again")
    assert done.out == f"{first}the conversation is forgotten\n{second}"


def test_kv_shows_the_effective_formats_and_bytes(truekv: Call, hybrid: Path) -> None:
    options = ["--kv-cache-dtype", "int8/q4_0", "--dtype", "float32"]
    done = truekv("chat", str(hybrid), *QUIET, *options, stdin=b"/kv\n")
    lines = done.out.splitlines()
    assert [line.split()[:2] for line in lines[1:5]] == [
        ["0", "recurrent"],
        ["1", "recurrent"],
        ["2", "recurrent"],
        ["3", "paged"],
    ]
    # Two heads of 64: 64 + 2 bytes for an int8 row, two blocks of 18 for a q4_0 row.
    assert re.search(r"k int8, v q4_0 +204 per token$", lines[4])
    plan = LLM(str(hybrid), kv_cache_dtype="int8/q4_0", max_model_len=256, max_num_seqs=1).kv_plan
    assert done.out == kv_table(plan)
    assert f"{plan['state_bytes_per_sequence']} bytes of state per sequence" in done.out


def test_stats_count_the_last_turn(truekv: Call, dense: Path) -> None:
    done = truekv("chat", str(dense), *QUIET, stdin=b"/stats\nhello\n/stats\n")
    assert done.out.startswith("turns 0; ")
    prompt = len(LLM(str(dense), max_model_len=256).conversation([{"role": "user", "content": "hello"}]))
    stats = re.search(
        r"turns 1; last answer: (\d+) tokens read, \d+ of them from the cache, (\d+) written .* context (\d+) of 256",
        done.out,
    )
    assert stats is not None
    read, written, used = map(int, stats.groups())
    assert read == prompt
    assert 1 <= written <= 5
    assert used == read + written


def test_commands_are_listed_and_typos_are_caught(truekv: Call, dense: Path) -> None:
    done = truekv("chat", str(dense), *QUIET, stdin=b"/help\n")
    assert [line.split()[0] for line in done.out.splitlines()] == ["/kv", "/stats", "/reset", "/help", "/quit"]
    done = truekv("chat", str(dense), *QUIET, stdin=b"/stat\n")
    assert (done.code, done.err) == (2, "truekv: unknown command '/stat': did you mean '/stats'?\n")


def test_a_conversation_that_outgrows_the_context_is_refused_with_numbers(truekv: Call, dense: Path) -> None:
    done = truekv("chat", str(dense), "--max-model-len", "64", "--max-tokens", "5", stdin=b"x" * 80 + b"\n")
    assert done.code == 2
    assert re.search(r"the prompt has \d+ tokens, but the context holds 64", done.err)
    assert done.out == ""
