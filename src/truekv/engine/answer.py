"""From rows of logits to the tokens and the text of one answer, drafts included."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.engine.events import Ended, Sampled
from truekv.engine.sample import Sampler, logprob
from truekv.engine.tokens import StopStrings, TextStream

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.lazy import torch
    from truekv.engine.request import Request
    from truekv.engine.tokens import Tokenizer


class Answer:
    """What one request needs between steps besides its place in the schedule."""

    def __init__(self, request: Request, tokenizer: Tokenizer | None, ends: frozenset[int]) -> None:
        """Prepare sampling, text and stop strings for a request; `ends`: the ids that end an answer."""
        self.request = request
        self.sampler = Sampler(request.params)
        self._text = TextStream(tokenizer, request.prompt) if tokenizer else None
        self._stops = StopStrings(request.params.stop)
        self._ends = frozenset[int]() if request.params.ignore_eos else ends

    def take(self, logits_NV: torch.Tensor, drafts: Sequence[int]) -> tuple[list[Sampled | Ended], int]:
        """Choose tokens from the logits of a newest token and of the drafts after it.

        Each row is sampled as if there were no drafts, and the next row counts only if its draft is
        what was sampled. A draft is a point mass, so this accepts it with the probability that the
        model gives it and else draws from the rest: speculative rejection (Leviathan et al. 2023),
        which moreover leaves every token what it is without drafts. Returns what happened, and how
        many drafts are real.
        """
        events: list[Sampled | Ended] = []
        for place, logits_V in enumerate(logits_NV):
            events += self._choose(logits_V)
            sampled = events[-1]
            if isinstance(sampled, Ended) or place == len(drafts) or sampled.token != drafts[place]:
                return events, place
        raise AssertionError("the last row has no draft after it")

    def _choose(self, logits_V: torch.Tensor) -> list[Sampled | Ended]:
        """Choose the next token and say what follows from it; the last event tells whether the answer goes on."""
        request, params = self.request, self.request.params
        token = self.sampler.choose(logits_V, len(request.generated))
        request.tokens.append(token)
        report = logprob(logits_V, token, params.logprobs) if params.logprobs else None
        ends = token in self._ends
        text, stopped = self._stops.push(self._text.push(token)) if self._text and not ends else ("", False)
        sampled = Sampled(request.identity, token, text, report)
        if stopped:
            return [sampled, Ended(request.identity, "stop", "")]
        if ends:
            return [sampled, Ended(request.identity, "stop", self._rest()[0])]
        if not request.remaining:
            rest, stopped = self._rest()
            return [sampled, Ended(request.identity, "stop" if stopped else "length", rest)]
        return [sampled]

    def _rest(self) -> tuple[str, bool]:
        """Return the text held back and whether the unfinished character at its end completed a stop string."""
        text, stopped = self._stops.push(self._text.flush()) if self._text else ("", False)
        return (text, True) if stopped else (text + self._stops.flush(), False)
