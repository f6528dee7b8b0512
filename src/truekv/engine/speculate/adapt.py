"""How many drafts to ask for: as many as lately paid, and none where guessing does not."""

from __future__ import annotations

from typing import Final

_START: Final = 0.5
_FLOOR: Final = 0.2
_WEIGHT: Final = 0.25
_FIRST_PAUSE: Final = 8
_LONGEST_PAUSE: Final = 128


class DraftLength:
    """Follows one request: verified drafts in, the number to ask for next out. The same history, the same answers.

    A draft counts when all before it are accepted, so the n-th is accepted with about rate ** n, where
    `rate` is a moving average of single drafts. It is worth verifying while that exceeds its cost. Where
    not even one is, the request goes on without drafts and probes with a single one after 8 steps, 16,
    32, ... 128: a text in which nothing is ever accepted wastes 2 drafts at once, then 5 in 250 tokens,
    and 1 in 128 from there. From the floor of the rate one accepted probe suffices to go on.
    """

    def __init__(self, most: int, cost: float = 0.3) -> None:
        """Ask for up to `most`; `cost` is the time of one more draft in a step, in steps without any."""
        self.most = most
        self.cost = cost
        self.rate = _START
        self._pause = _FIRST_PAUSE
        self._waited = 0

    def ask(self) -> int:
        """Return how many drafts the next step should verify, 0 to `most`; called once a step."""
        count = 0
        while count < self.most and self.rate ** (count + 1) >= self.cost:
            count += 1
        if count:
            return count
        self._waited += 1
        return min(1, self.most) if self._waited > self._pause else 0

    def report(self, drafted: int, accepted: int) -> None:
        """Learn that of `drafted` drafts in a step the first `accepted` were right; nothing where none were made."""
        if not drafted:
            return
        if self._waited:
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
            self._waited = 0
        if accepted:
            self._pause = _FIRST_PAUSE
        for right in [True] * accepted + [False] * (accepted < drafted):
            self.rate = max(_FLOOR, self.rate + _WEIGHT * (right - self.rate))
