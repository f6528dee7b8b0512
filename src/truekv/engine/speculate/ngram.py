"""Prompt lookup: the longest recent n-gram that occurred before proposes what followed it."""

from __future__ import annotations

import numpy as np


class Ngram:
    """Proposes by lookup in one request's own tokens (Saxena 2023, prompt lookup decoding).

    It keeps the tokens as an array and compares that as a whole: tens of microseconds for tens of
    thousands of tokens, four bytes each, and no index to keep for every length that may be looked up.
    """

    def __init__(self, longest: int = 4, shortest: int = 1) -> None:
        """Look for the last `longest` tokens first, then for fewer, down to `shortest`."""
        self.longest = longest
        self.shortest = shortest
        self._tokens = np.empty(1024, np.int32)
        self._count = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Guess up to `limit` tokens that continue `tokens`; an empty list means no guess.

        `tokens` only grow from one call to the next.
        """
        self._take(tokens)
        ends, size = self._matches()
        if size < self.shortest:
            return []
        # The latest occurrence wins: text repeats what it said last.
        start = int(ends[-1]) + 1
        # Where the text ends, what followed follows once more: a loop is guessed as far as one may guess.
        period = len(tokens) - start
        return [tokens[start + place % period] for place in range(limit)]

    def _matches(self) -> tuple[np.ndarray[tuple[int], np.dtype[np.int64]], int]:
        """Return where the longest tail that occurred before ends in each occurrence, and its length."""
        known = self._tokens[: self._count]
        ends = np.arange(0)
        for size in range(1, min(self.longest, self._count - 1) + 1):
            if size == 1:
                found = np.flatnonzero(known[:-1] == known[-1])
            else:
                # Occurrences that begin before the text does are none.
                found = ends[ends >= size - 1]
                found = found[known[found - (size - 1)] == known[-size]]
            if not len(found):
                return ends, size - 1
            ends = found
        return ends, min(self.longest, max(self._count - 1, 0))

    def _take(self, tokens: list[int]) -> None:
        """Append what is new; begin again where `tokens` cannot be what it was, grown."""
        known = self._count
        if len(tokens) < known or (known and tokens[known - 1] != self._tokens[known - 1]):
            known = 0
        if len(tokens) > len(self._tokens):
            grown = np.empty(2 * len(tokens), np.int32)
            grown[:known] = self._tokens[:known]
            self._tokens = grown
        self._tokens[known : len(tokens)] = tokens[known:]
        self._count = len(tokens)
