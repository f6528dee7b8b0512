"""Attention over stored rows: decode, verify and prefill are one kernel, and so are latent and grouped heads.

One program reads one span of one kv head's rows, or some that follow one another, once and decodes them once, for all
query heads that share it and all new tokens of a tile. It leaves the unnormalised average of each query row over them,
with the largest score and the sum of weights; frames.py merges what programs leave. Spans and blocks of keys start at
fixed positions, and the sums of so many spans are folded into one first, by whichever program has them, so a row's sums
run in one order whatever its companions and the width of the table. How many query rows a tile has follows the longest
chunk of the step, and is part of that order: a token alone and the same token in a long chunk may differ in their last
bits.

Weights, times the scales of rows where they have any, enter the second product as numbers of half precision between 0
and 2^15: relative to the largest so far they keep 11 bits down to 2^-29. Scores and sums are float32.
"""

# Shape suffixes: M query rows of a tile, N keys of a block, C columns.

from __future__ import annotations

import triton
import triton.language as tl

from truekv.kernels.triton.codes import read_rows

# Stands for the maximum of no scores: a number, so that a difference of two is one too.
LOWEST = tl.constexpr(-3.0e38)
# 2^-24, of the numbers of half precision that are not 0.
SMALLEST = tl.constexpr(5.9604644775390625e-8)


@triton.jit
def fold(mean, largest_M, total_M, part, top_M, weights_M, ACROSS: tl.constexpr):
    """Join the sums of some keys and those of later ones."""
    raised_M = tl.maximum(largest_M, top_M)
    old_M, new_M = tl.exp2(largest_M - raised_M), tl.exp2(top_M - raised_M)
    # Rounded alike in whichever kernel that is.
    mean = tl.fma(mean, tl.broadcast_to(_query_wise(old_M, ACROSS), mean.shape), part * _query_wise(new_M, ACROSS))
    return mean, raised_M, tl.fma(total_M, old_M, weights_M * new_M)


