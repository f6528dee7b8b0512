"""How rows of tokens become the tensors of a step."""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from truekv.core.batch import Step
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence


def lay_out(rows: Seq[tuple[Sequence, int, list[int], int]], page_tokens: int, device: torch.device) -> Step:
    """Lay out (sequence, first position, tokens, drafts) of each row."""
    counts = [len(tokens) for _, _, tokens, _ in rows]
    sequences = [sequence for sequence, *_ in rows]
    total, longest, width = sum(counts), max(counts), max(len(item.pages) for item in sequences)
    starts = [sum(counts[:row]) for row in range(len(counts))]
    positions = [range(first, first + count) for (_, first, _, _), count in zip(rows, counts, strict=True)]
    # A row of the table must hold real pages to its end, so that a gather never leaves memory.
    table = [item.pages + [item.pages[-1] if item.pages else 0] * (width - len(item.pages)) for item in sequences]
    values = {
        "tokens": [token for _, _, tokens, _ in rows for token in tokens],
        "positions": [position for row in positions for position in row],
        "owner": [row for row, count in enumerate(counts) for _ in range(count)],
        "offset": [place for count in counts for place in range(count)],
        "gather": [
            min(start + min(place, max(count - 1, 0)), total - 1)
            for start, count in zip(starts, counts, strict=True)
            for place in range(longest)
        ],
        "position": [first for _, first, _, _ in rows],
        "count": counts,
        "certain": [len(tokens) - drafts for _, _, tokens, drafts in rows],
        "replay": [item.replay for item in sequences],
        "slot": [item.slot for item in sequences],
        "pages": [page for row in table for page in row],
        "page": [
            item.pages[position // page_tokens]
            for item, row in zip(sequences, positions, strict=True)
            for position in row
        ],
        "line": [position % page_tokens for row in positions for position in row],
    }
    # One tensor and one copy: each on its own would make the host wait for the device.
    flat = torch.tensor(list(itertools.chain.from_iterable(values.values())), dtype=torch.int64, device=device)
    parts = dict(zip(values, torch.split(flat, [len(part) for part in values.values()]), strict=True))
    parts["gather"] = parts["gather"].view(len(rows), longest)
    parts["pages"] = parts["pages"].view(len(rows), width)
    return Step(**parts)
