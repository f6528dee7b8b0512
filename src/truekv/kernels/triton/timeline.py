"""The tokens of a step in one order for the recurrent rules: convolved, with their gates, and what memory keeps.

Legend: B rows, T new tokens, Q longest chunk, R log capacity (drafts of one step), C convolved channels, K taps, H
heads, N numbers per token and head beside the channels.

A row's timeline is that of kernels/reference/timeline.py: its `replay` accepted drafts from the log, then its `count`
new tokens. Laid out, new token t is at t and the n-th replayed one of row b at T + b R + n, so the rules read one
buffer and never the log, which is written here before they run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import triton
import triton.language as tl

from truekv.core.errors import Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step

CHANNELS = 128
"""Channels of one program."""
PLACES = 8
"""Most places that a program convolves at once."""
SPAN = 64
"""Places of one program. Only a row's first reads and writes what memory keeps: it has all that were replayed."""


PARTS_OF_A_STEP = ("gathers", "counts", "certains", "replays", "slots")
"""They begin anywhere in one tensor: whether at a multiple of 16 bytes changes from step to step."""


class LaidOut(NamedTuple):
    """What the rules read, all float32."""

    mixed: torch.Tensor
    """[T + B R, C] channels after convolution and silu."""
    gates: torch.Tensor
    """[N, T + B R, H]."""


def lay_out(
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    tail: torch.Tensor,
    log: Mapping[str, torch.Tensor],
    step: Step,
    gates: Seq[str],
) -> LaidOut:
    """Convolve, copy the `gates` [T, H], and save the convolution's tail and the drafts, each in place.

    `inputs`: "conv" [T, C] of any row stride; `weights`: "conv" [C, K] and optionally "conv_bias" [C]; `tail`:
    [slots, C, K - 1]. Raises Refused unless channels, taps and state are of one dtype.
    """
    conv_TC, taps_CK, bias_C = inputs["conv"], weights["conv"], weights.get("conv_bias")
    tensors = [conv_TC, taps_CK, tail, log["conv"], *([] if bias_C is None else [bias_C])]
    if len({tensor.dtype for tensor in tensors}) != 1:
        kinds = ", ".join(sorted({str(tensor.dtype) for tensor in tensors}))
        raise Refused(
            f"the Triton convolution takes channels, taps and state in one dtype, not in {kinds}; load the model with "
            "another dtype or use the reference backend"
        )
    conv_TC = conv_TC if conv_TC.stride(1) == 1 else conv_TC.contiguous()
    gates_TH = [inputs[name].float().contiguous() for name in gates]
    (tokens, channels), (rows, longest) = conv_TC.shape, step.gather.shape
    drafts, heads, taps = log["conv"].shape[1], gates_TH[0].shape[1], taps_CK.shape[1]
    places = tokens + rows * drafts
    laid = LaidOut(
        torch.empty(places, channels, dtype=torch.float32, device=conv_TC.device),
        torch.empty(len(gates), places, heads, dtype=torch.float32, device=conv_TC.device),
    )
    channel_blocks = triton.cdiv(channels, CHANNELS)
    span = max(SPAN, triton.next_power_of_2(drafts + taps))
    alone = drafts + longest <= span
    prepare[(rows if alone else most_parts(tokens, rows, drafts, span), channel_blocks + 1)](
        conv_TC,
        conv_TC.stride(0),
        taps_CK,
        taps_CK if bias_C is None else bias_C,
        tail,
        log["conv"],
        gates_TH[0],
        log[gates[0]],
        gates_TH[-1],
        log[gates[-1]],
        *(step.gather, step.count, step.certain, step.replay, step.slot),
        *laid,
        *(tokens, rows, longest, channels, heads, places, channel_blocks),
        TAPS=taps,
        TAIL=triton.next_power_of_2(max(1, taps - 1)),
        DRAFTS=drafts,
        BIASED=bias_C is not None,
        GATES=len(gates),
        CHANNELS=CHANNELS,
        HEADS=triton.next_power_of_2(heads),
        PLACES=min(PLACES, triton.next_power_of_2(drafts + longest)),
        SPAN=span,
        ALONE=alone,
    )
    return laid


