"""From rows of logits to the tokens and the text of one answer, drafts included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.sampling import Reading
from truekv.engine.events import Ended, Sampled, Stored
from truekv.engine.sample import ALL, NOTHING, logprobs
from truekv.engine.tokens import StopStrings, TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.lazy import torch
    from truekv.core.sampling import Draw
    from truekv.engine.events import Event
    from truekv.engine.request import Request
    from truekv.engine.sample import Logprob, Sampler
    from truekv.engine.schedule import Share
    from truekv.engine.tokens import Tokenizer


class Answer:
    """What one request needs between steps besides its place in the schedule."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, sampler: Sampler) -> None:
        """Prepare text and stop strings for a request."""
        self.request = request
        self.sampler = sampler
        self._text = TextStream(tokenizer, request.prompt) if tokenizer else None
        self._stops = StopStrings(request.params.stop)
        self._reported = 1
        """Prompt tokens that need no log-probability any more; the first one never has any."""

    def wanted(self, share: Share) -> int:
        """How many of a share's last tokens need logits: the newest and its drafts, or all for prompt_logprobs."""
        if self._reports(share):
            return share.count + len(share.drafts)
        return 1 + len(share.drafts) if share.samples else 0

    def reads(self, share: Share) -> Reading:
        """How much of those logits anybody looks at."""
        if self._reports(share):
            return Reading(ALL)
        if not share.samples:
            return NOTHING
        return Reading(ALL) if self.request.params.logprobs else self.sampler.reads(len(share.drafts))

    def likeliest(self, share: Share, places: list[int]) -> list[int]:
        """Return the tokens of a share, given where the largest of its logits are, if those are its tokens."""
        return places[-1 - len(share.drafts) :] if share.samples and self.sampler.greedy else []

    def draws(self, share: Share, logits_NV: torch.Tensor) -> list[Draw]:
        """Return the draws of a share's tokens where none depends on those before it, else nothing.

        Where only the best logits are there, in order, what is drawn are places among them. There is nothing to draw
        from where the tokens are there themselves.
        """
        if not share.samples or not self.sampler.independent or self.sampler.greedy:
            return []
        return [self.sampler.ask(logits_V, place) for place, logits_V in enumerate(_sampled(share, logits_NV))]

    def after(self, share: Share, logits_NV: torch.Tensor, drawn: Sequence[int] = ()) -> tuple[list[Event], int]:
        """Turn the `wanted` logits of a share that has run, not advanced yet, into events.

        `drawn`: what came of `draws`, is `likeliest` or was drawn where the logits are; then these need not be here.
        Also returns how many of the share's drafts are real. Raises ConstraintFailed where a grammar cannot go on.
        """
        request = self.request
        events: list[Event] = []
        if not request.answered:
            assert request.held is not None
            done = request.held.position + share.count
            logprobs = self._prompt_logprobs(share, logits_NV)
            events.append(Stored(request.identity, done, len(request.prompt), request.cached or 0, logprobs))
        if not share.samples:
            return events, 0
        found, accepted = self.take(logits_NV, share.drafts, drawn)
        return events + found, accepted

    def _reports(self, share: Share) -> bool:
        request = self.request
        return request.params.prompt_logprobs is not None and not request.answered and share.count > 0

    def _prompt_logprobs(self, share: Share, logits_NV: torch.Tensor) -> tuple[Logprob, ...]:
        """Report the prompt tokens that follow those of the share; each once, also after a preemption."""
        request, count = self.request, self.request.params.prompt_logprobs
        if count is None or request.held is None:
            return ()
        start = request.held.position
        places = range(max(self._reported, start + 1), min(start + share.count + 1, len(request.prompt)))
        self._reported = max(self._reported, places.stop)
        before = slice(places.start - start - 1, places.stop - start - 1)
        return logprobs(self.sampler.sampling, logits_NV[before], [request.prompt[place] for place in places], count)

    def take(
        self, logits_NV: torch.Tensor, drafts: Sequence[int], drawn: Sequence[int] = ()
    ) -> tuple[list[Sampled | Ended], int]:
        """Choose tokens from the last rows, those of a newest token and of the drafts after it, unless they are drawn.

        Each row is sampled as if there were no drafts, and the next row counts only if its draft is
        what was sampled. A draft is a point mass, so this accepts it with the probability that the
        model gives it and else draws from the rest: speculative rejection (Leviathan et al. 2023),
        which moreover leaves every token what it is without drafts. Returns what happened, and how
        many drafts are real.
        """
        events: list[Sampled | Ended] = []
        for place in range(1 + len(drafts)):
            # Counted from the end: logits of prompt tokens may come before.
            events += self._choose(logits_NV, place - 1 - len(drafts), drawn[place] if drawn else None)
            sampled = events[-1]
            if isinstance(sampled, Ended) or place == len(drafts) or sampled.token != drafts[place]:
                return events, place
        raise AssertionError("the last row has no draft after it")

    def _choose(self, logits_NV: torch.Tensor, row: int, drawn: int | None = None) -> list[Sampled | Ended]:
        """Choose the next token, from a row unless it is drawn, and say what follows from it.

        The last event tells whether the answer goes on.
        """
        request, params = self.request, self.request.params
        token = self.sampler.choose(logits_NV[row]) if drawn is None else self.sampler.take(drawn)
        request.tokens.append(token)
        report: Logprob | None = None
        if params.logprobs:
            (report,) = logprobs(self.sampler.sampling, logits_NV[row][None], [token], params.logprobs)
        ends = token in self.sampler.ends
        text, stopped = self._stops.push(self._text.push(token)) if self._text and not ends else ("", False)
        sampled = Sampled(request.identity, token, text, report)
        if stopped:
            return [sampled, Ended(request.identity, "stop", "")]
        if ends or self.sampler.finished:
            return [sampled, Ended(request.identity, "stop", self._rest()[0])]
        if not request.remaining:
            rest, stopped = self._rest()
            return [sampled, Ended(request.identity, "stop" if stopped else "length", rest)]
        return [sampled]

    def _rest(self) -> tuple[str, bool]:
        """Return the text held back and whether the unfinished character at its end completed a stop string."""
        text, stopped = self._stops.push(self._text.flush()) if self._text else ("", False)
        return (text, True) if stopped else (text + self._stops.flush(), False)


def _sampled(share: Share, logits_NV: torch.Tensor) -> torch.Tensor:
    """Return the logits of a share's newest token and of its drafts."""
    return logits_NV[len(logits_NV) - len(share.drafts) - 1 :]
