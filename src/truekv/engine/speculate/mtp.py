"""Drafts of the checkpoint's own prediction head, for all sequences of a step at once.

Between a step's verification and `arena.advance`, every sequence tells which of its tokens have become
real. One pass of the head over those writes its rows for them and makes the first draft of each
sequence; the others come one by one, each from the state that made the one before it. Rows of drafts
lie beyond what is real, so the next step's pass overwrites them.

Shapes: T tokens that became real, B sequences, D drafts, C hidden size, N columns of a table.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, cast

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.engine.capture import WARMED_PAGES, StepGraphs

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.batch import Step
    from truekv.core.protocols import DraftHead, Model
    from truekv.memory.arena import Arena

    Guess = Callable[..., torch.Tensor]
    """A step, the states [T, hidden_size] of its tokens and a table [T, N] of its rows to drafts; see Predictor."""

_COLUMNS: Final = 4
"""Of a table, for each pass."""


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
        count = max(row.wanted for row in rows)
        places = [place for row in rows for place in row.places]
        table = self._table(rows, count - 1)
        table += [[0] * len(table[0])] * (len(places) - len(rows))
        numbers = torch.tensor(
            [[place, *line] for place, line in zip(places, table, strict=True)], device=self.arena.device
        )
        try:
            with torch.inference_mode():
                state_TC = hidden_TC.index_select(0, numbers[:, 0])
                drafts_TD = self._guess_of(count)(step, state_TC, numbers[:, 1:])
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
        with torch.inference_mode():
            return self._guess_of(count)(step, *self._zeros(len(step.tokens), count, dtype))

    def warm(self, count: int, dtype: torch.dtype, progress: Callable[[int, int], None]) -> None:
        """Record what makes `count` drafts, if it is recorded, for steps of every size; see StepGraphs.warm.

        Fewer drafts launch no other kernels, so what they record later takes little time.
        """
        guess = self._guess_of(count)
        if isinstance(guess, StepGraphs):
            guess.warm(WARMED_PAGES, *self._zeros(0, count, dtype), progress=progress)

    def _zeros(self, total: int, count: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the states and the table of so many tokens, from which `count` drafts are made."""
        columns, device = 1 + _COLUMNS * max(0, count - 1), self.arena.device
        return (
            torch.zeros(total, self._size, dtype=dtype, device=device),
            torch.zeros(total, columns, dtype=torch.int64, device=device),
        )

    def _guess_of(self, count: int) -> Guess:
        """Return the function that makes up to `count` drafts for every row of a step."""
        if count not in self._guesses:
            guess = functools.partial(self._guess, count)
            self._guesses[count] = self._replayed(guess) if self._replayed else guess
        return self._guesses[count]

    def _table(self, rows: Sequence[Row], passes: int) -> list[list[int]]:
        """For each row: where its last token is, and for each pass what of its step no device has to work out.

        That is the draft's position, 1 if it is to be stored, and its page and line + 1, all 0 where it is not.
        """
        size = self.arena.plan.page_tokens
        table: list[list[int]] = []
        end = 0
        for row in rows:
            end += len(row.following)
            line = [end - 1]
            for place in range(passes):
                position = row.start + len(row.following) + place
                if place + 1 < row.wanted:
                    line += [position, 1, row.sequence.pages[position // size], 1 + position % size]
                else:
                    line += [position, 0, 0, 0]
            table.append(line)
        return table

    def _guess(self, count: int, step: Step, hidden_TC: torch.Tensor, table_TN: torch.Tensor) -> torch.Tensor:
        """Make drafts [T, count], those of row b in row b: one pass over the step, one over each draft but the last.

        Row b of `table_TN` is that of `_table`, and rows without tokens have zeros. Where a logit is not finite the
        draft is -1. All of it happens on the device, which the host need not wait for.
        """
        layers, largest = self.arena.draft_layers, self.arena.kernels.ops.largest
        state_TC = self.head.forward(self.head.begin(hidden_TC), step, layers)
        drafts_DT = step.tokens.new_empty(count, len(step.tokens)).fill_(-1)
        if not count:
            return drafts_DT.t()
        batch = len(step.count)
        # Columns of these are what kernels are given, so each lies as densely as a step's own.
        last_B, *columns = table_TN[:batch].t().contiguous()
        row_B = torch.arange(batch, device=last_B.device)
        one_token = replace(step, owner=row_B, offset=torch.zeros_like(row_B), gather=row_B[:, None])
        state_BC = state_TC.index_select(0, last_B)
        for place in range(count):
            best_B = largest(self.head.logits(state_BC))
            drafts_DT[place, :batch] = best_B
            if place + 1 < count:
                position_B, count_B, page_B, line_B = columns[_COLUMNS * place : _COLUMNS * (place + 1)]
                one_token = replace(
                    one_token,
                    # Nobody looks at what follows where there is no draft, so any token will do.
                    tokens=best_B.clamp(min=0),
                    positions=position_B,
                    position=position_B,
                    count=count_B,
                    certain=count_B,
                    page=page_B,
                    line=line_B - 1,
                )
                state_BC = self.head.forward(state_BC, one_token, layers)
        return drafts_DT.t()