@triton.jit(
    do_not_specialize=["tokens", "longest", "width", "window", "span_keys"],
    # Parts of one tensor, which start wherever the part before them ends.
    do_not_specialize_on_alignment=["gather", "position", "count", "pages"],
)
def attend_kernel(  # noqa: C901, PLR0912, PLR0915 (one loop, whose parts share all that they read)
    first,  # field 0 of the layer, which is scored
    second,  # a second field whose scores are added
    value,  # the field that is averaged; equal to the first where ROW_V is None
    query,  # [T, H, columns] of field 0, operands
    query2,
    factor,  # [T, H] float32: what the scores of each query are multiplied by
    factor2,
    gather,
    position,
    count,
    pages,
    average,  # out: float32 [spans / EACH, T, H, columns of the value]
    largest,  # out: float32 [spans / EACH, T, H], largest score in powers of two
    total,  # out: float32 [spans / EACH, T, H], sum of the weights
    first_page_bytes,
    second_page_bytes,
    value_page_bytes,
    tokens,
    longest,
    width,
    window,
    span_keys,
    ROW: tl.constexpr,
    ROW2: tl.constexpr,
    ROW_V: tl.constexpr,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    PAGE_TOKENS: tl.constexpr,
    OPERAND: tl.constexpr,
    OPERAND2: tl.constexpr,
    OPERAND_V: tl.constexpr,
    WINDOWED: tl.constexpr,
    ARCH: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACROSS: tl.constexpr,  # whether keys are the rows of scores, and queries their columns
    EACH: tl.constexpr,  # spans of a program
):
    """Grid: (tiles of query rows, batch rows * kv heads, spans / EACH)."""
    row, head = (tl.program_id(1) // HEADS).to(tl.int64), (tl.program_id(1) % HEADS).to(tl.int64)
    start = tl.load(position + row).to(tl.int32)
    new = tl.load(count + row).to(tl.int32)
    # Query rows: the heads of a group side by side, token after token.
    place_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    chunk_M = place_M // GROUP
    asked_M = chunk_M < new
    position_M = start + chunk_M
    first_chunk = tl.program_id(0) * BLOCK_M // GROUP
    last_chunk = tl.minimum(((tl.program_id(0) + 1) * BLOCK_M - 1) // GROUP, new - 1)
    low = tl.program_id(2) * (span_keys * EACH)
    high = tl.minimum(low + span_keys * EACH, start + last_chunk + 1)
    if WINDOWED:
        low = tl.maximum(low, (start + first_chunk - window + 1) // BLOCK_N * BLOCK_N)
    if (first_chunk >= new) | (low >= high):
        return

    query_M = _query_rows(gather + row * longest, head, place_M, asked_M, HEADS, GROUP, AGAIN=False)
    q = _queries(query, query_M, asked_M, ROW, ACROSS)
    factor_M = tl.load(factor + query_M, mask=asked_M, other=0.0)
    first += head * ROW.head_bytes
    if ROW2 is not None:
        q2 = _queries(query2, query_M, asked_M, ROW2, ACROSS)
        factor2_M = tl.load(factor2 + query_M, mask=asked_M, other=0.0)
        second += head * ROW2.head_bytes
    if ROW_V is not None:
        value += head * ROW_V.head_bytes
    AVERAGED: tl.constexpr = ROW if ROW_V is None else ROW_V
    COLUMNS: tl.constexpr = AVERAGED.columns
    mean = tl.zeros([COLUMNS, BLOCK_M] if ACROSS else [BLOCK_M, COLUMNS], tl.float32)
    largest_M = tl.full([BLOCK_M], LOWEST, tl.float32)
    total_M = tl.zeros([BLOCK_M], tl.float32)
    if EACH > 1:
        folded, top_M, weights_M = mean, largest_M, total_M
    # A query row of nobody sees what the last one sees, and is not written.
    end = tl.minimum(start + new, high)
    last_M = tl.minimum(position_M, end - 1)
    table = pages + row * width

    for block in range(low, high, BLOCK_N):
        if EACH > 1 and block % span_keys == 0:
            folded, top_M, weights_M = fold(folded, top_M, weights_M, mean, largest_M, total_M, ACROSS)
            mean = tl.zeros_like(mean)
            largest_M = tl.full([BLOCK_M], LOWEST, tl.float32)
            total_M = tl.zeros_like(total_M)
        key_N = block + tl.arange(0, BLOCK_N)
        first_G = block + PAGE_TOKENS * tl.arange(0, BLOCK_N // PAGE_TOKENS)
        page_G = tl.load(table + first_G // PAGE_TOKENS, mask=first_G < end, other=0)
        written_GL = first_G[:, None] + tl.arange(0, PAGE_TOKENS)[None, :] < end
        k_NC, scale_N = read_rows(
            first, page_G, written_GL, first_page_bytes, ROW, OPERAND, ARCH, ROW_V is None, ROW_V is None and ROW.scaled
        )
        score = _scores(q, k_NC, ACROSS)
        if ROW.factored:
            score *= _key_wise(scale_N, ACROSS)
        score *= _query_wise(factor_M, ACROSS)
        if ROW2 is not None:
            k2_NC, scale2_N = read_rows(
                second, page_G, written_GL, second_page_bytes, ROW2, OPERAND2, ARCH, VALUES=False, AHEAD=False
            )
            score2 = _scores(q2, k2_NC, ACROSS)
            if ROW2.factored:
                score2 *= _key_wise(scale2_N, ACROSS)
            score += score2 * _query_wise(factor2_M, ACROSS)
        seen = _key_wise(key_N, ACROSS) <= _query_wise(last_M, ACROSS)
        if WINDOWED:
            seen &= _key_wise(key_N, ACROSS) > _query_wise(position_M - window, ACROSS)
        score = tl.where(seen, score, float("-inf"))

        if ROW_V is not None:
            v_NC, scale_N = read_rows(
                value, page_G, written_GL, value_page_bytes, ROW_V, OPERAND_V, ARCH, VALUES=True, AHEAD=BLOCK_M < 64
            )
        else:
            v_NC = k_NC
        highest_M = tl.max(score, 0 if ACROSS else 1)
        if AVERAGED.factored:
            # What enters the second product are weights times scales: at most 2^15, as fp16 wants it.
            highest_M += tl.log2(tl.maximum(tl.max(tl.abs(scale_N), 0), SMALLEST))
        raised_M = tl.maximum(largest_M, highest_M)
        weight = tl.exp2(score - _query_wise(raised_M - 15.0, ACROSS))
        old_M = tl.exp2(largest_M - raised_M)
        total_M = total_M * old_M + tl.sum(weight, 0 if ACROSS else 1)
        largest_M = raised_M
        if AVERAGED.factored:
            weight *= _key_wise(scale_N, ACROSS)
        mean *= _query_wise(old_M, ACROSS)
        mean = _weighted(weight.to(OPERAND_V), v_NC, mean, ACROSS)

    if EACH > 1:
        mean, largest_M, total_M = fold(folded, top_M, weights_M, mean, largest_M, total_M, ACROSS)
    # Looked up again: what is needed no more until here would take registers from the loop.
    query_M = _query_rows(gather + row * longest, head, place_M, asked_M, HEADS, GROUP, AGAIN=True)
    place_of_M = tl.program_id(2).to(tl.int64) * tokens * (HEADS * GROUP) + query_M
    place = _query_wise(place_of_M * COLUMNS, ACROSS) + _key_wise(tl.arange(0, COLUMNS), ACROSS)
    tl.store(average + place, mean, mask=_query_wise(asked_M, ACROSS))
    tl.store(largest + place_of_M, largest_M, mask=asked_M)
    tl.store(total + place_of_M, total_M, mask=asked_M)


@triton.jit
def _key_wise(x, ACROSS: tl.constexpr):
    """Spread a number of each key, or column, over the queries."""
    return x[:, None] if ACROSS else x[None, :]


@triton.jit
def _query_wise(x, ACROSS: tl.constexpr):
    """Spread a number of each query."""
    return x[None, :] if ACROSS else x[:, None]


@triton.jit
def _query_rows(gather, head, place_M, asked_M, HEADS: tl.constexpr, GROUP: tl.constexpr, AGAIN: tl.constexpr):
    """Return which rows of [T * H] the query rows of a tile are."""
    token_M = tl.load(gather + place_M // GROUP, mask=asked_M, other=0, volatile=AGAIN)
    return token_M * (HEADS * GROUP) + head * GROUP + place_M % GROUP


@triton.jit
def _queries(query, query_M, asked_M, ROW: tl.constexpr, ACROSS: tl.constexpr):
    place = _query_wise(query_M * ROW.columns, ACROSS) + _key_wise(tl.arange(0, ROW.columns), ACROSS)
    return tl.load(query + place, mask=_query_wise(asked_M, ACROSS), other=0.0)


@triton.jit
def _scores(q, k_NC, ACROSS: tl.constexpr):
    return tl.dot(k_NC if ACROSS else q, q if ACROSS else tl.trans(k_NC), input_precision="ieee")


@triton.jit
def _weighted(weight, v_NC, mean, ACROSS: tl.constexpr):
    return tl.dot(tl.trans(v_NC) if ACROSS else weight, weight if ACROSS else v_NC, mean, input_precision="ieee")