def most_parts(tokens: int, rows: int, drafts: int, size: int) -> int:
    """Return how many parts of `size` places rows have at most, if their new tokens are so many in all."""
    return tokens // size + rows * (triton.cdiv(drafts, size) + 1)


@triton.jit
def find_part(number, counts, certains, replays, rows, SIZE: tl.constexpr, LONG: tl.constexpr):
    """Cut rows into parts of SIZE places and count them through: the row of one, -1 if there are fewer, and its place.

    Programs for parts are as many as there may be; one for every row times the parts of the longest would be many more,
    nearly all of them without anything to do. LONG above 0: only of rows of as many new tokens, none of them a draft.
    """
    ROWS: tl.constexpr = 128
    row, start, passed = tl.full([], -1, tl.int32), tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    for first in range(0, rows, ROWS):
        at_R = first + tl.arange(0, ROWS)
        count_R = tl.load(counts + at_R, mask=at_R < rows, other=0).to(tl.int32)
        total_R = count_R + tl.load(replays + at_R, mask=at_R < rows, other=0).to(tl.int32)
        if LONG > 0:
            certain_R = tl.load(certains + at_R, mask=at_R < rows, other=0).to(tl.int32)
            total_R = tl.where((count_R >= LONG) & (certain_R == count_R), total_R, 0)
        parts_R = (total_R + SIZE - 1) // SIZE
        end_R = passed + tl.cumsum(parts_R, 0)
        mine_R = (number < end_R) & (number >= end_R - parts_R)
        row += tl.sum(tl.where(mine_R, at_R + 1, 0), 0)
        start += tl.sum(tl.where(mine_R, (number - end_R + parts_R) * SIZE, 0), 0)
        passed += tl.sum(parts_R, 0)
    return row, start


@triton.jit
def laid_at(gather, place, old, replayed):
    """Where the token at one place lies in what was laid out; `gather` and `replayed` are those of its row."""
    return tl.load(gather + tl.maximum(place - old, 0)) if place >= old else replayed + place


@triton.jit
def _window(
    place,
    channel,
    inside,
    inputs,
    stride,
    tail,
    log,
    gather,
    old,
    longest,
    channels,
    TAPS: tl.constexpr,
    DRAFTS: tl.constexpr,
):
    """Channels [places, CHANNELS] as they were before convolution, from the tail, the log or the new tokens.

    `place` is [places, 1] and may be up to TAPS - 1 below zero, `inside` [places, CHANNELS].
    """
    before = tl.load(tail + (channel * (TAPS - 1) + (TAPS - 1) + place), mask=inside & (place < 0), other=0.0)
    token = tl.load(gather + (place - old), mask=(place >= old) & (place - old < longest), other=0)
    new = tl.load(inputs + token * stride + channel, mask=inside & (place >= old), other=0.0)
    # All of them but one are zero.
    seen = before.to(tl.float32) + new.to(tl.float32)
    if DRAFTS > 0:
        logged = tl.load(log + (place * channels + channel), mask=inside & (place >= 0) & (place < old), other=0.0)
        seen += logged.to(tl.float32)
    return seen


@triton.jit
def _lay_gate(
    given,
    log,
    gates,
    gather,
    begin,
    old,
    total,
    kept,
    replayed,
    heads,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    SPAN: tl.constexpr,
):
    """Copy one number per token and head to where it lies laid out, and the drafts' to the row's log."""
    head = tl.arange(0, HEADS)[None, :]
    for start in range(begin, tl.minimum(begin + SPAN, total), PLACES):
        place = start + tl.arange(0, PLACES)[:, None]
        inside = (place < total) & (head < heads)
        token = tl.load(gather + (place - old), mask=(place >= old) & (place < total), other=0)
        logged = tl.load(log + (place * heads + head), mask=inside & (place < old), other=0.0)
        new = tl.load(given + token * heads + head, mask=inside & (place >= old), other=0.0)
        at = tl.where(place < old, replayed + place, token)
        tl.store(gates + at * heads + head, logged.to(tl.float32) + new.to(tl.float32), mask=inside)
    if begin > 0:
        return
    # Every thread has read what was accepted before any writes new drafts over it.
    tl.debug_barrier()
    for place in range(kept, total):
        token = tl.load(gather + (place - old))
        new = tl.load(given + token * heads + head, mask=head < heads, other=0.0)
        tl.store(log + ((place - kept) * heads + head), new, mask=head < heads)


