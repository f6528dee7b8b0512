"""Fields, codes and frames as the native library sees them: structures that mirror native/stored.h."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final
from weakref import WeakKeyDictionary

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.lazy import torch
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Paged

CODES: Final = (
    "f32",
    "bf16",
    "fp8_e4m3",
    "fp8_e5m2",
    "turboquant_fp8",
    "int8",
    "kv4",
    "kv3",
    "q8_0",
    "q5_1",
    "q5_0",
    "q4_1",
    "q4_0",
    "iq4_nl",
)
"""In the order of `Code` in native/formats.h."""
_SAME_CODE: Final = {"turboquant_4bit": "kv4", "turboquant_3bit": "kv3"}
LONGEST: Final = 1024
"""Numbers of a row: LONGEST of native/stored.h."""


class StoredField(ctypes.Structure):
    """`Stored` of native/stored.h: a field of one layer, and its frame."""

    _fields_ = (
        ("data", ctypes.c_void_p),
        ("page_bytes", ctypes.c_int64),
        ("head_bytes", ctypes.c_int64),
        ("centre", ctypes.c_void_p),
        ("scale", ctypes.c_void_p),
        ("signs", ctypes.c_void_p),
        ("paley", ctypes.c_void_p),
        ("order", ctypes.c_int32),
        ("code", ctypes.c_int32),
        ("dim", ctypes.c_int32),
        ("heads", ctypes.c_int32),
        ("page_tokens", ctypes.c_int32),
        ("unused", ctypes.c_int32),
    )


def refusal(layer: Paged, formats: Seq[CacheFormat]) -> str | None:
    """Return why the rows of a layer have no native kernel, or None."""
    for item, chosen in zip(layer.fields, formats, strict=True):
        if _name(chosen) not in CODES:
            return f"the native kernels do not know the format '{chosen.name}'; use the reference backend"
        if item.dim % 16 or item.dim > LONGEST:
            return (
                f"the native kernels take rows of up to {LONGEST} numbers, a multiple of 16, but the field "
                f"'{item.name}' has {item.dim}; use the reference backend"
            )
    return None


def as_structure(stored: Stored) -> StoredField:
    """Return the structure of a field; it holds on to the tensors that it points to."""
    # Made once: a layer's fields stay where they are as long as they exist.
    known = _known.get(stored)
    if known is None:
        known = _known[stored] = _structure(stored)
    return known


_known: WeakKeyDictionary[Stored, StoredField] = WeakKeyDictionary()


def _structure(stored: Stored) -> StoredField:
    frame, field = stored.frame, stored.field
    signs, paley = frame.rotation(field.dim) if frame.rotated else (None, None)
    centre, scale = (None if part is None else part.float().contiguous() for part in (frame.centre, frame.scale))
    made = StoredField(
        data=stored.data.data_ptr() + stored.start,
        page_bytes=stored.data.stride(0),
        head_bytes=stored.head_bytes,
        centre=_pointer(centre),
        scale=_pointer(scale),
        signs=_pointer(signs),
        paley=_pointer(paley),
        order=1 if paley is None else len(paley),
        code=CODES.index(_name(stored.format)),
        dim=field.dim,
        heads=field.heads,
        page_tokens=stored.page_tokens,
    )
    made.tensors = (centre, scale, signs, paley)
    return made


def _name(chosen: CacheFormat) -> str:
    # The rotation of NAME+hadamard is its frame's.
    name = chosen.name.removesuffix("+hadamard")
    return _SAME_CODE.get(name, name)


def _pointer(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()
