"""What an engine has done so far, in numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truekv.memory.prefix import PrefixStats


@dataclass(frozen=True, slots=True)
class Stats:
    """A snapshot; counts begin when the engine is built."""

    running: int
    waiting: int
    steps: int
    computed_tokens: int
    """Tokens whose rows and states were made: again where memory had been taken away, not where it was found."""
    generated_tokens: int
    preemptions: int
    drafted: tuple[int, ...]
    """How many drafts were verified at each place of a step."""
    accepted: tuple[int, ...]
    """How many of them were accepted."""
    prefix: PrefixStats
    pages: int
    """Pages that sequences can hold."""
    held_pages: int

    @property
    def acceptance(self) -> tuple[float, ...]:
        """Share of the drafts at each place that were accepted; 0 where there were none."""
        return tuple(good / made if made else 0.0 for made, good in zip(self.drafted, self.accepted, strict=True))
