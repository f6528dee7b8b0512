"""How rows of tokens become the tensors of a step."""

# Shape suffixes: T tokens, B rows, Q the longest row, W the widest page table, G all that is given of rows.

from __future__ import annotations

import itertools
import operator
from array import array
from typing import TYPE_CHECKING

import numpy as np

from truekv.core.batch import Step
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence


def lay_out(rows: Seq[tuple[Sequence, int, list[int], int]], page_tokens: int, device: torch.device) -> Step:
    """Lay out (sequence, first position, tokens, drafts) of each row."""
    sequences, positions, tokens, drafts = zip(*rows, strict=True)
    counts, tables = [len(own) for own in tokens], [sequence.pages for sequence in sequences]
    batch, longest, width = len(rows), max(counts), max([len(table) for table in tables])
    given = array("q", [*positions, *counts, *map(operator.sub, counts, drafts)])
    given.extend([sequence.replay for sequence in sequences])
    given.extend([sequence.slot for sequence in sequences])
    for table in tables:
        given.extend(table)
        # A row of the table must hold real pages to its end, so that a gather never leaves memory.
        if missing := width - len(table):
            given.extend((table[-1:] or array("q", [0])) * missing)
    tokens_T = array("q", list(itertools.chain.from_iterable(tokens)))
    total = len(tokens_T)
    given_G = np.frombuffer(given, np.int64)
    position_B, count_B, pages_BW = given_G[:batch], given_G[batch : 2 * batch], given_G[5 * batch :].reshape(batch, -1)
    start_B = count_B.cumsum() - count_B
    owner_T = np.arange(batch).repeat(count_B)
    offset_T = np.arange(total) - start_B[owner_T]
    positions_T = position_B[owner_T] + offset_T
    # Of a row without tokens the first of the next one, or the last of all.
    last_B = np.minimum(start_B + np.maximum(count_B, 1), total) - 1
    gather_BQ = np.minimum(start_B[:, None] + np.arange(longest), last_B[:, None])
    place_T, line_T = np.divmod(positions_T, page_tokens)
    ends = pages_BW[owner_T, place_T], line_T
    # One tensor and one copy: each on its own would make the host wait for the device.
    numbers = np.concatenate([tokens_T, positions_T, owner_T, offset_T, gather_BQ.ravel(), given_G, *ends])
    sizes = [total] * 4 + [batch * longest] + [batch] * 5 + [batch * width] + [total] * 2
    parts = list(torch.frombuffer(numbers, dtype=torch.int64).to(device).split_with_sizes(sizes))
    parts[4], parts[10] = parts[4].view(batch, longest), parts[10].view(batch, width)
    return Step(*parts)
