"""What a step tells of each request."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from truekv.core.errors import ConstraintFailed, Corrupted, OutOfMemory
    from truekv.engine.sample import Logprob


@dataclass(frozen=True, slots=True)
class Stored:
    """A step stored prompt tokens: `done` of `total` are in memory, `cached` of them since before this request."""

    request: int
    done: int
    total: int
    cached: int = 0
    logprobs: tuple[Logprob, ...] = ()
    """Of the prompt tokens after those that this step stored, where prompt_logprobs asks for them."""


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
    error: Corrupted | ConstraintFailed | OutOfMemory


Event = Stored | Sampled | Ended | Failed
