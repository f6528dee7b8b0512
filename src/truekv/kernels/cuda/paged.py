"""Rows in pages where those of 4 and 3 bits, of q8_0 and latent ones are attended to in CUDA C++: all else is Triton's.

Queries enter the frame of the keys and averages leave that of the values in Triton's kernels, spans are cut and merged
as there. A step can be captured and replayed with other contents: which kernel runs follows from shapes alone.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.kernels.cuda.kernel import (
    BITS,
    GROUPED,
    LATENT,
    LATENT_QUERIES,
    LATENTS,
    PAGE_TOKENS,
    QUERIES,
    ROPE,
    Kind,
    load,
)
from truekv.kernels.triton import paged as triton
from truekv.kernels.triton.tiles import SPAN

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Field, Paged

_CODES: Final = {
    **{name: name for name in BITS},
    "turboquant_4bit": "kv4",
    "turboquant_3bit": "kv3",
}
"""By format: those that are stored alike are one code."""
_ROLES: Final = ["key", "value"]
_LATENT: Final = [("both", LATENT), ("key", ROPE)]
_TILE: Final = 64
"""Query rows that may leave the sums of every span on a place of its own; see engine/activations.py."""

refusal = triton.refusal
store = triton.store


def taken(layer: Paged, formats: Seq[CacheFormat]) -> tuple[Kind, ...]:
    """Return the kinds of kernels that run decode and verify steps of a layer in CUDA C++, if any."""
    return _kinds(layer.fields, formats, layer.window)


def attend(
    queries: tuple[torch.Tensor, ...], fields: tuple[Stored, ...], scale: float, window: int | None, step: Step
) -> torch.Tensor:
    """Causal attention of the step's queries over stored rows; see kernels/reference/paged.py."""
    heads, (batch, longest) = fields[0].field.heads, step.gather.shape
    (tokens, query_heads, _), group = queries[0].shape, queries[0].shape[1] // heads
    kinds = _kinds([item.field for item in fields], [item.format for item in fields], window)
    paged_alike = all(item.page_tokens == PAGE_TOKENS for item in fields)
    rows = group * longest
    latent = bool(kinds) and kinds[0].tiles > 0
    most = LATENT_QUERIES if latent else QUERIES
    if not (kinds and paged_alike and tokens and rows <= most and scale > 0):
        return triton.attend(queries, fields, scale, window, step)
    value = fields[0 if latent else 1]
    scored = fields if latent else fields[:1]
    layouts = [triton.aligned(item) for item in fields]
    framed = triton.into_frame(queries, scored, layouts[: len(scored)], scale, [torch.float32] * len(scored))
    # Of latent rows, the fewest blocks and then the smallest.
    kind = min(kinds, key=lambda one: (-(-rows // (8 * one.tiles)), one.tiles)) if latent else kinds[0]
    blocks = -(-rows // (8 * kind.tiles)) if latent else heads
    # A quarter as many blocks of latent rows keep a device busy.
    programs = blocks * batch * (4 if latent else 1)
    sums = triton.Sums.empty(
        (tokens, query_heads, value.field.dim), programs, SPAN, window, value, step, folded=rows > _TILE
    )
    width = step.pages.shape[1]
    strides = [item.data.stride(0) for item in (fields[:1] if latent else fields)]
    numbers = (longest, width, group, sums.each) if latent else (longest, width, window or 0, group, sums.each)
    load(kind, framed[0][0].device).launch(
        (blocks, batch, len(sums.average)),
        (
            *(item.data[:, item.start :] for item in fields),
            *(query for query, _ in framed),
            *(factor for _, factor in framed),
            step.gather.contiguous(),
            step.position,
            step.count,
            step.pages.contiguous(),
            sums.average,
            sums.largest,
            sums.total,
            *(ctypes.c_uint32(stride) for stride in strides),
            ctypes.c_int64(tokens),
            *(ctypes.c_int32(number) for number in numbers),
        ),
    )
    return triton.merge(value, layouts[0 if latent else 1], sums, window, queries[0].dtype, step)


def _kinds(fields: Seq[Field], formats: Seq[CacheFormat], window: int | None) -> tuple[Kind, ...]:
    codes = [_CODES.get(chosen.name.removesuffix("+hadamard"), "") for chosen in formats]
    if [(item.role, item.dim) for item in fields] == _LATENT and window is None:
        return tuple(kind for kind in LATENTS if [kind.keys, kind.values] == codes)
    if [item.role for item in fields] != _ROLES or fields[0].dim != fields[1].dim:
        return ()
    kind = Kind(codes[0], fields[0].dim, codes[1])
    return (kind,) if kind in GROUPED else ()
