"""How rows of tokens become the tensors of a step."""

from __future__ import annotations

import itertools
import struct
from typing import TYPE_CHECKING

from truekv.core.batch import Step
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence


def lay_out(rows: Seq[tuple[Sequence, int, list[int], int]], page_tokens: int, device: torch.device) -> Step:
    """Lay out (sequence, first position, tokens, drafts) of each row."""
    counts = [len(tokens) for _, _, tokens, _ in rows]
    total, batch, longest = sum(counts), len(rows), max(counts)
    width = max(len(sequence.pages) for sequence, *_ in rows)
    tokens: list[int] = []
    positions: list[int] = []
    owner: list[int] = []
    offset: list[int] = []
    gather: list[int] = []
    pages: list[int] = []
    page: list[int] = []
    line: list[int] = []
    for row, ((sequence, first, own, _), count) in enumerate(zip(rows, counts, strict=True)):
        table, places, start = sequence.pages, range(first, first + count), len(tokens)
        tokens += own
        positions += places
        owner += [row] * count
        offset += range(count)
        gather += range(start, start + count)
        gather += [min(max(start, start + count - 1), total - 1)] * (longest - count)
        # A row of the table must hold real pages to its end, so that a gather never leaves memory.
        pages += table + (table[-1:] or [0]) * (width - len(table))
        page += [table[place // page_tokens] for place in places]
        line += [place % page_tokens for place in places]
    position = [first for _, first, _, _ in rows]
    certain = [count - drafts for (*_, drafts), count in zip(rows, counts, strict=True)]
    replay = [sequence.replay for sequence, *_ in rows]
    slot = [sequence.slot for sequence, *_ in rows]
    # One tensor and one copy: each on its own would make the host wait for the device.
    values = [tokens, positions, owner, offset, gather, position, counts, certain, replay, slot, pages, page, line]
    numbers = list(itertools.chain.from_iterable(values))
    # Page tables of long sequences are most of them, and torch takes several times as long over a list.
    data = bytearray(8 * len(numbers))
    struct.pack_into(f"{len(numbers)}q", data, 0, *numbers)
    numbers_N = torch.frombuffer(data, dtype=torch.int64).to(device)
    parts = list(torch.split(numbers_N, [len(value) for value in values]))
    parts[4], parts[10] = parts[4].view(batch, longest), parts[10].view(batch, width)
    return Step(*parts)
