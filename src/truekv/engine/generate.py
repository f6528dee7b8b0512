"""The loop: requests in, events out. Every request that ends gives its memory back at once."""

from __future__ import annotations

import itertools
import logging
from typing import TYPE_CHECKING, NamedTuple

from truekv.core.batch import Chunk
from truekv.core.errors import ConstraintFailed, Corrupted, OutOfMemory, Refused
from truekv.core.lazy import torch
from truekv.engine.answer import Answer
from truekv.engine.constrain import Grammars
from truekv.engine.events import Ended, Event, Failed
from truekv.engine.request import Request
from truekv.engine.sample import Sampler
from truekv.engine.speculate.drafting import Verified
from truekv.engine.stats import Stats

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.options import SamplingParams
    from truekv.core.protocols import Observer
    from truekv.core.sampling import Draw
    from truekv.engine.run import Ran, Runner
    from truekv.engine.schedule import Schedule, Share
    from truekv.engine.speculate.drafting import Drafting
    from truekv.engine.tokens import Tokenizer
    from truekv.memory.arena import Arena


class Asked(NamedTuple):
    """What somebody wants answered."""

    prompt: Sequence[int]
    params: SamplingParams
    priority: int = 0
    """Lower goes first."""
    salt: str = ""
    """Only requests of the same salt share the prefix cache."""


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
        drafting: Drafting | None = None,
        observer: Observer | None = None,
    ) -> None:
        """Bind the runner and the schedule; `tokenizer` is None for checkpoints without one."""
        self.runner = runner
        self.schedule = schedule
        self.tokenizer = tokenizer
        self.ends = ends
        self.max_model_len = max_model_len
        self.drafting = drafting
        self.observer = observer
        self.steps = self._computed = self._generated = 0
        self._memory = _Memory(runner.arena)
        self._step_tokens = schedule.step_tokens
        self._crowd: set[int] = set()
        """Requests of steps that had no room on the device; steps stay smaller until these have ended."""
        self._answers: dict[int, Answer] = {}
        self._identities = itertools.count()
        self._grammars = Grammars(tokenizer, runner.model.spec.vocab_size, ends)

    def add(self, prompt: Sequence[int], params: SamplingParams, priority: int = 0, salt: str = "") -> Request:
        """Queue a prompt of token ids; Refused when it is empty, unknown to the model or does not fit."""
        self.check(prompt, params)
        limit = min(params.max_tokens, self.max_model_len - len(prompt))
        request = Request(next(self._identities), tuple(prompt), params, limit, priority, salt, list(prompt))
        answer = Answer(request, self.tokenizer, self._sampler(prompt, params))
        self.schedule.add(request)
        self._answers[request.identity] = answer
        return request

    def _sampler(self, prompt: Sequence[int], params: SamplingParams) -> Sampler:
        asked = params.structured_outputs
        constraint = self._grammars.compile(asked) if asked else None
        ends = frozenset[int]() if params.ignore_eos else self.ends
        kernels = self.runner.arena.kernels
        return Sampler(params, prompt, self.runner.model.spec.vocab_size, ends, constraint, kernels)

    def add_all(self, asked: Iterable[Asked]) -> list[Request]:
        """Queue all of several prompts, or none when one of them is refused."""
        added: list[Request] = []
        try:
            for each in asked:
                request = self.add(*each)
                added.append(request)
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

    @property
    def stats(self) -> Stats:
        """What was done so far."""
        arena, schedule = self.runner.arena, self.schedule
        tally = self.drafting.tally if self.drafting else None
        return Stats(
            running=len(schedule.running),
            waiting=len(schedule.waiting),
            steps=self.steps,
            computed_tokens=self._computed,
            generated_tokens=self._generated,
            preemptions=schedule.preemptions,
            drafted=tuple(tally.drafted) if tally else (),
            accepted=tuple(tally.accepted) if tally else (),
            prefix=arena.prefix,
            pages=schedule.pages,
            held_pages=schedule.pages - arena.available_pages,
        )

    def abort(self, request: Request) -> None:
        """End a request now and give its memory back; nothing happens if it has ended already."""
        self._end(request)

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
        self._admit()
        shares = self.schedule.shares(self._memory)
        if not shares:
            return []
        chunks = [_chunk(share) for share in shares]
        answers = [self._answers[share.request.identity] for share in shares]
        wanted = [answer.wanted(share) for answer, share in zip(answers, shares, strict=True)]
        read = [answer.reads(share) for answer, share in zip(answers, shares, strict=True)]
        self.steps += 1
        if self.observer:
            requests = [share.request.identity for share in shares]
            self.observer.before_step(requests, sum(len(chunk.tokens) for chunk in chunks))
        try:
            ran = self.runner.run(chunks, wanted, read)
        except Corrupted as error:
            return self._suspect(shares, error)
        except torch.OutOfMemoryError:
            return self._crowded(shares)
        return self._finish(shares, answers, ran)

    def _admit(self) -> None:
        while request := self.schedule.admit(self._memory):
            request.held = self._memory.open(request)
            if request.cached is None:
                request.cached = request.held.position

    def _finish(self, shares: list[Share], answers: list[Answer], ran: Ran) -> list[Event]:
        """Turn a step into events, make its tokens real, and guess what follows them."""
        events: list[Event] = []
        verified: list[Verified] = []
        start = 0
        every = zip(shares, answers, ran.rows, self._drawn(shares, answers, ran), strict=True)
        for share, answer, logits_NV, drawn in every:
            try:
                if isinstance(logits_NV, Corrupted):
                    raise logits_NV
                found, accepted = answer.after(share, logits_NV, drawn)
            except (Corrupted, ConstraintFailed) as error:
                events.append(self._fail(share.request, error))
            else:
                events += found
                self._generated += share.samples + accepted
                ended = bool(found) and isinstance(found[-1], Ended)
                verified.append(Verified(share, start, accepted, ended=ended))
            start += share.count + len(share.drafts)
        if self.drafting:
            # Before anything is real: the prediction head writes to lines that only this step holds.
            try:
                self.drafting.follow(verified, ran.hidden)
            except torch.OutOfMemoryError:
                # Without rows of the head nothing becomes real, as nobody could guess from it.
                return events + self._out_of_memory(verified, start)
        for item in verified:
            self._advance(item)
        return events

    def _drawn(self, shares: list[Share], answers: list[Answer], ran: Ran) -> list[list[int]]:
        """Draw at once what depends on nothing but its logits, unless that is done already, where they are.

        A share's list is empty where its tokens depend on more.
        """
        # The largest logits are known from the look at whether all of them are finite.
        found = zip(shares, answers, ran.likeliest, ran.drawn, strict=True)
        tokens = [answer.likeliest(share, best) or known for share, answer, best, known in found]
        every = zip(shares, answers, ran.rows, tokens, strict=True)
        draws = [
            [] if known or isinstance(rows, Corrupted) else answer.draws(share, rows)
            for share, answer, rows, known in every
        ]
        if not any(draws):
            return tokens
        by_length: dict[int, list[Draw]] = {}
        for draw in itertools.chain.from_iterable(draws):
            by_length.setdefault(len(draw.logits), []).append(draw)
        drawn = {length: iter(self.runner.arena.kernels.draw(group)) for length, group in by_length.items()}
        return [
            known or _named([next(drawn[len(draw.logits)]) for draw in some], places)
            for known, some, places in zip(tokens, draws, ran.places, strict=True)
        ]

    def _advance(self, item: Verified) -> None:
        request = item.share.request
        assert request.held is not None
        self._computed += item.real
        self.runner.arena.advance(request.held, item.real)
        if self.observer and item.share.samples:
            self.observer.after_tokens(request.identity, request.tokens, len(request.prompt))
        if request.held.position >= request.alone:
            request.alone = 0
        if item.ended:
            self._end(request)
        elif request.guess:
            request.guess = self._answers[request.identity].sampler.allowed(request.guess)

    def _suspect(self, shares: list[Share], error: Corrupted) -> list[Event]:
        """After a step that failed as a whole, find out whose fault it was.

        Recurrent state may hold half of the step, so everyone in it starts again from its tokens,
        one at a time up to the point of failure. The innocent lose time and nothing else.
        """
        if len(shares) == 1:
            return [self._fail(shares[0].request, error)]
        for share in shares:
            request = share.request
            assert request.held is not None
            request.alone = request.held.position + share.count
            self._memory.release(request, suspect=True)
            self.schedule.again(request)
        return []

    def _crowded(self, shares: list[Share]) -> list[Event]:
        """After a step without room on the device, start everyone in it again, in steps of half as many tokens.

        Who was alone in it with one token ends: nobody can make room for it.
        """
        tokens = sum(share.count + len(share.drafts) for share in shares)
        error = OutOfMemory.step(tokens, len(shares))
        if len(shares) == 1 and shares[0].count == 1:
            # What made the steps before it too large may have been this one's context.
            self._uncrowd()
            return [self._fail(shares[0].request, error)]
        self.schedule.step_tokens = max(1, tokens // 2)
        self._crowd.update(share.request.identity for share in shares)
        logging.getLogger("truekv").warning(
            "%s; until these have ended, steps have %s tokens", error, self.schedule.step_tokens
        )
        for share in shares:
            # What it holds may be half of the step, but what is real of it is not.
            self._memory.release(share.request)
            self.schedule.again(share.request)
        return []

    def _uncrowd(self) -> None:
        self._crowd.clear()
        self.schedule.step_tokens = self._step_tokens

    def _out_of_memory(self, verified: list[Verified], tokens: int) -> list[Event]:
        """End all requests of a step whose guesses had no room, but for those that have ended anyway."""
        error = OutOfMemory.step(tokens, len(verified))
        for item in verified:
            if item.ended:
                self._end(item.share.request)
        return [self._fail(item.share.request, error) for item in verified if not item.ended]

    def _fail(self, request: Request, error: Corrupted | ConstraintFailed | OutOfMemory) -> Failed:
        if self.observer and isinstance(error, Corrupted):
            self.observer.fault(request.identity, error)
        self._end(request, suspect=isinstance(error, Corrupted))
        return Failed(request.identity, error)

    def _end(self, request: Request, *, suspect: bool = False) -> None:
        if self._answers.pop(request.identity, None) is not None:
            if self._crowd == {request.identity}:
                self._uncrowd()
            self._crowd.discard(request.identity)
            self.schedule.end(request)
            self._memory.release(request, suspect=suspect)
            if self.drafting:
                self.drafting.forget(request)
            if self.observer:
                self.observer.end(request.identity)


class _Memory:
    """The arena as the schedule sees it."""

    def __init__(self, arena: Arena) -> None:
        self.pages_for = arena.plan.pages_for
        self.certain_limit = arena.certain_limit
        self.draft_limit = arena.draft_limit
        self._arena = arena

    @property
    def available_pages(self) -> int:
        return self._arena.available_pages

    def new_pages(self, request: Request) -> int:
        return self._arena.new_pages(request.tokens, salt=request.salt)

    def open(self, request: Request) -> Held:
        # Log-probabilities of the prompt come from computing it.
        reuse = request.params.prompt_logprobs is None or request.answered
        return self._arena.open(request.tokens, salt=request.salt, reuse=reuse)

    def release(self, request: Request, *, suspect: bool = False) -> None:
        if request.held is not None:
            self._arena.close(request.held, suspect=suspect)
            request.held = None


def check_ids(prompt: Sequence[int], vocab_size: int) -> None:
    """Refuse an empty prompt and ids that the model does not have."""
    if not prompt:
        raise Refused("the prompt is empty; give at least one token")
    for place, token in enumerate(prompt):
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab_size:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refused(f"token {place} of the prompt is {token!r}, but ids are integers from 0 to {vocab_size - 1}")


def _named(drawn: list[int], places_NK: torch.Tensor | None) -> list[int]:
    """Return the tokens of a share's draws, which are places among its best logits where those alone are there."""
    if places_NK is None or not drawn:
        return drawn
    return [int(places_K[place]) for place, places_K in zip(drawn, places_NK, strict=True)]


def _chunk(share: Share) -> Chunk:
    request, drafts = share.request, share.drafts
    assert request.held is not None
    start = request.held.position
    tokens = request.tokens[start : start + share.count]
    tokens += drafts
    return Chunk(request.held, tokens, len(drafts), share.room)
