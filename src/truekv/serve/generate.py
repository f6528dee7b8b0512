"""`truekv generate`: one prompt in, one answer out, streamed as it is made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from truekv.core.options import EngineOptions, SamplingParams
    from truekv.serve.llm import LLM, Position, Result, TokenLogprob


def run(
    model: str,
    prompt: str | None,
    messages: str | None,
    options: EngineOptions,
    params: SamplingParams,
    *,
    chat: bool,
    as_json: bool,
) -> None:
    """Read the prompt, load the model, generate, and print text or one JSON object."""
    from truekv.serve.llm import LLM

    conversation, tools, text = read_prompt(prompt, messages, chat=chat)
    llm = LLM.open(model, options)
    tokens = llm.conversation(conversation, tools) if conversation else llm.tokens(text)
    out = None if as_json else Printer(sys.stdout)
    result = answer(llm, tokens, params, out)
    if as_json:
        import msgspec

        sys.stdout.write(msgspec.json.encode(result).decode() + "\n")
    else:
        if result.text is None:
            sys.stdout.write(" ".join(map(str, result.tokens)))
        sys.stdout.write("\n")
        if result.text == "" and llm.converses and not conversation:
            sys.stderr.write("the model ended its answer at once: it was made for conversations, so try --chat\n")
        for what, positions in (("token of the prompt", result.prompt_logprobs), ("token", result.logprobs)):
            if positions is not None:
                print_logprobs(what, positions)


def answer(llm: LLM, tokens: list[int], params: SamplingParams, out: Printer | None) -> Result:
    """Generate for one prompt and print text as it comes; a bar shows when the prompt takes long to read."""
    from truekv.engine.events import Sampled, Stored
    from truekv.serve.progress import Bar

    shown = 0
    with Bar("reading the prompt") as bar:
        for event in llm.stream(tokens, params):
            match event:
                case Stored():
                    bar.update(event.done, event.total)
                case Sampled():
                    bar.close()
                    shown += len(event.text)
                    if out:
                        out.write(event.text)
                case _:
                    if out and event.text is not None:
                        out.write(event.text[shown:])
                    return event
    raise AssertionError("a stream ends with a result or an exception")


class Printer:
    """Writes text as it comes; on a terminal without control characters, which could do more than print."""

    def __init__(self, target: TextIO) -> None:
        """Write to `target`."""
        self._target = target
        self._terminal = target.isatty()

    def write(self, text: str) -> None:
        """Print and flush."""
        if self._terminal:
            text = "".join(letter for letter in text if letter in "\n\t" or letter.isprintable())
        self._target.write(text)
        self._target.flush()


def read_prompt(
    prompt: str | None, messages: str | None, *, chat: bool
) -> tuple[list[dict[str, Any]] | None, list[dict[str, Any]] | None, str]:
    """Return (messages, tools, "") or (None, None, text) from what the command line names."""
    from truekv.serve.messages import decode

    if (prompt is None) == (messages is None):
        raise Refused("give either a PROMPT ('-' reads it from stdin) or --messages FILE")
    if messages is not None:
        conversation, tools = read_messages(messages)
        return conversation, tools, ""
    text = decode(sys.stdin.buffer.read(), "stdin") if prompt == "-" else cast("str", prompt)
    if not text:
        raise Refused(f"the prompt{' on stdin' if prompt == '-' else ''} is empty; give at least one character")
    return ([{"role": "user", "content": text}], None, "") if chat else (None, None, text)


def read_messages(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]] | None]:
    """Read a conversation from a JSON file: a list of messages, or {"messages": [...], "tools": [...]}."""
    from truekv.serve.messages import check_messages, check_tools, decode

    path = Path(name)
    try:
        data = sys.stdin.buffer.read() if name == "-" else path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read: {error.strerror}") from error
    try:
        value: Any = json.loads(decode(data, name))
    except (ValueError, RecursionError) as error:
        raise Refused(f"{name} is not valid JSON: {error}") from error
    found = cast("dict[str, Any]", value) if isinstance(value, dict) else {"messages": value}
    return check_messages(found.get("messages"), f"{name}: messages"), check_tools(found.get("tools"))


def print_logprobs(what: str, positions: list[Position]) -> None:
    """Print one line for each token, on stderr: the answer itself stays alone on stdout."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(what, "logprob", "most likely")
    for position in positions:
        best = "  ".join(f"{_shown(item)} {item.logprob:.3f}" for item in position.top)
        table.add_row(Text(_shown(position.chosen)), f"{position.chosen.logprob:.3f}", Text(best))
    Console(stderr=True).print(table)


def _shown(item: TokenLogprob) -> str:
    return str(item.token) if item.text is None else repr(item.text)
