"""Drafts for every request after every step, and what became of the last ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.lazy import torch
    from truekv.engine.request import Request
    from truekv.engine.schedule import Share


@dataclass(frozen=True, slots=True)
class Verified:
    """One request's share of a finished step that is still provisional."""

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
    def follow(self, verified: Sequence[Verified], hidden_TH: torch.Tensor) -> None: ...
    def forget(self, request: Request) -> None: ...
