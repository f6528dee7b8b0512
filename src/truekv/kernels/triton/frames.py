"""Into frames and out of them, outside of the loop that reads the cache: queries before it, merged averages after it.

See formats/frame.py: a query meets stored keys as H(s * q), and an average o of stored values means c + s * H^T o.
"""

# Shape suffixes: R rows of a tile (one token and query head each), D dims, C columns in storage order, B of them.

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl

from truekv.kernels.triton.attention import LOWEST, fold
from truekv.kernels.triton.codes import dims


@dataclass(frozen=True)
class Blocks:
    """How many numbers of a row a program takes at once as it takes queries into a frame."""

    columns: int
    """Of the framed query."""
    dims: int
    """Of the query, all of them and up to a power of two."""
    width: int
    """Of the query, in one product with a rotation."""


@triton.jit(do_not_specialize=["rows"])
def query_kernel(
    query,  # [T, H, D] with these strides
    scale,  # float32 [K, D], or None
    rotation,  # int8 [D, C], or None; see layout.rotation
    framed,  # out: [T, H, C] operands
    factor,  # out: float32 [T, H]
    token_stride,
    head_stride,
    query2,  # of another field, or None
    scale2,
    rotation2,
    framed2,
    factor2,
    token_stride2,
    head_stride2,
    rows,
    softmax_scale,
    ROW: tl.constexpr,
    ROW2: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCKS2: tl.constexpr,
):
    """Take queries into the frames of one field or two; grid: (tiles of rows, fields)."""
    if tl.program_id(1) == 0:
        _enter(
            *(query, scale, rotation, framed, factor, token_stride, head_stride, rows, softmax_scale),
            *(ROW, HEADS, GROUP, BLOCK_R, BLOCKS),
        )
    elif query2 is not None:
        _enter(
            *(query2, scale2, rotation2, framed2, factor2, token_stride2, head_stride2, rows, softmax_scale),
            *(ROW2, HEADS, GROUP, BLOCK_R, BLOCKS2),
        )


