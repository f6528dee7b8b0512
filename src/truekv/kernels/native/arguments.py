"""The arguments of native operations: each mirrors the structure of its name in native/*.cpp."""

from __future__ import annotations

import ctypes


def _members(pointers: str, longs: str, floats: str = "", ints: str = "") -> list[tuple[str, type]]:
    """List the members of a structure: names of each type, which lie in this order."""
    kinds = ((pointers, ctypes.c_void_p), (longs, ctypes.c_int64), (floats, ctypes.c_float), (ints, ctypes.c_int32))
    return [(name, kind) for names, kind in kinds for name in names.split()]


class Linear(ctypes.Structure):
    """Of `linear` in native/linear.cpp."""

    _fields_ = _members(
        "x weight bias out starts sources",
        "rows into out_features groups x_row x_group out_row out_group",
        ints="bf16 out_bf16",
    )


class Pack(ctypes.Structure):
    """Of `pack` in native/linear.cpp."""

    _fields_ = _members("weight packed", "into out_features row_stride first packed_out", ints="bf16")


class Rows(ctypes.Structure):
    """Of `rows` in native/linear.cpp."""

    _fields_ = _members("packed indices out", "rows into out_features", ints="bf16")


class RmsNorm(ctypes.Structure):
    """Of `rms_norm` in native/pointwise.cpp."""

    _fields_ = _members("x change gain total out", "outer inner dim x_outer x_inner", floats="epsilon", ints="bf16")


class GatedNorm(ctypes.Structure):
    """Of `gated_norm` in native/pointwise.cpp."""

    _fields_ = _members(
        "x gate gain out", "outer inner dim gate_outer gain_inner", floats="epsilon", ints="gate_first bf16"
    )


class Activate(ctypes.Structure):
    """Of `activate` in native/pointwise.cpp."""

    _fields_ = _members("x out", "rows dim x_row", ints="relu2 bf16")


class Gate(ctypes.Structure):
    """Of `gate` in native/pointwise.cpp."""

    _fields_ = _members("x by out", "outer inner dim x_outer x_inner by_outer by_inner", ints="single x_bf16 by_bf16")


class Softplus(ctypes.Structure):
    """Of `softplus` in native/pointwise.cpp."""

    _fields_ = _members("x bias out", "rows dim x_row", ints="bf16")


class DeltaGates(ctypes.Structure):
    """Of `delta_gates` in native/pointwise.cpp."""

    _fields_ = _members("b a bias rate beta decay", "rows heads b_row a_row", ints="bf16")


class Angles(ctypes.Structure):
    """Of `angles` in native/pointwise.cpp."""

    _fields_ = _members("positions frequencies cosine sine", "rows planes", floats="amplitude")


class Rotate(ctypes.Structure):
    """Of `rotate` in native/pointwise.cpp."""

    _fields_ = _members("x cosine sine out", "outer inner dim planes x_outer x_inner", ints="interleaved bf16")


class Route(ctypes.Structure):
    """Of `route` in native/pointwise.cpp."""

    _fields_ = _members(
        "logits bias weights chosen",
        "rows experts per_token groups kept_groups",
        floats="scale",
        ints="sigmoid normalised",
    )


class Arrange(ctypes.Structure):
    """Of `arrange` in native/pointwise.cpp."""

    _fields_ = _members("chosen starts sources places", "tokens per_token experts")


class Combine(ctypes.Structure):
    """Of `combine` in native/pointwise.cpp."""

    _fields_ = _members("rows places weights out", "tokens per_token dim", ints="bf16")


class Part(ctypes.Structure):
    """Of `finite` in native/pointwise.cpp."""

    _fields_ = _members("x", "dim x_row", ints="bf16")


Parts = Part * 4


class Finite(ctypes.Structure):
    """Of `finite` in native/pointwise.cpp."""

    _fields_ = (("parts", Parts), *_members("rows", "number count", ints="finite"))


class Largest(ctypes.Structure):
    """Of `largest` in native/pointwise.cpp."""

    _fields_ = _members("x places", "rows dim x_row", ints="bf16")
