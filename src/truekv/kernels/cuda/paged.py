"""Rows in pages where 4-bit rows are attended to in CUDA C++: all else, and longer chunks, are Triton's.

Queries enter the frame of the keys and averages leave that of the values in Triton's kernels, spans are cut and merged
as there. A step can be captured and replayed with other contents: which kernel runs follows from shapes alone.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.kernels.cuda.kernel import KINDS, PAGE_TOKENS, QUERIES, Kind, load
from truekv.kernels.triton import paged as triton
from truekv.kernels.triton.tiles import SPAN

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Field, Paged

_CODES: Final = {"kv4": "kv4", "turboquant_4bit": "kv4", "int8": "int8"}
"""By format: those that are stored alike are one code."""
_ROLES: Final = ["key", "value"]

refusal = triton.refusal
store = triton.store


def taken(layer: Paged, formats: Seq[CacheFormat]) -> Kind | None:
    """Return the kind of kernel that runs decode and verify steps of a layer in CUDA C++, or None."""
    return _kind(layer.fields, formats)


def attend(
    queries: tuple[torch.Tensor, ...], fields: tuple[Stored, ...], scale: float, window: int | None, step: Step
) -> torch.Tensor:
    """Causal attention of the step's queries over stored rows; see kernels/reference/paged.py."""
    heads, (batch, longest) = fields[0].field.heads, step.gather.shape
    (tokens, query_heads, dim), group = queries[0].shape, queries[0].shape[1] // heads
    kind = _kind([item.field for item in fields], [item.format for item in fields])
    paged_alike = all(item.page_tokens == PAGE_TOKENS for item in fields)
    if not (kind and paged_alike and tokens and group * longest <= QUERIES and scale > 0):
        return triton.attend(queries, fields, scale, window, step)
    key, value = fields
    row_k, row_v = triton.aligned(key), triton.aligned(value)
    ((framed, factor),) = triton.into_frame(queries, (key,), (row_k,), scale, (torch.float32,))
    width = step.pages.shape[1]
    sums = triton.Sums.empty((tokens, query_heads, dim), batch * heads, SPAN, window, value, step)
    load(kind, framed.device).launch(
        (heads, batch, len(sums.average)),
        (
            key.data[:, key.start :],
            value.data[:, value.start :],
            framed,
            factor,
            step.gather.contiguous(),
            step.position,
            step.count,
            step.pages.contiguous(),
            sums.average,
            sums.largest,
            sums.total,
            ctypes.c_uint32(key.data.stride(0)),
            ctypes.c_uint32(value.data.stride(0)),
            ctypes.c_int64(tokens),
            ctypes.c_int32(longest),
            ctypes.c_int32(width),
            ctypes.c_int32(window or 0),
            ctypes.c_int32(group),
            ctypes.c_int32(sums.each),
        ),
    )
    return triton.merge(value, row_v, sums, window, queries[0].dtype, step)


def _kind(fields: Seq[Field], formats: Seq[CacheFormat]) -> Kind | None:
    if [item.role for item in fields] != _ROLES or fields[0].dim != fields[1].dim:
        return None
    keys, values = (_CODES.get(chosen.name.removesuffix("+hadamard"), "") for chosen in formats)
    kind = Kind(keys, fields[0].dim)
    return kind if values == "kv4" and kind in KINDS else None
