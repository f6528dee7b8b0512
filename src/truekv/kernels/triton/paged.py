"""Rows in pages on a GPU: a step's rows are stored by one launch a field, and attended to by three.

Nothing here waits for the device, and sizes of launches follow from shapes alone, so a step can be captured and
replayed with other contents. Only `store` looks at what it stored, unless the step is being recorded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import triton

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.recording import is_recording
from truekv.kernels.reference import paged as reference
from truekv.kernels.triton import layout as layouts
from truekv.kernels.triton.attention import attend_kernel
from truekv.kernels.triton.encode import store_kernel
from truekv.kernels.triton.frames import join_kernel, merge_kernel, query_kernel
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.layout import Row, layout, rotation
from truekv.kernels.triton.tiles import (
    FOLD,
    arch,
    attend_options,
    operand,
    span_keys,
    spans_of_a_program,
    torch_operand,
)

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Paged

_ALIGNMENT: Final = 16
JOINED: Final = 16
"""Spans that one program joins before what is left is merged. A row that has no more has the same bits either way."""


def refusal(layer: Paged, formats: Seq[CacheFormat]) -> str | None:
    """Return why a layer cannot run here, or None."""
    return (
        reference.refusal(layer, formats)
        or layouts.refusal(layer, formats)
        or reference.more_scored_than_two(layer, "triton")
    )


def store(stored: Stored, rows_TKD: torch.Tensor, step: Step) -> None:
    """Take rows [T, K, D] into the field's frame, encode them and write row t to line `step.line[t]` of its page.

    Rows of line -1 are stored nowhere. A row that is not finite is stored as NaN, and raises Corrupted unless the step
    is being recorded.
    """
    tokens, heads, _ = rows_TKD.shape
    if not tokens:
        return
    rows_TKD = _readable(rows_TKD)
    row, frame = aligned(stored), stored.frame
    broken = None if is_recording() else torch.zeros(1, dtype=torch.int32, device=rows_TKD.device)
    tile = 32 if INTERPRETED else 1
    store_kernel[(triton.cdiv(tokens * heads, tile),)](
        stored.data[:, stored.start :],
        rows_TKD,
        frame.centre,
        frame.scale,
        rotation(stored, row, rows_TKD.device) if frame.rotated else None,
        step.page,
        step.line,
        broken,
        stored.data.stride(0),
        rows_TKD.stride(0),
        rows_TKD.stride(1),
        tokens * heads,
        ROW=row,
        HEADS=heads,
        BLOCK_R=tile,
        # Bytes are those of the reference only if products and sums are rounded one by one.
        enable_fp_fusion=False,
    )
    if broken is not None and (count := int(broken)):
        raise Corrupted.rows(count, tokens * heads)


def attend(
    queries: tuple[torch.Tensor, ...], fields: tuple[Stored, ...], scale: float, window: int | None, step: Step
) -> torch.Tensor:
    """Causal attention of the step's queries over stored rows; see kernels/reference/paged.py."""
    scored = [item for item in fields if item.field.role in {"key", "both"}]
    value = next(item for item in fields if item.field.role in {"value", "both"})
    layouts_of = [aligned(item) for item in scored]
    row_v = aligned(value)
    heads, tokens, query_heads = value.field.heads, queries[0].shape[0], queries[0].shape[1]
    group = query_heads // heads
    batch, longest = step.gather.shape
    framed = [
        into_frame(query, item, row, scale, torch_operand(row))
        for query, item, row in zip(queries, scored, layouts_of, strict=True)
    ]
    capability = arch()
    options = attend_options((*layouts_of, row_v), group * longest, capability)
    tiles = triton.cdiv(group * longest, options.queries)
    span = span_keys(tiles)
    programs = batch * heads if options.folds and tiles == 1 else 0
    sums = Sums.empty((tokens, query_heads, row_v.columns), programs, span, window, value, step)
    second = scored[1] if len(scored) > 1 else None
    shared = value is scored[0]
    attend_kernel[(tiles, batch * heads, len(sums.average))](
        scored[0].data[:, scored[0].start :],
        None if second is None else second.data[:, second.start :],
        None if shared else value.data[:, value.start :],
        framed[0][0],
        None if second is None else framed[1][0],
        framed[0][1],
        None if second is None else framed[1][1],
        step.gather,
        step.position,
        step.count,
        step.pages,
        sums.average,
        sums.largest,
        sums.total,
        scored[0].data.stride(0),
        0 if second is None else second.data.stride(0),
        value.data.stride(0),
        tokens,
        longest,
        step.pages.shape[1],
        window or 0,
        span,
        ROW=layouts_of[0],
        ROW2=None if second is None else layouts_of[1],
        ROW_V=None if shared else row_v,
        HEADS=heads,
        GROUP=group,
        PAGE_TOKENS=value.page_tokens,
        OPERAND=operand(layouts_of[0]),
        OPERAND2=None if second is None else operand(layouts_of[1]),
        OPERAND_V=operand(row_v),
        WINDOWED=window is not None,
        ARCH=capability,
        BLOCK_M=options.queries,
        BLOCK_N=options.keys,
        ACROSS=options.across,
        EACH=sums.each,
        num_warps=options.warps,
        num_stages=options.stages,
    )
    return merge(value, row_v, sums, window, queries[0].dtype, step)


