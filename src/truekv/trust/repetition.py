"""Degenerate repetition: an answer that goes round in circles. It is a reason to look, not a proof of anything."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Sequence

PERIOD: Final = 64
"""Longest run of tokens whose repetition counts."""
REPEATS: Final = 4
LEAST: Final = 32
"""Tokens that a repetition covers at least; a table's rule or a row of zeros is shorter."""
WINDOW: Final = 64
DISTINCT: Final = 6
"""Fewer different tokens than this in WINDOW of them are no text either."""
_GRAM: Final = 4


class Repetition:
    """Follows one answer, in constant time per token."""

    def __init__(self) -> None:
        """Start before the first token."""
        self.period = 0
        """Of the repetition under way; 0 without one."""
        self.run = 0
        """Tokens that equal the one a period before."""
        self._next = 0
        self._seen: dict[tuple[int, ...], int] = {}
        self._counts: dict[int, int] = {}

    def look(self, tokens: Sequence[int], start: int) -> bool:
        """Take in the tokens that are new, of an answer that starts at `start`; whether it repeats itself.

        `tokens` is the whole request, longer at every call. Its first `start` tokens are the prompt,
        which may repeat itself as it likes.
        """
        found = False
        for here in range(max(self._next, start), len(tokens)):
            self._follow(tokens, start, here)
            found = found or self._degenerate(here + 1 - start)
        self._next = len(tokens)
        return found

    def _follow(self, tokens: Sequence[int], start: int, here: int) -> None:
        gram = tuple(tokens[max(start, here + 1 - _GRAM) : here + 1])
        if self.period and tokens[here] == tokens[here - self.period]:
            self.run += 1
        else:
            # The last occurrence of these tokens is the only candidate, so no other period is tried.
            before = self._seen.get(gram)
            self.period = here - before if before is not None else 0
            self.run = len(gram) if self.period else 0
        if len(gram) == _GRAM:
            self._seen[gram] = here
        self._forget(tokens, start, here)

    def _forget(self, tokens: Sequence[int], start: int, here: int) -> None:
        """Drop what is further back than any period, so that memory does not grow with the answer."""
        counts, token = self._counts, tokens[here]
        counts[token] = counts.get(token, 0) + 1
        if (old := here - WINDOW) >= start:
            token = tokens[old]
            if counts[token] > 1:
                counts[token] -= 1
            else:
                del counts[token]
        if (old := here - PERIOD) >= start + _GRAM - 1:
            gram = tuple(tokens[old + 1 - _GRAM : old + 1])
            if self._seen.get(gram) == old:
                del self._seen[gram]

    def _degenerate(self, count: int) -> bool:
        circles = self.period > 0 and self.run + self.period >= max(LEAST, REPEATS * self.period)
        return circles or (count >= WINDOW and len(self._counts) < DISTINCT)
