"""Every number of a step, told one by one."""

from __future__ import annotations

from array import array

import torch
from hypothesis import given
from hypothesis import strategies as st

from truekv.core.batch import Sequence
from truekv.memory.layout import lay_out

PAGE = 4
DEVICE = torch.device("cpu")


@st.composite
def some_rows(draw: st.DrawFn) -> list[tuple[Sequence, int, list[int], int]]:
    rows: list[tuple[Sequence, int, list[int], int]] = []
    for slot in range(draw(st.integers(1, 5))):
        first, tokens = draw(st.integers(0, 9)), draw(st.lists(st.integers(0, 99), max_size=9))
        pages = -(-(first + len(tokens)) // PAGE) + draw(st.integers(0, 2))
        table = draw(st.lists(st.integers(0, 50), min_size=pages, max_size=pages))
        sequence = Sequence(pages=array("q", table), slot=slot, replay=draw(st.integers(0, 3)))
        rows.append((sequence, first, tokens, draw(st.integers(0, len(tokens)))))
    if not any(tokens for _, _, tokens, _ in rows):
        rows.append((Sequence(pages=array("q", [7]), slot=9), 0, [3], 0))
    return rows


@given(some_rows())
def test_a_step_is_what_its_rows_say(rows: list[tuple[Sequence, int, list[int], int]]) -> None:
    step = lay_out(rows, PAGE, DEVICE)
    told = [
        (token, first + place, row, place, sequence.pages[(first + place) // PAGE], (first + place) % PAGE)
        for row, (sequence, first, tokens, _) in enumerate(rows)
        for place, token in enumerate(tokens)
    ]
    found = (step.tokens, step.positions, step.owner, step.offset, step.page, step.line)
    assert list(zip(*(part.tolist() for part in found), strict=True)) == told
    rowwise = (step.position, step.count, step.certain, step.replay, step.slot)
    assert list(zip(*(part.tolist() for part in rowwise), strict=True)) == [
        (first, len(tokens), len(tokens) - drafts, sequence.replay, sequence.slot)
        for sequence, first, tokens, drafts in rows
    ]
    start = 0
    for (sequence, _, tokens, _), gather, table in zip(rows, step.gather.tolist(), step.pages.tolist(), strict=True):
        own = list(sequence.pages)
        assert gather[: len(tokens)] == list(range(start, start + len(tokens)))
        assert set(gather[len(tokens) :]) <= set(range(len(told)))
        assert table[: len(own)] == own
        assert set(table[len(own) :]) <= {own[-1] if own else 0}
        start += len(tokens)
    assert step.gather.shape == (len(rows), max(len(tokens) for _, _, tokens, _ in rows))
    assert step.pages.shape == (len(rows), max(len(sequence.pages) for sequence, *_ in rows))
