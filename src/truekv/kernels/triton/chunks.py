"""A long row's timeline in chunks, for the recurrent rules: products of matrices within one, a state between them.

`advance` of a rule takes the state from chunk to chunk and leaves what each token gets from before its chunk; what it
gets from within needs no state, and `answer` adds it for all chunks at once. How many new tokens a row has says alone
whether it goes this way, so its bits depend on no companion. A row with drafts goes token by token, as the state in the
middle of it is kept.

Products are of float32 in three parts of TF32 each, which leaves them as good as float32's. Decays are added up over
exactly the tokens between two, never as a difference of two sums, which would lose what comes after a strong one. A
state is taken in parts of a few lines, from its slot and back: all of it at once leaves no registers to multiply in.
"""

# Shape suffixes: N tokens of a chunk.

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import triton
import triton.language as tl

from truekv.core.errors import Refused
from truekv.kernels.triton.timeline import find_part, most_parts

if TYPE_CHECKING:
    from truekv.core.batch import Step

LONG: Final = 32
"""New tokens from which a row goes in chunks."""
TOKENS: Final = 64
"""Of a chunk."""
LINES: Final = 32
"""Of a state that are multiplied at once."""
OPTIONS: Final[dict[str, Any]] = {"LONG": LONG, "TOKENS": TOKENS, "LINES": LINES, "PARTS": "tf32x3"}
"""Constants of every kernel that goes in chunks."""


def most_long(step: Step, drafts: int, width: int) -> tuple[int, int]:
    """Return how many rows of a step may go in chunks, replayed drafts among them, and how many chunks they may have.

    `width`: the most numbers of one place in a tensor that the kernels read or write. Raises Refused if 32 bits do not
    count them for all places.
    """
    rows, tokens = len(step.count), len(step.owner)
    if (places := tokens + rows * drafts) * width >= 1 << 31:
        raise Refused(
            f"the Triton kernels of recurrent layers count numbers of a step in 32 bits, which {places} places of "
            f"{width} exceed; use a smaller --max-num-batched-tokens"
        )
    long = min(rows, tokens // LONG)
    return long, most_parts(tokens, long, drafts, TOKENS)


@triton.jit
def find_row(number, counts, certains, replays, rows, LONG: tl.constexpr):
    """Count rows through that go in chunks: which one this is, -1 if there are fewer."""
    row, _ = find_part(number, counts, certains, replays, rows, 1 << 30, LONG)
    return row


@triton.jit
def laid_all(gather, place_N, total, old, replayed):
    """Where tokens lie in what was laid out, as laid_at says of one; anywhere from `total` on."""
    new_N = (place_N >= old) & (place_N < total)
    new_N = tl.load(gather + (place_N - old), mask=new_N, other=0).to(tl.int32)
    return tl.where(place_N >= old, new_N, replayed + place_N)


@triton.jit
def read_columns(x, row_N, inside_N, first, DIM: tl.constexpr, LINES: tl.constexpr):
    """LINES columns of the rows that begin at row_N, zeros where there are none."""
    column_C = first + tl.arange(0, LINES)
    real_NC = inside_N[:, None] & (column_C < DIM)[None, :]
    return tl.load(x + (row_N[:, None] + column_C[None, :]), mask=real_NC, other=0.0)


@triton.jit
def write_columns(x, value_NC, row_N, inside_N, first, DIM: tl.constexpr, LINES: tl.constexpr):
    """Write what read_columns would read."""
    column_C = first + tl.arange(0, LINES)
    real_NC = inside_N[:, None] & (column_C < DIM)[None, :]
    tl.store(x + (row_N[:, None] + column_C[None, :]), value_NC, mask=real_NC)


@triton.jit
def fade(decay_N):
    """From log decays, zeros after the last token: what is left of token j at token i, from the start, at the end."""
    place_N = tl.arange(0, decay_N.shape[0])
    added_NN = tl.where(place_N[:, None] > place_N[None, :], decay_N[:, None], 0.0)
    # [i, j]: the sum over j < m <= i.
    left_NN = tl.where(place_N[:, None] >= place_N[None, :], tl.exp(tl.cumsum(added_NN, 0)), 0.0)
    return left_NN, tl.exp(tl.cumsum(decay_N, 0)), tl.exp(tl.sum(added_NN, 0))
