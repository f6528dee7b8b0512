"""Drafts of the checkpoint's own prediction head, for all sequences of a step at once.

Between a step's verification and `arena.advance`, every sequence tells which of its tokens have become
real. One pass of the head over those writes its rows for them and makes the first draft of each
sequence; the others come one by one, each from the state that made the one before it. Rows of drafts
lie beyond what is real, so the next step's pass overwrites them.

Shapes: T tokens that became real, B sequences, D drafts, P passes over one of them, C hidden size.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.batch import Step
    from truekv.core.protocols import DraftHead, Model
    from truekv.memory.arena import Arena

    Guess = Callable[..., torch.Tensor]
    """A step, the states [T, hidden_size] of its tokens and how many drafts [T] their rows want to drafts."""


@dataclass(frozen=True, slots=True)
class Row:
    """What one sequence tells the head after a step."""

    sequence: Held
    start: int
    """Position of the first residual: how many tokens were real before the step."""
    following: list[int]
    """The token after each residual's token; the last one is the newest, which no step has seen yet."""
    places: Sequence[int]
    """Where in the step's residuals theirs are, one for each of `following`."""
    wanted: int
    """Drafts to make, 0 to write the rows alone."""


class Predictor:
    """Guesses with a model's prediction head, whose rows the arena keeps in its draft layers."""

    def __init__(self, model: Model, arena: Arena, replayed: Callable[[Guess], Guess] | None = None) -> None:
        """Refuse a model that was loaded without its head, and an arena without its layers.

        `replayed` replaces a function by one that gives the same.
        """
        head = model.draft_head
        if head is None or not arena.draft_layers:
            what = "model was loaded" if head is None else "memory was planned"
            raise Refused(f"the {what} without the multi-token-prediction head; load and plan it, or use ngram")
        self.head: DraftHead = head
        self.arena = arena
        self._size = model.spec.hidden_size
        self._replayed = replayed
        self._guesses: dict[int, Guess] = {}

    def propose(self, rows: Sequence[Row], hidden_TC: torch.Tensor) -> list[list[int]]:
        """Write the head's rows for tokens that became real, and return each sequence's drafts, at most `wanted`.

        `hidden_TC`: the residuals of the whole step, before the final norm. Every token of a sequence
        must pass here once, also where no drafts are wanted: later drafts read its row. A chunk of the
        step needs `wanted` - 1 lines of room. A sequence whose numbers are not finite gets no (further)
        drafts; its tokens do not depend on them.
        """
        if not rows:
            return []
        step = self.arena.draft_step(
            [(row.sequence, row.start, row.following) for row in rows], [row.wanted for row in rows]
        )
        places_T, wanted_T = torch.tensor(
            [
                [place for row in rows for place in row.places],
                [row.wanted for row in rows for _ in row.places],
            ],
            device=hidden_TC.device,
        )
        try:
            with torch.inference_mode():
                guess = self._guess_of(max(row.wanted for row in rows))
                drafts_TD = guess(step, hidden_TC.index_select(0, places_T), wanted_T)
        except Corrupted:
            # Memory takes a step's rows together or not at all: one sequence must not cost the others theirs.
            return [[]] if len(rows) == 1 else [self.propose([row], hidden_TC)[0] for row in rows]
        drafts = cast("list[list[int]]", drafts_TD[: len(rows)].tolist())
        return [
            list(itertools.takewhile(lambda token: token >= 0, found[: row.wanted]))
            for row, found in zip(rows, drafts, strict=True)
        ]

    def rehearse(self, step: Step, count: int, dtype: torch.dtype) -> torch.Tensor:
        """Make drafts after every token of a step, from states of zeros."""
        tokens = step.tokens
        state_TC = torch.zeros(len(tokens), self._size, dtype=dtype, device=self.arena.device)
        with torch.inference_mode():
            return self._guess_of(count)(step, state_TC, torch.full_like(tokens, count))

    def _guess_of(self, count: int) -> Guess:
        """Return the function that makes up to `count` drafts for every row of a step."""
        if count not in self._guesses:
            guess = functools.partial(self._guess, count)
            self._guesses[count] = self._replayed(guess) if self._replayed else guess
        return self._guesses[count]

    def _guess(self, count: int, step: Step, hidden_TC: torch.Tensor, wanted_T: torch.Tensor) -> torch.Tensor:
        """Make drafts [T, count], those of row b in row b: one pass over the step, one over each draft but the last.

        `wanted_T` is how many the row of each token wants; where a logit is not finite its draft is -1. All of it
        happens on the device, which the host need not wait for.
        """
        layers, largest = self.arena.draft_layers, self.arena.kernels.ops.largest
        state_TC = self.head.forward(self.head.begin(hidden_TC), step, layers)
        drafts_DT = step.tokens.new_empty(count, len(step.tokens)).fill_(-1)
        if count:
            last_B = step.gather.gather(1, (step.count - 1).clamp(min=0)[:, None])[:, 0]
            state_BC = state_TC.index_select(0, last_B)
            passes = self._passes(step, wanted_T, count - 1)
            for place in range(count):
                best_B = largest(self.head.logits(state_BC))
                drafts_DT[place, : len(best_B)] = best_B
                if place < len(passes):
                    # The output is no longer looked at where there is no draft, so any token will do.
                    one_token = replace(passes[place], tokens=best_B.clamp(min=0))
                    state_BC = self.head.forward(state_BC, one_token, layers)
        return drafts_DT.t()

    def _passes(self, step: Step, wanted_T: torch.Tensor, count: int) -> list[Step]:
        """Lay out passes over the first `count` drafts of each row, one after the other, but for their tokens.

        Drafts of rows that want fewer are stored nowhere.
        """
        if not count:
            return []
        size = self.arena.plan.page_tokens
        batch, width = step.pages.shape
        row_B = torch.arange(batch, device=wanted_T.device)
        place_P1 = torch.arange(count, device=wanted_T.device)[:, None]
        wanted_B = wanted_T.index_select(0, step.gather[:, 0]).masked_fill(step.count == 0, 0)
        stored_PB = place_P1 < wanted_B - 1
        position_PB = step.position + step.count + place_P1
        # Rows of these are what kernels are given, so each lies as densely as a step's own.
        page_PB = step.pages.t().gather(0, (position_PB // size).clamp(max=width - 1))
        line_PB = (position_PB % size).masked_fill(stored_PB.logical_not(), -1)
        count_PB = stored_PB.to(torch.int64)
        one_token = replace(step, owner=row_B, offset=torch.zeros_like(row_B), gather=row_B[:, None])
        return [
            replace(
                one_token,
                positions=position_B,
                position=position_B,
                count=one_B,
                certain=one_B,
                page=page_B,
                line=line_B,
            )
            for position_B, one_B, page_B, line_B in zip(position_PB, count_PB, page_PB, line_PB, strict=True)
        ]