def into_frame(
    query: torch.Tensor, item: Stored, row: Row, scale: float, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return queries [T, H, columns] as a field's keys meet them, and what multiplies the scores of each [T, H]."""
    query = _readable(query)
    tokens, heads, dim = query.shape
    frame, kv_heads = item.frame, item.field.heads
    framed = torch.empty(tokens, heads, row.columns, dtype=dtype, device=query.device)
    factor = torch.empty(tokens, heads, device=query.device)
    if tokens:
        query_kernel[(triton.cdiv(tokens * heads, 16),)](
            query,
            frame.scale,
            rotation(item, row, query.device) if frame.rotated else None,
            framed,
            factor,
            query.stride(0),
            query.stride(1),
            tokens * heads,
            scale,
            ROW=row,
            HEADS=kv_heads,
            GROUP=heads // kv_heads,
            BLOCK_R=16,
            BLOCK_C=_part(32, row.columns),
            BLOCK_D=triton.next_power_of_2(dim),
            WIDTH=_part(128, triton.next_power_of_2(dim)),
        )
    return framed, factor


@dataclass(frozen=True, slots=True)
class Sums:
    """What programs leave of the spans of a step's rows, to be merged."""

    average: torch.Tensor
    """Float32 [places, T, H, columns]."""
    largest: torch.Tensor
    """Float32 [places, T, H]."""
    total: torch.Tensor
    """Float32 [places, T, H]."""
    keys: int
    """Of a span."""
    spans: int
    """Of the page table's width."""
    each: int
    """Spans that lie joined in one place."""

    @classmethod
    def empty(
        cls,
        shape: tuple[int, int, int],
        programs: int,
        keys: int,
        window: int | None,
        value: Stored,
        step: Step,
        *,
        folded: bool = False,
    ) -> Sums:
        """Make room for queries [T, H, columns].

        `programs`: how many a span takes, if they can have several spans each, else 0; `folded`: that they must.
        """
        spans = triton.cdiv(step.pages.shape[1] * value.page_tokens, keys)
        seen = spans if window is None else min(spans, triton.cdiv(window, keys) + 1)
        each = FOLD if folded else spans_of_a_program(programs * seen)
        places = triton.cdiv(spans, each)
        average = torch.empty(places, *shape, device=step.pages.device)
        largest = torch.empty(places, *shape[:2], device=average.device)
        return cls(average, largest, torch.empty_like(largest), keys, spans, each)


def merge(value: Stored, row: Row, sums: Sums, window: int | None, dtype: torch.dtype, step: Step) -> torch.Tensor:
    """Return the averages [T, H, D] of all spans, out of the frame of the values."""
    average, spans, each = sums.average, sums.spans, sums.each
    _, tokens, query_heads, _ = average.shape
    frame = value.frame
    made = dtype if dtype in {torch.float32, torch.bfloat16} and not INTERPRETED else torch.float32
    out = torch.empty(tokens, query_heads, row.dim, dtype=made, device=average.device)
    if tokens:
        tiles = triton.cdiv(tokens * query_heads, 16)
        owners = (step.owner, step.offset, step.position, step.count)
        stages = 4 if row.columns <= 256 else 3
        if spans > JOINED:
            join_kernel[(tiles, triton.cdiv(spans, JOINED))](
                *(average, sums.largest, sums.total, *owners, tokens * query_heads, window or 0, sums.keys, each),
                FOLD=FOLD // each,
                COLUMNS=row.columns,
                QUERY_HEADS=query_heads,
                WINDOWED=window is not None,
                BLOCK_R=16,
                JOINED=JOINED,
                STAGES=stages,
                num_warps=8,
            )
        merge_kernel[(tiles,)](
            average,
            sums.largest,
            sums.total,
            frame.centre,
            frame.scale,
            rotation(value, row, average.device) if frame.rotated else None,
            *owners,
            out,
            tokens * query_heads,
            window or 0,
            sums.keys,
            JOINED if spans > JOINED else each,
            each,
            FOLD=1 if spans > JOINED else FOLD // each,
            ROW=row,
            HEADS=value.field.heads,
            GROUP=query_heads // value.field.heads,
            WINDOWED=window is not None,
            BLOCK_R=16,
            BLOCK_D=_part(16, triton.next_power_of_2(row.dim)),
            WIDTH=_part(128, row.columns),
            STAGES=stages,
            num_warps=8,
        )
    return out.to(dtype)


def _part(size: int, whole: int) -> int:
    """Return the numbers that a program takes at once: all in the interpreter, whose time goes by operations."""
    return whole if INTERPRETED else min(size, whole)


def _readable(rows: torch.Tensor) -> torch.Tensor:
    """Return rows as kernels read them: float32, or on a device bfloat16 or float16, with dense dims."""
    if INTERPRETED or rows.dtype not in {torch.float32, torch.bfloat16, torch.float16}:
        rows = rows.float()
    return rows if rows.stride(-1) == 1 else rows.contiguous()


def aligned(stored: Stored) -> Row:
    """Return the layout of a field, whose addresses must be as kernels are compiled for."""
    row = layout(stored)
    data = stored.data
    if (data.data_ptr() | data.stride(0) | stored.start) % _ALIGNMENT:
        raise Refused(
            f"the triton kernels read pages and fields that start at multiples of {_ALIGNMENT} bytes, but the field "
            f"'{stored.field.name}' starts at byte {stored.start} of pages of {data.stride(0)}: take pages of a "
            f"multiple of {_ALIGNMENT} tokens"
        )
    return row
