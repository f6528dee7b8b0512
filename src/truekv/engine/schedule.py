"""When: which requests are in memory, and which tokens of theirs go into the next step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Protocol

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from truekv.core.batch import Sequence
    from truekv.engine.activations import Parts
    from truekv.engine.request import Request

AGEING: Final = 256
"""Turns of waiting that are worth one level of priority: whoever waits long enough goes first."""
PATIENCE: Final = 16
"""Turns without a token after which a running request goes before all others."""


class Memory(Protocol):
    """What the schedule asks of memory."""

    @property
    def available_pages(self) -> int:
        """Pages that are free, or held by nothing but the prefix cache."""
        ...

    def new_pages(self, request: Request) -> int:
        """Pages that would have to become available for all of a waiting request's tokens and one more."""
        ...

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens of one sequence."""
        ...

    def certain_limit(self, sequence: Sequence) -> int:
        """Most certain tokens of the next chunk, so that it ends where a state is to be kept."""
        ...

    def draft_limit(self, sequence: Sequence) -> int:
        """Most drafts of the next chunk, so that no acceptance jumps over such a place."""
        ...

    def release(self, request: Request) -> None:
        """Take a request's memory away."""
        ...


@dataclass(slots=True)
class Share:
    """What one request brings to a step: its next `count` tokens, and guesses for those that follow."""

    request: Request
    count: int
    samples: bool
    """Whether the last token is its newest, so that the next is sampled."""
    drafts: list[int] = field(default_factory=list[int])
    room: int = 0
    """Lines kept for the guesses of the prediction head."""

    @property
    def lines(self) -> int:
        """Lines of memory that the step may write."""
        return self.count + len(self.drafts) + self.room


