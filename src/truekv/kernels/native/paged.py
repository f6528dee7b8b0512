"""Rows in pages on the CPU: `store` and `attend` of native/encode.cpp and native/attention.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.recording import is_recording
from truekv.kernels.native import stored as layout
from truekv.kernels.native.library import run
from truekv.kernels.native.stored import StoredField, as_structure
from truekv.kernels.reference import paged as reference

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Paged

KEYS = 32
"""Keys of one block, which must not straddle pages: KEYS of native/attention.cpp."""


class Store(ctypes.Structure):
    """Arguments of `store`; see native/encode.cpp."""

    _fields_ = (
        ("field", StoredField),
        ("rows", ctypes.c_void_p),
        ("tokens", ctypes.c_int64),
        ("token_stride", ctypes.c_int64),
        ("head_stride", ctypes.c_int64),
        ("page", ctypes.c_void_p),
        ("line", ctypes.c_void_p),
        ("broken", ctypes.c_void_p),
        ("bf16", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


class Attend(ctypes.Structure):
    """Arguments of `attend`; see native/attention.cpp."""

    _fields_ = (
        ("scored", StoredField * 2),
        ("value", StoredField),
        ("queries", ctypes.c_void_p * 2),
        ("token_stride", ctypes.c_int64 * 2),
        ("head_stride", ctypes.c_int64 * 2),
        ("out", ctypes.c_void_p),
        ("gather", ctypes.c_void_p),
        ("position", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
        ("pages", ctypes.c_void_p),
        ("batch", ctypes.c_int64),
        ("longest", ctypes.c_int64),
        ("width", ctypes.c_int64),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("group", ctypes.c_int64),
        ("window", ctypes.c_int64),
        ("factor", ctypes.c_float),
        ("fields", ctypes.c_int32),
        ("latent", ctypes.c_int32),
        ("bf16", ctypes.c_int32),
    )


def refusal(layer: Paged, formats: Seq[CacheFormat]) -> str | None:
    """Return why a layer cannot run here, or None."""
    return (
        reference.refusal(layer, formats)
        or layout.refusal(layer, formats)
        or reference.more_scored_than_two(layer, "native")
    )


def store(fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
    """Take each field's rows [T, K, D] into its frame, encode them and write row t to line `step.line[t]` of its page.

    A row that is not finite is stored as NaN, and raises Corrupted unless the step is being recorded.
    """
    for stored, rows_TKD in zip(fields, rows, strict=True):
        _store(stored, rows_TKD, step)


def _store(stored: Stored, rows_THD: torch.Tensor, step: Step) -> None:
    rows, bf16 = _readable(rows_THD)
    broken = torch.empty(1, dtype=torch.int64)
    arguments = Store(
        field=as_structure(stored),
        rows=rows.data_ptr(),
        tokens=rows.shape[0],
        token_stride=rows.stride(0),
        head_stride=rows.stride(1),
        page=step.page.data_ptr(),
        line=step.line.data_ptr(),
        broken=broken.data_ptr(),
        bf16=bf16,
    )
    run("store", arguments)
    if not is_recording() and (count := int(broken)):
        raise Corrupted.rows(count, rows.shape[0] * rows.shape[1])


def attend(
    queries: tuple[torch.Tensor, ...], fields: tuple[Stored, ...], scale: float, window: int | None, step: Step
) -> torch.Tensor:
    """Causal attention of the step's queries over stored rows; see kernels/reference/paged.py."""
    scored = [item for item in fields if item.field.role in {"key", "both"}]
    value = next(item for item in fields if item.field.role in {"value", "both"})
    if value.page_tokens % KEYS:
        raise Refused(f"the native attend reads pages of a multiple of {KEYS} tokens, not of {value.page_tokens}")
    readable = [_readable(query) for query in queries]
    tokens, query_heads = queries[0].shape[:2]
    bf16 = readable[0][1]
    out = torch.empty(
        tokens, query_heads, value.field.dim, dtype=torch.bfloat16 if bf16 else torch.float32, device=queries[0].device
    )
    arguments = Attend(
        scored=tuple(as_structure(item) for item in scored),
        value=as_structure(value),
        queries=tuple(query.data_ptr() for query, _ in readable),
        token_stride=tuple(query.stride(0) for query, _ in readable),
        head_stride=tuple(query.stride(1) for query, _ in readable),
        out=out.data_ptr(),
        gather=step.gather.data_ptr(),
        position=step.position.data_ptr(),
        count=step.count.data_ptr(),
        pages=step.pages.data_ptr(),
        batch=step.gather.shape[0],
        longest=step.gather.shape[1],
        width=step.pages.shape[1],
        tokens=tokens,
        heads=value.field.heads,
        group=query_heads // value.field.heads,
        window=window or 0,
        factor=scale,
        fields=len(scored),
        latent=value is scored[0],
        bf16=bf16,
    )
    run("attend", arguments)
    return out.to(queries[0].dtype)


def _readable(rows: torch.Tensor) -> tuple[torch.Tensor, bool]:
    """Return rows as the library reads them, float32 or bfloat16 with dense dims, and whether they are bfloat16."""
    if rows.dtype not in {torch.float32, torch.bfloat16}:
        rows = rows.float()
    if rows.stride(-1) != 1:
        rows = rows.contiguous()
    return rows, rows.dtype == torch.bfloat16
