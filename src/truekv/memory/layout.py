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
    total, batch, longest = sum(counts), len(rows), max(counts)
    width = max(len(item.pages) for item in sequences)
    ends = list(itertools.accumulate(counts))
    places = [(item, first + place) for item, first, tokens, _ in rows for place in range(len(tokens))]
    # A row of the table must hold real pages to its end, so that a gather never leaves memory.
    table = [item.pages + (item.pages[-1:] or [0]) * (width - len(item.pages)) for item in sequences]
    values: dict[str, list[int]] = {
        "tokens": [token for _, _, tokens, _ in rows for token in tokens],
        "positions": [position for _, position in places],
        "owner": [row for row, count in enumerate(counts) for _ in range(count)],
        "offset": [place for count in counts for place in range(count)],
        "gather": [
            min(end - count + min(place, max(count - 1, 0)), total - 1)
            for end, count in zip(ends, counts, strict=True)
            for place in range(longest)
        ],
        "position": [first for _, first, _, _ in rows],
        "count": counts,
        "certain": [len(tokens) - drafts for _, _, tokens, drafts in rows],
        "replay": [item.replay for item in sequences],
        "slot": [item.slot for item in sequences],
        "pages": list(itertools.chain.from_iterable(table)),
        "page": [item.pages[position // page_tokens] for item, position in places],
        "line": [position % page_tokens for _, position in places],
    }
    # One tensor and one copy: each on its own would make the host wait for the device.
    numbers = torch.tensor(list(itertools.chain.from_iterable(values.values())), dtype=torch.int64, device=device)
    parts = torch.split(numbers, [len(part) for part in values.values()])
    views = dict(zip(values, parts, strict=True))
    views["gather"], views["pages"] = views["gather"].view(batch, longest), views["pages"].view(batch, width)
    return Step(**views)