@triton.jit
def _enter(
    query,
    scale,
    rotation,
    framed,
    factor,
    token_stride,
    head_stride,
    rows,
    softmax_scale,
    ROW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Take a tile of queries into the frame of a field, divided by their norms where rows are codes.

    The factor of a query is its norm, if it was divided by it, times what turns a score into a power of two.
    """
    BLOCK_C: tl.constexpr = BLOCKS.columns
    WIDTH: tl.constexpr = BLOCKS.width
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    asked_R = row_R < rows
    token_R, head_R = (row_R // (HEADS * GROUP)).to(tl.int64), row_R % (HEADS * GROUP)
    start_R = token_R * token_stride + head_R.to(tl.int64) * head_stride
    kv_R = head_R // GROUP
    if rotation is None:
        dim_C, holds_C = dims(ROW)
    else:
        dim_C = tl.arange(0, BLOCKS.dims)
        holds_C = dim_C < ROW.dim
    x_RC = _scaled(query, scale, start_R, kv_R, asked_R, dim_C, holds_C, ROW)
    if ROW.plain:
        # As they are: what bfloat16 holds would be rounded a second time, and its range is that of float32.
        largest_R = tl.full([BLOCK_R], 1.0, tl.float32)
        norm_R, by_R = largest_R, largest_R
    else:
        # In units of the largest, whose squares neither overflow nor vanish.
        largest_R = tl.max(tl.abs(x_RC), 1)
        largest_R = tl.where(largest_R > 0, largest_R, 1.0)
        x_RC = x_RC / largest_R[:, None]
        norm_R = tl.sqrt(tl.sum(x_RC * x_RC, 1))
        by_R = tl.where(norm_R > 0, norm_R, 1.0)
        x_RC = x_RC / by_R[:, None]
    out_R = row_R.to(tl.int64) * ROW.columns
    if rotation is None:
        place_C = tl.arange(0, ROW.columns)
        tl.store(framed + out_R[:, None] + place_C[None, :], x_RC.to(framed.dtype.element_ty), mask=asked_R[:, None])
    else:
        for column in range(0, ROW.columns, BLOCK_C):
            column_B = column + tl.arange(0, BLOCK_C)
            y_RB = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
            for dim in range(0, ROW.dim, WIDTH):
                dim_W = dim + tl.arange(0, WIDTH)
                holds_W = dim_W < ROW.dim
                x_RW = _scaled(query, scale, start_R, kv_R, asked_R, dim_W, holds_W, ROW)
                if not ROW.plain:
                    x_RW = x_RW / largest_R[:, None] / by_R[:, None]
                place_WB = dim_W[:, None] * ROW.columns + column_B[None, :]
                signs_WB = tl.load(rotation + place_WB, mask=holds_W[:, None], other=0)
                y_RB = tl.dot(x_RW, signs_WB.to(tl.float32), y_RB, input_precision="tf32x3")
            y_RB = y_RB * ROW.unit
            tl.store(
                framed + out_R[:, None] + column_B[None, :], y_RB.to(framed.dtype.element_ty), mask=asked_R[:, None]
            )
    # log2(e), because the weights are powers of two.
    tl.store(factor + row_R, largest_R * norm_R * (softmax_scale * 1.4426950408889634), mask=asked_R)


@triton.jit
def _scaled(query, scale, start_R, kv_R, asked_R, dim_D, holds_D, ROW: tl.constexpr):
    """Return some dims s * q of the queries; 0 where nothing is held."""
    held_RD = asked_R[:, None] & holds_D[None, :]
    x_RD = tl.load(query + start_R[:, None] + dim_D[None, :], mask=held_RD, other=0.0).to(tl.float32)
    if scale is not None:
        x_RD *= tl.load(scale + kv_R[:, None] * ROW.dim + dim_D[None, :], mask=held_RD, other=0.0)
    return x_RD


@triton.jit
def _asked(owner, offset, position, count, rows, QUERY_HEADS: tl.constexpr, BLOCK_R: tl.constexpr):
    """Return the rows of a program, which of them there are, which are somebody's, and their positions."""
    row_R = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < rows
    token_R = row_R // QUERY_HEADS
    owner_R = tl.load(owner + token_R, mask=inside_R, other=0)
    offset_R = tl.load(offset + token_R, mask=inside_R, other=0)
    asked_R = inside_R & (offset_R < tl.load(count + owner_R, mask=inside_R, other=0))
    position_R = (tl.load(position + owner_R, mask=asked_R, other=0) + offset_R).to(tl.int32)
    return row_R, inside_R, asked_R, position_R


@triton.jit
def _sees(asked_R, position_R, first_key, keys, window, WINDOWED: tl.constexpr):
    """Say which rows see a key among so many from that one on."""
    sees_R = asked_R & (first_key <= position_R)
    if WINDOWED:
        sees_R &= first_key + keys > position_R - window + 1
    return sees_R


@triton.jit
def _joined(
    average,
    largest,
    total,
    row_R,
    asked_R,
    position_R,
    rows,
    window,
    span_keys,
    first,
    end,
    each,
    unit,
    FOLD: tl.constexpr,
    WINDOWED: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK_R: tl.constexpr,
    STAGES: tl.constexpr,  # reads under way at once
):
    """Join what spans left, in their order: `each` of them lie joined where the first of them did.

    There is a place for every `unit` spans. Where each is alone, FOLD of them are joined first, as a program of the
    attention kernel does that has so many. Read is what was written, where a row sees keys.
    """
    column_C = tl.arange(0, COLUMNS)
    mean_RC = tl.zeros([BLOCK_R, COLUMNS], tl.float32)
    largest_R = tl.full([BLOCK_R], LOWEST, tl.float32)
    total_R = tl.zeros([BLOCK_R], tl.float32)
    if FOLD > 1:
        folded_RC, top_R, weights_R = mean_RC, largest_R, total_R
    # Each waits for the sums of the one before but not for its bytes: with few rows there is little else to do.
    for span in tl.range(first, end, each, num_stages=STAGES):
        if FOLD > 1 and span % FOLD == 0:
            folded_RC, top_R, weights_R = fold(folded_RC, top_R, weights_R, mean_RC, largest_R, total_R, ACROSS=False)
            mean_RC = tl.zeros_like(mean_RC)
            largest_R = tl.full([BLOCK_R], LOWEST, tl.float32)
            total_R = tl.zeros_like(total_R)
        read_R = _sees(asked_R, position_R, span * span_keys, each * span_keys, window, WINDOWED)
        at_R = tl.cast(span // unit, tl.int64) * rows + row_R
        part_RC = tl.load(average + at_R[:, None] * COLUMNS + column_C[None, :], mask=read_R[:, None], other=0.0)
        found_R = tl.load(largest + at_R, mask=read_R, other=LOWEST)
        added_R = tl.load(total + at_R, mask=read_R, other=0.0)
        mean_RC, largest_R, total_R = fold(mean_RC, largest_R, total_R, part_RC, found_R, added_R, ACROSS=False)
    if FOLD > 1:
        mean_RC, largest_R, total_R = fold(folded_RC, top_R, weights_R, mean_RC, largest_R, total_R, ACROSS=False)
    return mean_RC, largest_R, total_R


@triton.jit(
    do_not_specialize=["rows", "window", "span_keys", "unit"],
    do_not_specialize_on_alignment=["owner", "offset", "position", "count"],
)
def join_kernel(
    average,  # as merge_kernel has them; what is joined lies where the first of its spans did
    largest,
    total,
    owner,
    offset,
    position,
    count,
    rows,
    window,
    span_keys,
    unit,
    FOLD: tl.constexpr,
    COLUMNS: tl.constexpr,
    QUERY_HEADS: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    JOINED: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Join JOINED spans that follow one another, so that no program has to read all; grid: (tiles of rows, spans)."""
    row_R, _, asked_R, position_R = _asked(owner, offset, position, count, rows, QUERY_HEADS, BLOCK_R)
    first = tl.program_id(1) * JOINED
    spans = tl.max(tl.where(asked_R, position_R // span_keys + 1, 0), 0)
    if first >= spans:
        return
    mean_RC, largest_R, total_R = _joined(
        *(average, largest, total, row_R, asked_R, position_R, rows, window, span_keys),
        *(first, tl.minimum(first + JOINED, spans), unit, unit, FOLD, WINDOWED, COLUMNS, BLOCK_R, STAGES),
    )
    # Every thread has read the first span.
    tl.debug_barrier()
    seen_R = _sees(asked_R, position_R, first * span_keys, JOINED * span_keys, window, WINDOWED)
    at_R = tl.cast(first // unit, tl.int64) * rows + row_R
    tl.store(average + at_R[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :], mean_RC, mask=seen_R[:, None])
    tl.store(largest + at_R, largest_R, mask=seen_R)
    tl.store(total + at_R, total_R, mask=seen_R)


@triton.jit(
    do_not_specialize=["rows", "window", "span_keys", "each", "unit"],
    do_not_specialize_on_alignment=["owner", "offset", "position", "count"],
)
def merge_kernel(
    average,  # float32 [spans / unit, T, H, C]
    largest,  # float32 [spans / unit, T, H]
    total,  # float32 [spans / unit, T, H]
    centre,  # float32 [K, D], or None
    scale,  # float32 [K, D], or None
    rotation,  # int8 [D, C], or None
    owner,
    offset,
    position,
    count,
    out,  # [T, H, D]
    rows,
    window,
    span_keys,
    each,  # spans that are joined already
    unit,
    FOLD: tl.constexpr,  # spans that are joined first; 1 if they are already
    ROW: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    WINDOWED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WIDTH: tl.constexpr,
    STAGES: tl.constexpr,
):
    """Merge the spans of each query row in their order, and take the average out of its frame; grid: (tiles of rows,).

    A token of nobody gets zeros.
    """
    row_R, inside_R, asked_R, position_R = _asked(owner, offset, position, count, rows, HEADS * GROUP, BLOCK_R)
    COLUMNS: tl.constexpr = ROW.columns
    column_C = tl.arange(0, COLUMNS)
    spans = tl.max(tl.where(asked_R, position_R // span_keys + 1, 0), 0)
    mean_RC, _, total_R = _joined(
        *(average, largest, total, row_R, asked_R, position_R, rows, window, span_keys),
        *(0, spans, each, unit, FOLD, WINDOWED, COLUMNS, BLOCK_R, STAGES),
    )
    mean_RC = mean_RC / tl.where(total_R == 0, 1.0, total_R)[:, None]

    kv_R = row_R % (HEADS * GROUP) // GROUP
    start_R = row_R.to(tl.int64) * ROW.dim
    if rotation is None:
        dim_C, holds_C = dims(ROW)
        _leave(mean_RC, centre, scale, out, start_R, kv_R, inside_R, asked_R, dim_C, holds_C, ROW)
    else:
        # Through memory, where the first span lay: no program holds a long row and its rotation in registers.
        place_R = row_R.to(tl.int64) * COLUMNS
        tl.store(average + place_R[:, None] + column_C[None, :], mean_RC, mask=inside_R[:, None])
        tl.debug_barrier()
        for dim in range(0, ROW.dim, BLOCK_D):
            dim_B = dim + tl.arange(0, BLOCK_D)
            holds_B = dim_B < ROW.dim
            x_RB = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
            for column in range(0, COLUMNS, WIDTH):
                column_W = column + tl.arange(0, WIDTH)
                part_RW = tl.load(average + place_R[:, None] + column_W[None, :], mask=inside_R[:, None], other=0.0)
                place_WB = column_W[:, None] + dim_B[None, :] * COLUMNS
                signs_WB = tl.load(rotation + place_WB, mask=holds_B[None, :], other=0)
                x_RB = tl.dot(part_RW, signs_WB.to(tl.float32), x_RB, input_precision="tf32x3")
            x_RB = x_RB * ROW.unit
            _leave(x_RB, centre, scale, out, start_R, kv_R, inside_R, asked_R, dim_B, holds_B, ROW)


@triton.jit
def _leave(x_RB, centre, scale, out, start_R, kv_R, inside_R, asked_R, dim_B, holds_B, ROW: tl.constexpr):
    """Write c + s x, or zeros where nobody asked."""
    held_RB = asked_R[:, None] & holds_B[None, :]
    frame_RB = kv_R[:, None] * ROW.dim + dim_B[None, :]
    if scale is not None:
        x_RB *= tl.load(scale + frame_RB, mask=held_RB, other=0.0)
    if centre is not None:
        x_RB += tl.load(centre + frame_RB, mask=held_RB, other=0.0)
    x_RB = tl.where(held_RB, x_RB, 0.0)
    tl.store(
        out + start_R[:, None] + dim_B[None, :],
        x_RB.to(out.dtype.element_ty),
        mask=inside_R[:, None] & holds_B[None, :],
    )
