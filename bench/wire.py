"""An engine in a process of its own, so that each has its own memory, threads and libraries.

Requests and answers are JSON, one a line, over standard input and output. This file runs in the peers'
environments too, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

if TYPE_CHECKING:
    from collections.abc import Callable

ROOT = Path(__file__).parent.parent


class EngineFailed(Exception):
    """The engine's process said why it cannot go on."""


class Engine(Protocol):
    """What is measured. Every time is in seconds of wall clock, for one thing done once."""

    def fill(self, depth: int, sequences: int) -> None:
        """Forget everything, then give so many sequences a cache of `depth` tokens each."""
        ...

    def decode(self, steps: int) -> list[float]:
        """Add so many tokens to every sequence, one greedy step after the other; the time of each step."""
        ...

    def append(self, tokens: int) -> float:
        """Prefill so many tokens at the end of the first sequence."""
        ...

    def logits(self) -> list[float]:
        """Return the logits after the last token."""
        ...


class Serving(Protocol):
    """What answers several requests at once."""

    def batch(self, sequences: int, prompt: int, answer: int) -> tuple[float, float]:
        """Answer so many requests that come together; seconds until all have a first token, and seconds after.

        Every prompt has `prompt` tokens of its own, every answer `answer` tokens, each the likeliest.
        """
        ...

    def deep(self, sequences: int, depth: int, answer: int) -> float:
        """Give so many requests caches of `depth` tokens without their prefill; seconds of `answer` more of each."""
        ...


class Worker:
    """The client's end: starts the engine's process and calls it."""

    def __init__(self, python: str, module: str, model: str, **options: str | int) -> None:
        """Start `python -m module`, which loads `model` with the engine's own options."""
        self._process = subprocess.Popen(  # noqa: S603 (our own command)
            [python, "-m", module, json.dumps({"model": model, **options})],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        try:
            self.version: str = self._answer()
        except EngineFailed:
            self.__exit__()
            raise

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(self, *_error: object) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()

    def fill(self, depth: int, sequences: int = 1) -> None:
        """See Engine; the peak of memory is counted from the end of this call on."""
        self._call("fill", depth=depth, sequences=sequences)

    def decode(self, steps: int) -> list[float]:
        """See Engine."""
        return self._call("decode", steps=steps)

    def append(self, tokens: int) -> float:
        """See Engine."""
        return self._call("append", tokens=tokens)

    def logits(self) -> list[float]:
        """See Engine."""
        return self._call("logits")

    def peak(self) -> int:
        """Most bytes that were resident since the last fill, weights included."""
        return self._call("peak")

    def batch(self, sequences: int, prompt: int, answer: int) -> tuple[float, float]:
        """See Serving."""
        first, rest = self._call("batch", sequences=sequences, prompt=prompt, answer=answer)
        return first, rest

    def deep(self, sequences: int, depth: int, answer: int) -> float:
        """See Serving."""
        return self._call("deep", sequences=sequences, depth=depth, answer=answer)

    def arrivals(self, requests: int, concurrent: int, prompt: int, answer: int) -> dict[str, float]:
        """See bench.engines.serving.Served."""
        return self._call("arrivals", requests=requests, concurrent=concurrent, prompt=prompt, answer=answer)

    def first_token(self, shared: int, own: int, request: int) -> tuple[float, int]:
        """See bench.engines.serving.Served."""
        seconds, cached = self._call("first_token", shared=shared, own=own, request=request)
        return seconds, cached

    def answers(self, text: str, prompt: int, answer: int, *, guesses: bool) -> dict[str, Any]:
        """See bench.engines.serving.Served."""
        return self._call("answers", text=text, prompt=prompt, answer=answer, guesses=guesses)

    def _call(self, verb: str, **arguments: int | str) -> Any:  # noqa: ANN401 (JSON)
        assert self._process.stdin
        try:
            self._process.stdin.write(json.dumps([verb, arguments]) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass
        return self._answer()

    def _answer(self) -> Any:  # noqa: ANN401 (JSON)
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise EngineFailed(f"{' '.join(self._process.args[:3])} ended without an answer")  # type: ignore[index]
        answer = json.loads(line)
        if "error" in answer:
            raise EngineFailed(answer["error"])
        return answer["value"]


def serve(start: Callable[..., tuple[Engine | Serving, str]]) -> None:
    """Run an engine's end: `start(**options)` returns the engine and its version."""
    # What libraries print goes to stderr; answers alone go to stdout.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: object) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    try:
        engine, version = start(**json.loads(sys.argv[1]))
        answer(value=version)
        for line in sys.stdin:
            verb, arguments = json.loads(line)
            if verb == "peak":
                answer(value=peak_bytes())
                continue
            value = getattr(engine, verb)(**arguments)
            if verb == "fill":
                peak_bytes(reset=True)
            answer(value=value)
    except Exception as error:  # noqa: BLE001 (whatever it is, the other end prints it)
        answer(error=f"{type(error).__name__}: {error}")


def some_token(place: int) -> int:
    """Return the id that stands at a place of a prompt: a byte of text in the vocabulary of every checkpoint here."""
    return 4 + place % 256


def some_prompt(request: int, tokens: int) -> list[int]:
    """Return a prompt of bytes drawn at random, another one for every request."""
    drawn = random.Random(request)  # noqa: S311 (a seeded prompt, not a secret)
    return [some_token(drawn.randrange(256)) for _ in range(tokens)]


def peak_bytes(*, reset: bool = False) -> int:
    """Most memory this process had resident since it started, or since the last reset; needs Linux."""
    status = Path("/proc/self/status").read_text().splitlines()
    peak = next(line for line in status if line.startswith("VmHWM"))
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(peak.split()[1]) * 1024
