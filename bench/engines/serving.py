"""truekv's engine with requests that come and go: what bench.serve_engine measures."""

from __future__ import annotations

import json
import random
import time
from collections import defaultdict
from contextlib import ExitStack, contextmanager, nullcontext
from typing import TYPE_CHECKING, Any, Final
from unittest import mock

from bench.fill import fill
from bench.wire import serve, some_prompt, some_token
from truekv import LLM, SamplingParams
from truekv.core.lazy import torch
from truekv.engine.answer import Answer
from truekv.engine.events import Ended, Failed, Sampled
from truekv.engine.generate import Engine
from truekv.engine.sample import Sampler
from truekv.tiny import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Generator
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence
    from truekv.engine.events import Event

SPREAD: Final = (0.5, 1.5)
"""Lengths of requests that come and go, in parts of the length asked for."""
BYTES: Final = dict.fromkeys(range(some_token(0), some_token(0) + 256), 100.0)
"""A bias that leaves 256 tokens: whatever is drawn next has been drawn before, and was followed by something else."""
FEW: Final = {token: BYTES[token] for token in list(BYTES)[:4]}
"""One that leaves four: the likeliest of them make runs and loops."""
EXAMPLES: Final = 8
"""Questions to an embedded model."""


class Served:
    """Implements bench.wire.Serving, and what truekv alone is asked."""

    def __init__(self, llm: LLM) -> None:
        """Take a loaded model."""
        self._llm = llm
        self._engine: Engine = llm._engine  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

    def batch(self, sequences: int, prompt: int, answer: int) -> tuple[float, float]:
        """See bench.wire.Serving."""
        prompts = [some_prompt(request, prompt) for request in range(sequences)]
        start = time.perf_counter()
        waiting = {self._add(tokens, answer) for tokens in prompts}
        running, middle = len(waiting), start
        while running:
            events = self._step()
            running -= sum(isinstance(event, Ended) for event in events)
            if waiting:
                waiting -= {event.request for event in events}.intersection(
                    event.request for event in events if isinstance(event, Sampled)
                )
                middle = time.perf_counter()
        return middle - start, time.perf_counter() - middle

    def deep(self, sequences: int, depth: int, answer: int) -> float:
        """See bench.wire.Serving."""
        engine = self._engine
        filled = fill(engine.runner.arena, depth, sequences)
        memory = engine._memory  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]

        def opened(_request: object) -> Sequence:
            return filled.pop()

        def new_pages(_request: object) -> int:
            return 1

        # As after a hit in the prefix cache: all but the last token of a prompt are there, in pages of their own.
        with mock.patch.multiple(memory, open=opened, new_pages=new_pages):
            for request in range(sequences):
                self._add(some_prompt(request, depth + 1), answer + 1)
            self._step()
        assert not filled
        start = time.perf_counter()
        while sequences:
            sequences -= sum(isinstance(event, Ended) for event in self._step())
        return time.perf_counter() - start

    def arrivals(self, requests: int, concurrent: int, prompt: int, answer: int) -> dict[str, float]:
        """Keep `concurrent` requests of many lengths going until so many are answered: seconds by what they went to.

        `tokens` are those of prompts and answers together, `steps` all seconds of the engine's steps.
        """
        drawn = random.Random(requests)  # noqa: S311 (lengths, not a secret)

        def some(length: int) -> int:
            return max(1, round(length * drawn.uniform(*SPREAD)))

        sizes = [(some(prompt), some(answer)) for _ in range(requests)]
        queue = [(some_prompt(request, size), most) for request, (size, most) in enumerate(sizes)]
        tokens = sum(map(sum, sizes))
        with parts(self._engine) as spent:
            running = 0
            start = time.perf_counter()
            while running or queue:
                while queue and running < concurrent:
                    self._add(*queue.pop(0))
                    running += 1
                begin = time.perf_counter()
                running -= sum(isinstance(event, Ended) for event in self._step())
                spent["steps"] += time.perf_counter() - begin
            return {**spent, "seconds": time.perf_counter() - start, "tokens": tokens}

    def first_token(self, shared: int, own: int, request: int) -> tuple[float, int]:
        """Return seconds to the first token of a prompt whose first `shared` tokens all have; tokens cached."""
        tokens = some_prompt(0, shared) + some_prompt(1 + request, own)
        start = time.perf_counter()
        added = self._engine.add(tokens, SamplingParams(max_tokens=1, ignore_eos=True))
        for _ in self._engine.run([added]):
            pass
        return time.perf_counter() - start, added.cached or 0

    def answers(self, text: str, prompt: int, answer: int, *, guesses: bool) -> dict[str, Any]:
        """Answer the prompts of a text one by one: seconds after their first tokens, all tokens, drafts by place.

        Without `guesses` the engine makes no drafts; nothing else about it changes.
        `repeats`: one prompt, each token of the answer the likeliest of four. `drawn`: one prompt, all its tokens and
        those of the answer drawn from the same 256. `tasks`: held-out questions to an embedded model, of the lengths
        they have.
        """
        with nullcontext() if guesses else mock.patch.object(self._engine, "drafting", None):
            before = self._engine.stats
            seconds, said = 0.0, list[int]()
            for asked, params in self._prompts(text, prompt, answer):
                added = self._engine.add(asked, params)
                start = 0.0
                for _ in self._engine.run([added]):
                    start = start or (time.perf_counter() if added.generated else 0.0)
                seconds += time.perf_counter() - start
                said += added.generated
            after = self._engine.stats
        return {
            "seconds": seconds,
            "tokens": said,
            "drafted": _since(before.drafted, after.drafted),
            "accepted": _since(before.accepted, after.accepted),
        }

    def _prompts(self, text: str, prompt: int, answer: int) -> list[tuple[Seq[int], SamplingParams]]:
        if text == "repeats":
            return [(some_prompt(0, prompt), SamplingParams(max_tokens=answer, ignore_eos=True, logit_bias=FEW))]
        if text == "drawn":
            params = SamplingParams(max_tokens=answer, ignore_eos=True, temperature=1.0, seed=0, logit_bias=BYTES)
            return [(some_prompt(0, prompt), params)]
        asked = [one for task in tasks.TASKS for one in tasks.examples(task, "heldout", 9, EXAMPLES)]
        return [
            (self._llm.tokens(self._llm.conversation(one.messages, one.tools)), SamplingParams(max_tokens=answer))
            for one in asked
        ]

    def _add(self, prompt: Seq[int], answer: int) -> int:
        return self._engine.add(prompt, SamplingParams(max_tokens=answer, ignore_eos=True)).identity

    def _step(self) -> list[Event]:
        events = self._engine.step()
        failed = next((event for event in events if isinstance(event, Failed)), None)
        if failed is not None:
            raise failed.error
        return events


