"""One prompt and its answer so far: what the schedule orders and the engine serves."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truekv.core.batch import Sequence
    from truekv.core.options import SamplingParams


@dataclass(slots=True, eq=False)
class Request:
    """A request between its arrival and its end.

    There is no prefill and no decode phase: memory holds the first `held.position` of `tokens`, and
    the request catches up. One that lost its memory starts again from its own tokens.
    """

    identity: int
    prompt: tuple[int, ...]
    params: SamplingParams
    limit: int
    """Most tokens it may generate, cut to the context."""
    priority: int = 0
    """Lower goes first, as in vLLM; waiting lowers it."""
    salt: str = ""
    """Only requests of the same salt share what the prefix cache holds."""
    tokens: list[int] = field(default_factory=list[int])
    """The prompt and what was generated."""
    held: Sequence | None = None
    """What memory holds of it; None while it waits and once it has ended."""
    guess: list[int] = field(default_factory=list[int])
    """Drafts for the tokens that follow; whoever steps next may verify some of them."""
    cached: int | None = None
    """Prompt tokens that the prefix cache had when it first entered memory."""
    alone: int = 0
    """It may be what broke a step of several: it runs alone until this many tokens are held."""
    arrival: int = 0
    """Its place in the order of arrivals."""
    waited: int = 0
    """Turns it has spent waiting, those since `queued` not counted."""
    queued: int = 0
    """The turn in which it last began to wait."""
    served: int = 0
    """The turn in which it last took part in a step, or entered memory."""

    @property
    def pending(self) -> int:
        """How many of its tokens memory does not hold yet."""
        return len(self.tokens) - (self.held.position if self.held else 0)

    @property
    def answered(self) -> bool:
        """Whether a token of the answer is there."""
        return len(self.tokens) > len(self.prompt)

    @property
    def generated(self) -> list[int]:
        """The tokens of the answer."""
        return self.tokens[len(self.prompt) :]

    @property
    def remaining(self) -> int:
        """How many tokens it may still generate."""
        return len(self.prompt) + self.limit - len(self.tokens)

    @property
    def most_tokens(self) -> int:
        """Most tokens that memory may have to hold: the last one sampled is never stored."""
        return len(self.prompt) + self.limit - 1
