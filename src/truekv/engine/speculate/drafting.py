"""Drafts for every request after every step, and what became of the last ones."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from truekv.engine.speculate.adapt import START, DraftLength
from truekv.engine.speculate.mtp import Row
from truekv.engine.speculate.ngram import Ngram

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.lazy import torch
    from truekv.core.options import Speculation
    from truekv.engine.request import Request
    from truekv.engine.schedule import Share
    from truekv.engine.speculate.mtp import Predictor

_LEARNING: Final = 0.25


class Verified(NamedTuple):
    """One request's share of a step that has run and is still provisional."""

    share: Share
    start: int
    """Where its tokens begin among the step's."""
    accepted: int
    """How many of its drafts were what was sampled."""
    ended: bool

    @property
    def real(self) -> int:
        """How many of its tokens are to be kept."""
        return self.share.count + self.accepted


class Drafting(Protocol):
    """Guesses after every step: what a Request's `guess` is made by."""

    @property
    def room(self) -> int:
        """Lines beyond a step that samples, which guessing writes to."""
        ...

    @property
    def tally(self) -> Tally:
        """How drafts fared so far."""
        ...

    def follow(self, verified: Sequence[Verified], hidden_TH: torch.Tensor) -> None:
        """Learn what became of the drafts of a step, and set `guess` of every request that goes on.

        Called before the step's tokens are advanced over; `request.tokens` hold what was sampled.
        """
        ...

    def forget(self, request: Request) -> None:
        """Drop what is known of a request that has ended."""
        ...


@dataclass(slots=True)
class Tally:
    """How drafts fared, by their place in a step."""

    drafted: list[int]
    accepted: list[int]

    def count(self, drafted: int, accepted: int) -> None:
        """Add one verified step of one request."""
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted


@dataclass(slots=True)
class _Follower:
    """What is known of one request."""

    length: DraftLength
    lookup: Ngram


@dataclass(slots=True)
class Drafter:
    """Guesses by lookup in each request's own text, or with the model's prediction head; implements Drafting."""

    speculation: Speculation
    predictor: Predictor | None
    """The prediction head; None for the method ngram."""
    cost: float
    """Of one more draft, where their number is adapted; see draft_cost."""
    tally: Tally = field(init=False)
    _rate: float = START
    """What requests before have found: answers may be too short to learn it anew in each."""
    _followers: dict[int, _Follower] = field(default_factory=dict[int, _Follower])

    def __post_init__(self) -> None:
        """Begin to count."""
        most = self.speculation.num_speculative_tokens
        self.tally = Tally([0] * most, [0] * most)

    @property
    def room(self) -> int:
        """Every draft but the first is made from a row of the one before it."""
        return self.speculation.num_speculative_tokens - 1 if self.predictor else 0

    def follow(self, verified: Sequence[Verified], hidden_TH: torch.Tensor) -> None:
        """Report and guess for all requests of a step; see Drafting.follow."""
        wanted = [self._wanted(item) for item in verified]
        if self.predictor is None:
            for item, count in zip(verified, wanted, strict=True):
                request = item.share.request
                if count:
                    request.guess = self._follower(request).lookup.propose(request.tokens, count)
            return
        # Rows of every token, also where nothing is guessed and of answers that have ended: whoever goes on from
        # these tokens reads them.
        rows = [_row(item, count) for item, count in zip(verified, wanted, strict=True)]
        for item, guess in zip(verified, self.predictor.propose(rows, hidden_TH), strict=True):
            if item.share.samples:
                item.share.request.guess = guess

    def forget(self, request: Request) -> None:
        """Drop a request's history, but for how its drafts fared."""
        follower = self._followers.pop(request.identity, None)
        if follower:
            self._rate += _LEARNING * (follower.length.rate - self._rate)

    def _wanted(self, item: Verified) -> int:
        """How many drafts to make for what follows a share; what it had is used up."""
        share = item.share
        if not share.samples:
            return 0
        request, length = share.request, self._follower(share.request).length
        request.guess = []
        self.tally.count(len(share.drafts), item.accepted)
        length.report(len(share.drafts), item.accepted)
        if item.ended:
            return 0
        most = self.speculation.num_speculative_tokens
        asked = length.ask() if self.speculation.adaptive else most
        room = share.room + 1 if self.predictor else most
        # The last token of an answer is sampled, never drafted.
        return min(asked, room, request.remaining - 1)

    def _follower(self, request: Request) -> _Follower:
        found = self._followers.get(request.identity)
        if found is None:
            speculation = self.speculation
            found = self._followers[request.identity] = _Follower(
                DraftLength(speculation.num_speculative_tokens, self.cost, self._rate),
                Ngram(speculation.prompt_lookup_max, speculation.prompt_lookup_min),
            )
        return found


def _row(item: Verified, wanted: int) -> Row:
    request = item.share.request
    held = request.held
    assert held is not None
    start = held.position
    return Row(
        held,
        start,
        request.tokens[start + 1 : start + 1 + item.real],
        range(item.start, item.start + item.real),
        wanted,
    )
