"""Prompt lookup: the longest recent n-gram that occurred before proposes what followed it."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Ngram:
    """Proposes by lookup in the request's own tokens (Saxena 2023, prompt lookup decoding)."""

    longest: int = 4
    shortest: int = 1

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Guess up to `limit` tokens that continue `tokens`; an empty list means no guess."""
        for size in range(min(self.longest, len(tokens) - 1), self.shortest - 1, -1):
            tail = tokens[-size:]
            # The latest occurrence wins: text repeats what it said last.
            for start in range(len(tokens) - size - 1, -1, -1):
                if tokens[start : start + size] == tail:
                    return tokens[start + size : start + size + limit]
        return []
