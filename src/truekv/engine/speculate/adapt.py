"""How many drafts to ask for: as many as lately paid, and none where guessing does not."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Final

from truekv.engine.padding import StepSize, nobody

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.batch import Step
    from truekv.core.lazy import torch

START: Final = 0.5
"""How often a draft is accepted of which nothing is known."""
_FLOOR: Final = 0.05
_UNTIMED: Final = 0.05
_PRIOR: Final = 3
_MEMORY: Final = 16
_FIRST_PAUSE: Final = 16
_LONGEST_PAUSE: Final = 128
_ROUNDS: Final = 5


class DraftLength:
    """Follows one request: verified drafts in, the number to ask for next out. The same history, the same answers.

    A draft counts when all before it are accepted, so n drafts bring 1 + rate + ... + rate ** n tokens in
    the time of 1 + n * cost steps, where `rate` is a moving average of single drafts, of few at first.
    The n that brings most per time is asked for. Where that is none, the request goes on without drafts
    and probes with a single one after 16 steps, 32, 64, 128, 128 ...: where a draft costs 0.3 steps, a text in
    which nothing is ever accepted wastes 2 drafts at once and 4 more in its first 250 tokens, and one accepted
    probe suffices to go on.
    """

    def __init__(self, most: int, cost: float, rate: float = START) -> None:
        """Ask for up to `most`, where one more draft takes `cost` steps without any and `rate` is the first guess."""
        self.most = most
        self.cost = cost
        self.rate = rate
        self._seen = 0
        self._pause = _FIRST_PAUSE
        # The first step probes where it would not draft.
        self._waited = _FIRST_PAUSE

    def ask(self) -> int:
        """Return how many drafts the next step should verify, 0 to `most`; called once a step."""
        best, best_speed, tokens = 0, 1.0, 1.0
        for count in range(1, self.most + 1):
            tokens += self.rate**count
            speed = tokens / (1 + self.cost * count)
            if speed > best_speed:
                best, best_speed = count, speed
        if best:
            self._waited = 0
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


def draft_cost(
    run: Callable[[Step], torch.Tensor],
    guess: Callable[[Step, int], torch.Tensor] | None,
    most: int,
    device: torch.device,
) -> float:
    """Time one more draft of a single request, in steps without any: what DraftLength reckons with.

    `run` makes logits of a step's tokens, `guess` so many drafts after one, None where guessing is free. The steps
    belong to nobody, so they read and write no memory; of several rounds in turns the least time counts. Attention,
    the recurrent layers' log and sampling are reckoned as a twentieth of a step.
    """
    one = nobody(StepSize(1, 1, 1, 1), 0, 0, device)
    all_drafts = nobody(StepSize(1 + most, 1, 1 + most, 1), 0, 0, device)
    timed: list[Callable[[], torch.Tensor]] = [lambda: run(one), lambda: run(all_drafts)]
    if guess:
        timed += [lambda: guess(one, 0), lambda: guess(one, most)]
    rounds = [[_seconds(what) for what in timed] for _ in range(1 + _ROUNDS)]
    # The first round also sets things up.
    least = [min(times) for times in zip(*rounds[1:], strict=True)]
    plain, longer = sum(least[::2]), sum(least[1::2])
    return _UNTIMED + max(0.0, longer - plain) / (most * plain)


def _seconds(run: Callable[[], torch.Tensor]) -> float:
    start = time.perf_counter()
    run().cpu()  # which waits for the device
    return time.perf_counter() - start
