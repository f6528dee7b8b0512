"""`truekv chat`: a conversation in the terminal, with what the cache holds one command away."""

from __future__ import annotations

import importlib
import sys
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from truekv.core.errors import Refused
from truekv.core.folder import choose
from truekv.serve.generate import Printer, answer

if TYPE_CHECKING:
    from truekv.core.options import EngineOptions, SamplingParams
    from truekv.serve.llm import LLM

_HELP: Final = {
    "/kv": "show the effective KV format and bytes of every layer",
    "/stats": "show tokens, speed and how full the context is",
    "/reset": "forget the conversation",
    "/help": "show this list",
    "/quit": "leave (or Ctrl-D)",
}


@dataclass(slots=True)
class Stats:
    """What `/stats` tells."""

    turns: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    seconds: float = 0.0


class Chat:
    """One conversation with one model."""

    def __init__(self, llm: LLM, params: SamplingParams, system: str | None) -> None:
        """`system`: the system prompt, if any."""
        self.llm = llm
        self.params = params
        self._start: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
        self.messages = list(self._start)
        self.stats = Stats()

    def say(self, text: str, out: Printer) -> None:
        """Answer one message; a refused message is not part of the conversation."""
        asked = [*self.messages, {"role": "user", "content": text}]
        began = time.monotonic()
        result = answer(self.llm, self.llm.conversation(asked), self.params, out)
        out.write("\n")
        self.messages = [*asked, {"role": "assistant", "content": result.text}]
        self.stats = Stats(
            self.stats.turns + 1,
            result.usage.prompt_tokens,
            result.usage.cached_tokens,
            result.usage.completion_tokens,
            time.monotonic() - began,
        )

    def command(self, text: str, out: Printer) -> bool:
        """Run one /command; returns whether the conversation goes on."""
        name = choose("command", text.split(maxsplit=1)[0], {name: name for name in _HELP})
        match name:
            case "/kv":
                out.write(kv_table(self.llm.kv_plan))
            case "/stats":
                out.write(self._stats())
            case "/reset":
                self.messages, self.stats = list(self._start), Stats()
                out.write("the conversation is forgotten\n")
            case "/quit":
                return False
            case _:
                out.write("".join(f"{name:8}{what}\n" for name, what in _HELP.items()))
        return True

    def _stats(self) -> str:
        stats, used = self.stats, self.stats.prompt_tokens + self.stats.completion_tokens
        speed = stats.completion_tokens / stats.seconds if stats.seconds else 0.0
        drafted, accepted = (sum(self.llm.stats[name]) for name in ("drafted", "accepted"))
        guesses = f"; {accepted} of {drafted} drafts accepted" if drafted else ""
        return (
            f"turns {stats.turns}; last answer: {stats.prompt_tokens} tokens read, {stats.cached_tokens} of them from "
            f"the cache, {stats.completion_tokens} written in {stats.seconds:.1f} s ({speed:.1f} tokens/s){guesses}; "
            f"context {used} of {self.llm.max_model_len} tokens\n"
        )


def run(model: str, options: EngineOptions, params: SamplingParams, system: str | None) -> None:
    """Read lines from the terminal (or a pipe) until they end."""
    from truekv.serve.llm import LLM

    chat = Chat(LLM.open(model, options), params, system)
    # A model that cannot chat says so now, not after the first message was typed.
    chat.llm.conversation([{"role": "user", "content": "Hello"}])
    out = Printer(sys.stdout)
    interactive = sys.stdin.isatty()
    if interactive:
        importlib.import_module("readline")  # gives input() line editing and history

        out.write(f"{model}, context {chat.llm.max_model_len} tokens; /help lists the commands\n")
    while (line := _read_line(interactive=interactive)) is not None:
        try:
            if line.startswith("/"):
                if not chat.command(line, out):
                    return
            elif line:
                chat.say(line, out)
        except Refused as error:
            if not interactive:
                raise
            sys.stderr.write(f"{error}\n")
        except KeyboardInterrupt:
            if not interactive:
                raise
            out.write("\n(stopped; this turn is not part of the conversation)\n")


def _read_line(*, interactive: bool) -> str | None:
    """Return the next line without blanks around it; None at the end."""
    from truekv.serve.messages import decode

    if interactive:
        try:
            return input("> ").strip()
        except EOFError:
            return None
    data = sys.stdin.buffer.readline()
    return decode(data, "stdin").strip() if data else None


def kv_table(plan: dict[str, Any]) -> str:
    """Lay out the plan of `LLM.kv_plan`: one line for each layer, then the sums."""
    lines = [f"{'layer':>5}  {'kind':10} {'format':28} {'bytes':>20}\n"]
    for layer in plan["layers"]:
        formats: dict[str, str] = layer.get("formats") or {}
        names = ", ".join(f"{field} {name}" for field, name in formats.items()) or "-"
        per = f"{layer['bytes_per_token']} per token" if layer.get("bytes_per_token") else ""
        size = per or (f"{layer['state_bytes']} per sequence" if layer.get("state_bytes") else "-")
        lines.append(f"{layer['index']:>5}  {layer['kind']:10} {names:28} {size:>20}\n")
    lines.append(
        f"{plan['pages']} pages of {plan['page_tokens']} tokens, {plan['page_bytes']} bytes each (all layers); "
        f"{plan['state_bytes_per_sequence']} bytes of state per sequence\n"
    )
    return "".join(lines)