def _since(before: tuple[int, ...], after: tuple[int, ...]) -> list[int]:
    return [now - then for then, now in zip(before or (0,) * len(after), after, strict=True)]


@contextmanager
def parts(engine: Engine) -> Generator[dict[str, float]]:
    """Time what a step consists of; what one part calls counts for the inner one alone."""
    spent: dict[str, float] = defaultdict(float)
    inner = [0.0]

    def timed(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:  # noqa: ANN401 (whatever it takes)
            inner.append(0.0)
            begin = time.perf_counter()
            try:
                return call(*arguments, **named)
            finally:
                whole = time.perf_counter() - begin
                spent[name] += whole - inner.pop()
                inner[-1] += whole

        return run

    places: list[tuple[str, Any, str]] = [
        ("schedule", Engine, "_admit"),
        ("schedule", type(engine.schedule), "shares"),
        ("layout", type(engine.runner.arena), "reserve"),
        ("model", type(engine.runner), "run"),
        ("answer", Answer, "after"),
        ("sampling", Engine, "_drawn"),
        ("sampling", Sampler, "choose"),
        ("memory", type(engine.runner.arena), "advance"),
    ]
    if engine.drafting:
        places.append(("drafting", type(engine.drafting), "follow"))
    if engine.observer:
        places += [("guards", type(engine.observer), name) for name in ("before_step", "after_tokens")]
    with ExitStack() as stack:
        for name, owner, method in places:
            stack.enter_context(mock.patch.object(owner, method, timed(name, getattr(owner, method))))
        yield spent


def start(model: str, threads: int, options: str) -> tuple[Served, str]:
    """Load a model with the engine's options, as JSON."""
    torch.set_num_threads(threads)
    llm = LLM(model, **json.loads(options))
    kernels = sorted(set(llm.kv_plan["kernels"].values()))
    return Served(llm), f"kernels: {', '.join(kernels)}"


if __name__ == "__main__":
    serve(start)
