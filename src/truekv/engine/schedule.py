"""When: which requests are in memory, and which tokens of theirs go into the next step."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence
    from truekv.core.options import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """One prompt and its answer so far.

    There is no prefill and no decode phase: memory holds the first `held.position` of `tokens`, and
    the request catches up. One that lost its memory starts again from its own tokens.
    """

    identity: int
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    """Most tokens it may generate, cut to the context."""
    tokens: list[int] = field(default_factory=list[int])
    """The prompt and what was generated."""
    held: Sequence | None = None
    """What memory holds of it; None while it waits and once it has ended."""
    alone: int = 0
    """It may be what broke a step of several: it runs alone until this many tokens are held."""

    @property
    def pending(self) -> int:
        """How many of its tokens memory does not hold yet."""
        return len(self.tokens) - (self.held.position if self.held else 0)

    @property
    def generated(self) -> list[int]:
        """The tokens of the answer."""
        return self.tokens[len(self.prompt) :]

    @property
    def most_tokens(self) -> int:
        """Most tokens that memory may have to hold: the last one sampled is never stored."""
        return len(self.prompt) + self.limit - 1


@dataclass(frozen=True, slots=True)
class Share:
    """What one request brings to a step: its next `count` tokens, and whether the last one is sampled from."""

    request: Request
    count: int
    samples: bool


class Schedule:
    """First come, first served. Pure: no clock, no tensors, no I/O, so every run can be replayed.

    A request enters when its longest possible answer fits beside those that are running, so none
    ever has to give memory back before it ends.
    """

    def __init__(self, *, pages: int, page_tokens: int, sequences: int, step_tokens: int) -> None:
        """`pages` of `page_tokens` lines, at most `sequences` in memory, at most `step_tokens` in a step."""
        self.pages = pages
        self.page_tokens = page_tokens
        self.sequences = sequences
        self.step_tokens = step_tokens
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []

    def add(self, request: Request) -> None:
        """Queue a request; Refused when it could never run."""
        need = self._pages_of(request)
        if need > self.pages:
            raise Refused(
                f"the request needs {request.most_tokens} tokens of KV cache ({need} pages), but the cache has "
                f"{self.pages} pages of {self.page_tokens} tokens; lower max_tokens or give it more memory"
            )
        self.waiting.append(request)

    def again(self, request: Request) -> None:
        """Put a request that lost its memory back to the front of the queue."""
        self.running.remove(request)
        self.waiting.appendleft(request)

    def end(self, request: Request) -> None:
        """Forget a request, wherever it is."""
        if request in self.running:
            self.running.remove(request)
        else:
            self.waiting.remove(request)

    def admit(self) -> list[Request]:
        """Move the requests that may enter memory now from waiting to running, and return them."""
        admitted: list[Request] = []
        used = sum(self._pages_of(request) for request in self.running)
        while self.waiting and len(self.running) < self.sequences:
            used += self._pages_of(self.waiting[0])
            if used > self.pages:
                break
            admitted.append(self.waiting.popleft())
            self.running.append(admitted[-1])
        return admitted

    def shares(self) -> list[Share]:
        """Divide the step's token budget: first who needs one token, then the others as they came."""
        suspects = [request for request in self.running if request.alone]
        runners: Seq[Request] = suspects[:1] or self.running
        budget = self.step_tokens
        shares: list[Share] = []
        # One pending token is a request in the middle of its answer: a long prompt must not stall it.
        for request in sorted(runners, key=lambda request: request.pending > 1):
            count = min(request.pending, budget)
            if count:
                shares.append(Share(request, count, count == request.pending))
                budget -= count
        return shares

    def _pages_of(self, request: Request) -> int:
        return -(-request.most_tokens // self.page_tokens)
