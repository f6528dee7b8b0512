"""How rows of tokens become the tensors of a step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.batch import Step
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence


def lay_out(rows: Seq[tuple[Sequence, int, list[int], int]], page_tokens: int, device: torch.device) -> Step:
    """Lay out (sequence, first position, tokens, drafts) of each row."""

    def tensor(values: list[int] | list[list[int]]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int64, device=device)

    counts = [len(tokens) for _, _, tokens, _ in rows]
    sequences = [sequence for sequence, *_ in rows]
    total, longest, width = sum(counts), max(counts), max(len(item.pages) for item in sequences)
    starts = [sum(counts[:row]) for row in range(len(counts))]
    positions = [range(first, first + count) for (_, first, _, _), count in zip(rows, counts, strict=True)]
    # A row of the table must hold real pages to its end, so that a gather never leaves memory.
    table = [item.pages + [item.pages[-1] if item.pages else 0] * (width - len(item.pages)) for item in sequences]
    return Step(
        tokens=tensor([token for _, _, tokens, _ in rows for token in tokens]),
        positions=tensor([position for row in positions for position in row]),
        owner=tensor([row for row, count in enumerate(counts) for _ in range(count)]),
        offset=tensor([place for count in counts for place in range(count)]),
        gather=tensor(
            [
                [min(start + min(place, max(count - 1, 0)), total - 1) for place in range(longest)]
                for start, count in zip(starts, counts, strict=True)
            ]
        ),
        position=tensor([first for _, first, _, _ in rows]),
        count=tensor(counts),
        certain=tensor([len(tokens) - drafts for _, _, tokens, drafts in rows]),
        replay=tensor([item.replay for item in sequences]),
        slot=tensor([item.slot for item in sequences]),
        pages=tensor(table),
        page=tensor(
            [
                item.pages[position // page_tokens]
                for item, row in zip(sequences, positions, strict=True)
                for position in row
            ]
        ),
        line=tensor([position % page_tokens for row in positions for position in row]),
    )
