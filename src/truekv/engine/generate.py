"""The loop: requests in, events out. Every request that ends gives its memory back at once."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from truekv.core.batch import Chunk
from truekv.core.errors import ConstraintFailed, Corrupted, Refused
from truekv.engine.constrain import Grammars
from truekv.engine.sample import Logprob, Sampler, logprob
from truekv.engine.schedule import Request, Schedule
from truekv.engine.tokens import StopStrings, TextStream

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from truekv.core.lazy import torch
    from truekv.core.options import SamplingParams
    from truekv.engine.run import Runner
    from truekv.engine.schedule import Share
    from truekv.engine.tokens import Tokenizer


@dataclass(frozen=True, slots=True)
class Stored:
    """A step stored prompt tokens: `done` of `total` are in memory."""

    request: int
    done: int
    total: int


@dataclass(frozen=True, slots=True)
class Sampled:
    """A token was chosen; `text` is what became certain with it (empty inside a character or a possible stop)."""

    request: int
    token: int
    text: str
    logprob: Logprob | None


@dataclass(frozen=True, slots=True)
class Ended:
    """The answer is complete; `text` is what had been held back."""

    request: int
    reason: Literal["stop", "length"]
    text: str


@dataclass(frozen=True, slots=True)
class Failed:
    """The request ended without a complete answer; the others go on."""

    request: int
    error: Corrupted | ConstraintFailed


Event = Stored | Sampled | Ended | Failed


class Answer:
    """What one request needs between steps besides its place in the schedule."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, sampler: Sampler) -> None:
        """Prepare text and stop strings for a request."""
        self.request = request
        self.sampler = sampler
        self._text = TextStream(tokenizer, request.prompt) if tokenizer else None
        self._stops = StopStrings(request.params.stop)

    def take(self, logits_V: torch.Tensor) -> Iterator[Event]:
        """Choose the next token from its logits and say what follows from it."""
        request, params = self.request, self.request.params
        token = self.sampler.choose(logits_V)
        request.tokens.append(token)
        report = logprob(logits_V, token, params.logprobs) if params.logprobs else None
        ended = token in self.sampler.ends
        text, stopped = self._stops.push(self._text.push(token)) if self._text and not ended else ("", False)
        yield Sampled(request.identity, token, text, report)
        if stopped:
            yield Ended(request.identity, "stop", "")
        elif ended or self.sampler.finished:
            yield Ended(request.identity, "stop", self._rest()[0])
        elif len(request.generated) == request.limit:
            text, stopped = self._rest()
            yield Ended(request.identity, "stop" if stopped else "length", text)

    def _rest(self) -> tuple[str, bool]:
        """Return the text held back and whether the unfinished character at its end completed a stop string."""
        text, stopped = self._stops.push(self._text.flush()) if self._text else ("", False)
        return (text, True) if stopped else (text + self._stops.flush(), False)