class Schedule:
    """Continuous batching: every turn divides the token budget among all that are in memory.

    Pure: time is the count of turns, nothing is random, so every run can be replayed. Requests are
    ranked by priority, then by arrival. When pages run out the lowest of them gives its memory back
    and later computes it again; the highest is never touched and fits alone, so there is always one
    that advances.
    """

    def __init__(
        self,
        *,
        pages: int,
        page_tokens: int,
        sequences: int,
        step_tokens: int,
        draft_room: int = 0,
        drafts: int = 0,
        parts: Parts | None = None,
    ) -> None:
        """`pages` of `page_tokens` lines, at most `sequences` in memory, at most `step_tokens` in a step.

        `draft_room`: lines that the prediction head writes beyond a step that samples. `drafts`: most of a request in
        a step. `parts`: what a GPU's attention may leave to be merged; a step of more prompts than have room waits with
        all but the first.
        """
        self.pages = pages
        self.page_tokens = page_tokens
        self.sequences = sequences
        self.step_tokens = step_tokens
        self.draft_room = draft_room
        self.drafts = drafts
        self.parts = parts
        self.waiting: list[Request] = []
        self.running: list[Request] = []
        self.preemptions = 0
        self._turn = 0
        self._arrivals = 0

    def add(self, request: Request) -> None:
        """Queue a request; Refused when it could never run."""
        need = -(-request.most_tokens // self.page_tokens)
        if need > self.pages:
            raise Refused(
                f"the request needs {request.most_tokens} tokens of KV cache ({need} pages), but the cache has "
                f"{self.pages} pages of {self.page_tokens} tokens; lower max_tokens or give it more memory"
            )
        request.arrival, self._arrivals = self._arrivals, self._arrivals + 1
        self._wait(request)

    def again(self, request: Request) -> None:
        """Put a request that lost its memory back among those that wait, where its rank leaves it."""
        self.running.remove(request)
        self._wait(request)

    def end(self, request: Request) -> None:
        """Forget a request, wherever it is."""
        (self.running if request in self.running else self.waiting).remove(request)

    def admit(self, memory: Memory) -> Request | None:
        """Move the next request that may enter memory from waiting to running, and return it.

        It enters when its tokens fit beside those that the running ones still have to store, and
        leave each of them a page to grow by. None when nothing may enter now.
        """
        if not self.waiting or len(self.running) >= self.sequences:
            return None
        request = min(self.waiting, key=self._rank)
        if self.running:
            owed = sum(
                memory.pages_for(len(item.tokens)) - (len(item.held.pages) if item.held else 0) for item in self.running
            )
            if memory.new_pages(request) + owed + len(self.running) > memory.available_pages:
                return None
        self.waiting.remove(request)
        self.running.append(request)
        request.waited += self._turn - request.queued
        request.served = self._turn
        return request

    def shares(self, memory: Memory) -> list[Share]:
        """Divide the next step among the running requests, taking memory from the lowest where it runs out."""
        self._turn += 1
        order = self._order()
        shares: dict[int, Share] = {}
        promised = 0
        budget = self.step_tokens
        every = [request.pending for request in order]
        answering = every.count(1)
        for request, pending in zip(order, every, strict=True):
            if request.held is None:
                continue  # preempted a moment ago
            one = pending == 1
            answering -= one
            share = self._wish(request, pending, budget, budget - 1 - answering if one else 0, memory)
            if not one and self._crowds(share, [*shares.values()], answering, memory):
                continue
            while (missing := self._missing(share, memory)) and missing > (room := memory.available_pages - promised):
                if self._shrink(share, room, memory):
                    continue
                victim = self._victim(request)
                if victim is None:
                    share.count = 0
                    break
                taken = shares.pop(victim.identity, None)
                if taken:
                    promised -= self._missing(taken, memory)
                    budget += taken.count + len(taken.drafts)
                memory.release(victim)
                self.preemptions += 1
                self.again(victim)
            if share.count:
                promised += missing
                budget -= share.count + len(share.drafts)
                shares[request.identity] = share
        for share in shares.values():
            share.request.served = self._turn
        return list(shares.values())

    def _wait(self, request: Request) -> None:
        request.queued = self._turn
        self.waiting.append(request)

    def _rank(self, request: Request) -> tuple[int, int]:
        """Order of service: the lowest goes first."""
        waiting = 0 if request.held is not None else self._turn - request.queued
        return request.priority - (request.waited + waiting) // AGEING, request.arrival

    def _order(self) -> list[Request]:
        """Who is served first: the starving, then those in the middle of an answer, then prompts."""
        suspects = [request for request in self.running if request.alone]
        if suspects:
            return suspects[:1]
        # One pending token is a request in the middle of its answer: a long prompt must not stall it.
        return sorted(
            self.running,
            key=lambda item: (self._turn - item.served <= PATIENCE, item.pending > 1, self._rank(item)),
        )

    def _wish(self, request: Request, pending: int, budget: int, drafts: int, memory: Memory) -> Share:
        """Say what a request would take of the step if pages were no matter; at most `drafts` guesses."""
        held = request.held
        assert held is not None
        count = min(pending, budget)
        if count > 1:  # which no limit is below
            count = min(count, memory.certain_limit(held))
        samples = count == pending
        guess: list[int] = []
        if request.guess and samples and count:
            most = min(drafts, request.remaining - 1, memory.draft_limit(held))
            guess = request.guess[: max(0, most)]
        return Share(request, count, samples, guess, self.draft_room if samples else 0)

    def _crowds(self, share: Share, taken: list[Share], answering: int, memory: Memory) -> bool:
        """Whether a prompt's share beside those that are taken would leave more to be merged than there is room for."""
        if self.parts is None or all(item.request.pending == 1 for item in taken):
            return False
        shares, each = [*taken, share], 1 + self.drafts
        lines = [item.count + len(item.drafts) for item in shares]
        ends = [item.request.held.position + item.lines for item in shares if item.request.held]
        ends += [
            item.held.position + each + self.draft_room for item in self.running if item.held and item.pending == 1
        ]
        tokens = sum(lines) + answering * each
        return self.parts.of(tokens, max(lines), memory.pages_for(max(ends))) > self.parts.most

    def _missing(self, share: Share, memory: Memory) -> int:
        held = share.request.held
        assert held is not None
        return max(0, memory.pages_for(held.position + share.lines) - len(held.pages))

    def _shrink(self, share: Share, pages: int, memory: Memory) -> bool:
        """Give up what a share can do without, room and guesses first; False when nothing is left to give."""
        if share.room or share.drafts:
            share.room, share.drafts = 0, []
            return True
        held = share.request.held
        assert held is not None
        fits = (len(held.pages) + max(0, pages)) * self.page_tokens - held.position
        if not 0 < fits < share.count:
            return False
        share.count, share.samples = fits, False
        return memory.pages_for(held.position + fits) - len(held.pages) <= pages

    def _victim(self, request: Request) -> Request | None:
        """Whose memory may be taken for a request: the lowest below it, or nobody's."""
        lowest = max((item for item in self.running if item.held is not None), key=self._rank)
        return lowest if self._rank(lowest) > self._rank(request) else None