@triton.jit(do_not_specialize=["tokens", "rows", "longest", "places"], do_not_specialize_on_alignment=PARTS_OF_A_STEP)
def prepare(  # noqa: C901 (gates and channels share the walk along a row)
    inputs,
    stride,
    taps,
    bias,
    tails,
    logs,
    first,
    first_logs,
    second,
    second_logs,
    gathers,
    counts,
    certains,
    replays,
    slots,
    mixed,
    gates,
    tokens,
    rows,
    longest,
    channels,
    heads,
    places,
    channel_blocks,
    TAPS: tl.constexpr,
    TAIL: tl.constexpr,
    DRAFTS: tl.constexpr,
    BIASED: tl.constexpr,
    GATES: tl.constexpr,
    CHANNELS: tl.constexpr,
    HEADS: tl.constexpr,
    PLACES: tl.constexpr,
    SPAN: tl.constexpr,
    ALONE: tl.constexpr,  # whether no row has more than one span
):
    """One program per row's span of places and block of channels, and one more per span for the gates."""
    block = tl.program_id(1)
    if ALONE:
        row, begin = tl.program_id(0).to(tl.int64), 0
    else:
        row, begin = find_part(tl.program_id(0), counts, certains, replays, rows, SPAN, 0)
        row = row.to(tl.int64)
        if row < 0:
            return
    old = tl.load(replays + row).to(tl.int32)
    total = old + tl.load(counts + row).to(tl.int32)
    if begin >= total:
        return
    kept = old + tl.load(certains + row).to(tl.int32)
    slot = tl.load(slots + row)
    # One address of the row in 64 bits, and the rest in 32, which take half the registers.
    gather, replayed = gathers + row * longest, tokens + row * DRAFTS
    if block == channel_blocks:
        log = first_logs + slot * DRAFTS * heads
        _lay_gate(first, log, gates, gather, begin, old, total, kept, replayed, heads, HEADS, PLACES, SPAN)
        if GATES == 2:
            log = second_logs + slot * DRAFTS * heads
            gates += places * heads
            _lay_gate(second, log, gates, gather, begin, old, total, kept, replayed, heads, HEADS, PLACES, SPAN)
        return
    tail, log = tails + slot * channels * (TAPS - 1), logs + slot * DRAFTS * channels
    channel = (block * CHANNELS + tl.arange(0, CHANNELS))[None, :]
    real = channel < channels
    for start in range(begin, tl.minimum(begin + SPAN, total), PLACES):
        place = start + tl.arange(0, PLACES)[:, None]
        inside = (place < total) & real
        out = tl.zeros((PLACES, CHANNELS), tl.float32)
        # The taps are summed one after the other, as the reference does.
        for k in tl.static_range(TAPS):
            tap = tl.load(taps + (channel * TAPS + k), mask=real, other=0.0).to(tl.float32)
            at = place + (k - TAPS + 1)
            out += tap * _window(
                at, channel, inside, inputs, stride, tail, log, gather, old, longest, channels, TAPS, DRAFTS
            )
        if BIASED:
            out += tl.load(bias + channel, mask=real, other=0.0).to(tl.float32)
        token = tl.load(gather + (place - old), mask=(place >= old) & (place < total), other=0)
        at = tl.where(place < old, replayed + place, token)
        tl.store(mixed + at * channels + channel, out / (1.0 + tl.exp(-out)), mask=inside)
    if begin > 0:
        return
    step = tl.arange(0, TAIL)[:, None]
    inside = (step < TAPS - 1) & real
    at = kept + step - (TAPS - 1)
    saved = _window(at, channel, inside, inputs, stride, tail, log, gather, old, longest, channels, TAPS, DRAFTS)
    # Every thread has read tail and log before any writes over them.
    tl.debug_barrier()
    tl.store(tail + (channel * (TAPS - 1) + step), saved, mask=inside)
    for place in range(kept, total):
        token = tl.load(gather + (place - old))
        new = tl.load(inputs + token * stride + channel, mask=real, other=0.0)
        tl.store(log + ((place - kept) * channels + channel), new, mask=real)
