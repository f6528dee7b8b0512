"""How many drafts to ask for: as many as lately paid, and none where guessing does not."""

from __future__ import annotations

from typing import Final

_START: Final = 0.5
_FLOOR: Final = 0.2
_PRIOR: Final = 3
_MEMORY: Final = 16
_FIRST_PAUSE: Final = 16
_LONGEST_PAUSE: Final = 128


class DraftLength:
    """Follows one request: verified drafts in, the number to ask for next out. The same history, the same answers.

    A draft counts when all before it are accepted, so n drafts bring 1 + rate + ... + rate ** n tokens in
    the time of 1 + n * cost steps, where `rate` is a moving average of single drafts, of few at first.
    The n that brings most per time is asked for. Where that is none, the request goes on without drafts
    and probes with a single one after 16 steps, 32, 64, 128, 128 ...: a text in which nothing is ever
    accepted wastes 2 drafts at once and 4 more in its first 250 tokens. One accepted probe suffices to go on.
    """

    def __init__(self, most: int, cost: float = 0.3) -> None:
        """Ask for up to `most`; `cost` is the time of one more draft in a step, in steps without any."""
        self.most = most
        self.cost = cost
        self.rate = _START
        self._seen = 0
        self._pause = _FIRST_PAUSE
        self._waited = 0

    def ask(self) -> int:
        """Return how many drafts the next step should verify, 0 to `most`; called once a step."""
        best, best_speed, tokens = 0, 1.0, 1.0
        for count in range(1, self.most + 1):
            tokens += self.rate**count
            speed = tokens / (1 + self.cost * count)
            if speed > best_speed:
                best, best_speed = count, speed
        if best:
            return best
        self._waited += 1
        return min(1, self.most) if self._waited > self._pause else 0

    def report(self, drafted: int, accepted: int) -> None:
        """Learn that of `drafted` drafts in a step the first `accepted` were right; nothing where none were made."""
        if not drafted:
            return
        if self._waited:
            # What a probe says counts for more than what was long ago.
            self._seen, self._waited = 0, 0
            self._pause = _FIRST_PAUSE if accepted else min(2 * self._pause, _LONGEST_PAUSE)
        for right in [True] * accepted + [False] * (accepted < drafted):
            weight = 1 / min(_PRIOR + self._seen, _MEMORY)
            self.rate = max(_FLOOR, self.rate + weight * (right - self.rate))
            self._seen += 1