class Engine:
    """Runs requests together, one ragged step after the other, until all have ended."""

    def __init__(
        self,
        runner: Runner,
        schedule: Schedule,
        tokenizer: Tokenizer | None,
        *,
        ends: frozenset[int],
        max_model_len: int,
    ) -> None:
        """Bind the runner and the schedule; `tokenizer` is None for checkpoints without one."""
        self.runner = runner
        self.schedule = schedule
        self.tokenizer = tokenizer
        self.ends = ends
        self.max_model_len = max_model_len
        self._answers: dict[int, Answer] = {}
        self._identities = itertools.count()
        self._grammars = Grammars(tokenizer, runner.model.spec.vocab_size, ends)

    def add(self, prompt: Sequence[int], params: SamplingParams) -> Request:
        """Queue a prompt of token ids; Refused when it is empty, unknown to the model or does not fit."""
        self.check(prompt, params)
        limit = min(params.max_tokens, self.max_model_len - len(prompt))
        request = Request(next(self._identities), tuple(prompt), params, limit, list(prompt))
        sampler = self._sampler(prompt, params)
        self.schedule.add(request)
        self._answers[request.identity] = Answer(request, self.tokenizer, sampler)
        return request

    def _sampler(self, prompt: Sequence[int], params: SamplingParams) -> Sampler:
        asked = params.structured_outputs
        constraint = self._grammars.compile(asked) if asked else None
        ends = frozenset[int]() if params.ignore_eos else self.ends
        return Sampler(params, prompt, self.runner.model.spec.vocab_size, ends, constraint)

    def add_all(self, prompts: Iterable[tuple[Sequence[int], SamplingParams]]) -> list[Request]:
        """Queue all of several prompts, or none when one of them is refused."""
        added: list[Request] = []
        try:
            for prompt, params in prompts:
                added.append(self.add(prompt, params))
        except Refused:
            for request in added:
                self.abort(request)
            raise
        return added

    def check(self, prompt: Sequence[int], params: SamplingParams | None = None, room: int = 1) -> None:
        """Refuse a prompt that cannot be run, with the numbers that say why; `room`: tokens to come after it."""
        check_ids(prompt, self.runner.model.spec.vocab_size)
        if len(prompt) + room > self.max_model_len:
            raise Refused(
                f"the prompt has {len(prompt)} tokens, but the context holds {self.max_model_len}"
                f"{f' and the answer needs at least {room}' if room else ''}; shorten it or raise max_model_len"
            )
        if params and params.stop and self.tokenizer is None:
            raise Refused("stop strings need a tokenizer, and this checkpoint has no tokenizer.json")

    def seed(self, request: Request) -> int | None:
        """Return the seed a request draws from; None when it is greedy and none was given."""
        return self._answers[request.identity].sampler.seed

    def abort(self, request: Request) -> None:
        """End a request now and give its memory back; nothing happens if it has ended already."""
        if self._answers.pop(request.identity, None) is not None:
            self.schedule.end(request)
            self._release(request)

    def run(self, requests: Sequence[Request]) -> Iterator[Event]:
        """Step until these requests have ended; leaving the iterator early aborts those that have not."""
        try:
            while any(request.identity in self._answers for request in requests):
                yield from self.step()
        finally:
            for request in requests:
                self.abort(request)

    def step(self) -> list[Event]:
        """Run one step of whatever is due and return what happened."""
        for request in self.schedule.admit():
            request.held = self.runner.arena.open()
        shares = self.schedule.shares()
        chunks = [_chunk(share) for share in shares]
        try:
            rows = self.runner.step(chunks, [int(share.samples) for share in shares])
        except Corrupted as error:
            return self._suspect(shares, error)
        events: list[Event] = []
        for share, logits_NV in zip(shares, rows, strict=True):
            events.extend(self._after(share, logits_NV))
        return events

    def _after(self, share: Share, logits_NV: torch.Tensor | Corrupted) -> Iterator[Event]:
        """Turn one request's share of a finished step into events."""
        request = share.request
        if isinstance(logits_NV, Corrupted):
            yield self._fail(request, logits_NV)
            return
        held = request.held
        assert held is not None
        if held.position >= request.alone:
            request.alone = 0
        if not request.generated:
            yield Stored(request.identity, held.position, len(request.prompt))
        if not share.samples:
            return
        try:
            for event in self._answers[request.identity].take(logits_NV[0]):
                if isinstance(event, Ended):
                    self.abort(request)
                yield event
        except ConstraintFailed as error:
            yield self._fail(request, error)

    def _suspect(self, shares: list[Share], error: Corrupted) -> list[Event]:
        """After a step that failed as a whole, find out whose fault it was.

        Recurrent state may hold half of the step, so everyone in it starts again from its tokens,
        one at a time up to the point of failure. The innocent lose time and nothing else.
        """
        if len(shares) == 1:
            return [self._fail(shares[0].request, error)]
        for share in reversed(shares):
            request = share.request
            assert request.held is not None
            request.alone = request.held.position + share.count
            self._release(request)
            self.schedule.again(request)
        return []

    def _fail(self, request: Request, error: Corrupted | ConstraintFailed) -> Failed:
        self.abort(request)
        return Failed(request.identity, error)

    def _release(self, request: Request) -> None:
        if request.held is not None:
            self.runner.arena.close(request.held)
            request.held = None


def check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Refuse an empty prompt and ids that the model does not have."""
    if not prompt:
        raise Refused("the prompt is empty; give at least one token")
    for place, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refused(f"token {place} of the prompt is {token!r}, but ids are integers from 0 to {vocab_size - 1}")


def _chunk(share: Share) -> Chunk:
    request = share.request
    assert request.held is not None
    start = request.held.position
    return Chunk(request.held, request.tokens[start : start + share.count])
