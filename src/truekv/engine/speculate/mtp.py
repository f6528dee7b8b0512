"""Drafts of the checkpoint's own prediction head, for all sequences of a step at once.

Between a step's verification and `arena.advance`, every sequence tells which of its tokens have become
real. One pass of the head over those writes its rows for them and makes the first draft of each
sequence; the others come one by one, each from the state that made the one before it. Rows of drafts
lie beyond what is real, so the next step's pass overwrites them.

Shapes: T tokens that became real, N sequences that go on drafting, C hidden size, V vocabulary.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.protocols import DraftHead, Model
    from truekv.memory.arena import Arena


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

    def __init__(self, model: Model, arena: Arena) -> None:
        """Refuse a model that was loaded without its head, and an arena without its layers."""
        head = model.draft_head
        if head is None or not arena.draft_layers:
            what = "model was loaded" if head is None else "memory was planned"
            raise Refused(f"the {what} without the multi-token-prediction head; load and plan it, or use ngram")
        self.head: DraftHead = head
        self.arena = arena

    def propose(self, rows: Sequence[Row], hidden_TC: torch.Tensor) -> list[list[int]]:
        """Write the head's rows for tokens that became real, and return each sequence's drafts, at most `wanted`.

        `hidden_TC`: the residuals of the whole step, before the final norm. Every token of a sequence
        must pass here once, also where no drafts are wanted: later drafts read its row. A chunk of the
        step needs `wanted` - 1 lines of room. A sequence whose numbers are not finite gets no (further)
        drafts; its tokens do not depend on them.
        """
        drafts: list[list[int]] = [[] for _ in rows]
        if not rows:
            return drafts
        with torch.inference_mode():
            last_NC = self._catch_up(rows, hidden_TC)
            live = [index for index, row in enumerate(rows) if row.wanted > 0]
            state_NC = last_NC[live]
            while live:
                going = self._draft(rows, drafts, live, state_NC)
                live = [live[place] for place in going]
                if live:
                    try:
                        state_NC = self._chain(rows, drafts, live, state_NC[going])
                    except Corrupted:
                        break
        return drafts

    def _catch_up(self, rows: Sequence[Row], hidden_TC: torch.Tensor) -> torch.Tensor:
        """Pass over all that became real; return each sequence's last state, NaN where its rows cannot be stored."""
        places = [place for row in rows for place in row.places]
        ends = list(itertools.accumulate(len(row.following) for row in rows))
        try:
            step = self.arena.draft_step([(row.sequence, row.start, row.following) for row in rows])
            state_TC = self.head.forward(self.head.begin(hidden_TC[places]), step, self.arena.draft_layers)
        except Corrupted:
            # Memory takes a step's rows together or not at all: one sequence must not cost the others theirs.
            if len(rows) == 1:
                return torch.full_like(hidden_TC[:1], math.nan)
            return torch.cat([self._catch_up([row], hidden_TC) for row in rows])
        return state_TC[[end - 1 for end in ends]]

    def _draft(
        self, rows: Sequence[Row], drafts: list[list[int]], live: list[int], state_NC: torch.Tensor
    ) -> list[int]:
        """Add each live sequence's likeliest token to its drafts; return the places of those that go on."""
        logits_NV = self.head.logits(state_NC)
        best_N = cast("list[int]", logits_NV.argmax(-1).tolist())
        sound_N = cast("list[bool]", torch.isfinite(logits_NV).all(-1).tolist())
        going: list[int] = []
        for place, (index, token, sound) in enumerate(zip(live, best_N, sound_N, strict=True)):
            if sound:
                drafts[index].append(token)
                if len(drafts[index]) < rows[index].wanted:
                    going.append(place)
        return going

    def _chain(
        self, rows: Sequence[Row], drafts: Sequence[list[int]], live: Sequence[int], state_NC: torch.Tensor
    ) -> torch.Tensor:
        """Pass over the last draft of each live sequence, whose state is the one that made it."""
        step = self.arena.draft_step(
            [
                (rows[index].sequence, rows[index].start + len(rows[index].following) + len(drafts[index]) - 1, [token])
                for index in live
                for token in drafts[index][-1:]
            ]
        )
        return self.head.forward(state_NC, step, self.arena.draft_layers)
