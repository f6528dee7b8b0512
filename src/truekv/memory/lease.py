"""What the arena knows of a slot's sequence, whatever the sequence says of itself."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from truekv.core.errors import Corrupted

if TYPE_CHECKING:
    from truekv.core.batch import Sequence
    from truekv.memory.tree import Node


@dataclass(slots=True, eq=False)
class Lease:
    """One open sequence. The first `len(nodes)` pages are the tree's, to be read only; the others are its own."""

    sequence: Sequence
    serial: int
    """Never used again, unlike the slot."""
    position: int = 0
    replay: int = 0
    pages: array[int] = field(default_factory=lambda: array("q"))
    reserved: tuple[int, int] | None = None

    salt: str = ""
    planned: int = 0
    """Tokens that were known when it was opened."""
    branch: int = 0
    """Tokens that a page, but no state, was found for when it was opened; 0 for none."""
    source: int = 0
    """The sequence whose lines or state it started from with a copy, 0 for none."""
    tokens: list[int] = field(default_factory=list[int])
    """The tokens in memory, as they were reserved."""
    pending: list[int] = field(default_factory=list[int])
    """Those of the step under way."""
    nodes: list[Node] = field(default_factory=list["Node"])
    rolling: Node | None = None
    """Where its last checkpoint that may move on is."""
    publishes: bool = True

    def note(self) -> None:
        """Take over what the arena has just written into the sequence."""
        sequence = self.sequence
        self.position, self.replay = sequence.position, sequence.replay
        self.pages, self.reserved = sequence.pages[:], sequence.reserved

    def verify(self) -> None:
        """Raise Corrupted when the sequence says something else."""
        sequence = self.sequence
        claimed = (sequence.position, sequence.replay, sequence.pages, sequence.reserved)
        known = (self.position, self.replay, self.pages, self.reserved)
        if claimed != known:
            names = ("position", "replay", "pages", "reserved")
            wrong = next(row for row in zip(names, claimed, known, strict=True) if row[1] != row[2])
            raise Corrupted(
                f"the sequence in slot {sequence.slot} says {wrong[0]} = {wrong[1]}, but its memory holds {wrong[2]}; "
                "only the arena may change that: close it and compute it again"
            )
