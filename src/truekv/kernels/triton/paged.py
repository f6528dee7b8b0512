"""Rows in pages on a GPU: a step's rows are stored by one launch, and attended to by three.

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
from truekv.kernels.triton.frames import Blocks, join_kernel, merge_kernel, query_kernel
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
# What kernels are told of a second field where there is none.
_NO_FIELD: Final = (None, 0, (*(None,) * 5, 0, 0, 0))
_NO_QUERY: Final = (*(None,) * 5, 0, 0)
JOINED: Final = 16
"""Spans that one program joins before what is left is merged. A row that has no more has the same bits either way."""


def refusal(layer: Paged, formats: Seq[CacheFormat]) -> str | None:
    """Return why a layer cannot run here, or None."""
    return (
        reference.refusal(layer, formats)
        or layouts.refusal(layer, formats)
        or reference.more_scored_than_two(layer, "triton")
    )


def store(fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
    """Take each field's rows [T, K, D] into its frame, encode them and write row t to line `step.line[t]` of its page.

    Rows of line -1 are stored nowhere. A row that is not finite is stored as NaN, and raises Corrupted unless the step
    is being recorded.
    """
    tokens, tile = len(rows[0]), 32 if INTERPRETED else 1
    if not tokens:
        return
    broken = None if is_recording() else torch.zeros(1, dtype=torch.int32, device=rows[0].device)
    for first in range(0, len(fields), 2):
        # Two at a time: the kernel takes no more.
        told = [_told(*pair) for pair in zip(fields[first : first + 2], rows[first : first + 2], strict=True)]
        (row, heads, given), (row2, heads2, given2) = told if len(told) == 2 else (*told, _NO_FIELD)
        store_kernel[(triton.cdiv(tokens * heads, tile) + triton.cdiv(tokens * heads2, tile),)](
            *given,
            *given2,
            step.page,
            step.line,
            broken,
            tokens,
            ROW=row,
            ROW2=row2,
            HEADS=heads,
            HEADS2=heads2,
            BLOCK_R=tile,
            # Bytes are those of the reference only if products and sums are rounded one by one.
            enable_fp_fusion=False,
        )
    if broken is not None and (count := int(broken)):
        raise Corrupted.rows(count, sum(tokens * part.shape[1] for part in rows))


def _told(stored: Stored, rows_TKD: torch.Tensor) -> tuple[Row, int, tuple[object, ...]]:
    """Return what the kernel is told of a field and its rows: its layout, its heads and the arguments."""
    rows_TKD, frame, row = _readable(rows_TKD), stored.frame, aligned(stored)
    turned = rotation(stored, row, rows_TKD.device) if frame.rotated else None
    numbers = stored.data[:, stored.start :], rows_TKD, frame.centre, frame.scale, turned
    return row, rows_TKD.shape[1], (*numbers, stored.data.stride(0), rows_TKD.stride(0), rows_TKD.stride(1))


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
    framed = into_frame(queries, scored, layouts_of, scale, [torch_operand(row) for row in layouts_of])
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
    queries: Seq[torch.Tensor], fields: Seq[Stored], rows: Seq[Row], scale: float, dtypes: Seq[torch.dtype]
) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the queries of one or two fields as their keys meet them, and what multiplies the scores of each.

    [T, H, columns] and float32 [T, H], by one launch.
    """
    (tokens, heads, _), kv_heads = queries[0].shape, fields[0].field.heads
    made: list[tuple[torch.Tensor, torch.Tensor]] = []
    given: list[tuple[object, ...]] = []
    for query, item, row, dtype in zip(map(_readable, queries), fields, rows, dtypes, strict=True):
        frame, device = item.frame, query.device
        framed = torch.empty(tokens, heads, row.columns, dtype=dtype, device=device)
        factor = torch.empty(tokens, heads, device=device)
        turned = rotation(item, row, device) if frame.rotated else None
        given.append((query, frame.scale, turned, framed, factor, query.stride(0), query.stride(1)))
        made.append((framed, factor))
    (row, *more), (one, *others) = rows, given
    row2, other = (more[0], others[0]) if more else (None, _NO_QUERY)
    if tokens:
        query_kernel[(triton.cdiv(tokens * heads, 16), len(rows))](
            *one,
            *other,
            tokens * heads,
            scale,
            ROW=row,
            ROW2=row2,
            HEADS=kv_heads,
            GROUP=heads // kv_heads,
            BLOCK_R=16,
            BLOCKS=_blocks(row),
            BLOCKS2=_blocks(row2) if row2 else None,
        )
    return made


def _blocks(row: Row) -> Blocks:
    dims = triton.next_power_of_2(row.dim)
    return Blocks(_part(32, row.columns), dims, _part(128, dims))


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
