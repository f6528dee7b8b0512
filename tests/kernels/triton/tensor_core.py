"""Products of float32 as tensor cores compute them: in three of TF32, of which each cuts its operands."""

from __future__ import annotations

from typing import Any

import numpy as np
from triton.runtime.interpreter import InterpreterBuilder

_CUT = np.uint32(13)
"""Bits of a float32's mantissa that TF32 has not."""
_PLAIN = InterpreterBuilder.create_dot


def tensor_core_dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, most_imprecise: int) -> Any:
    """Stand for InterpreterBuilder.create_dot where a kernel asks for three parts; all else it leaves as it is."""
    if "TF32x3" not in str(input_precision):
        return _PLAIN(self, a, b, d, input_precision, most_imprecise)
    (large_a, small_a), (large_b, small_b) = _parts(a.data), _parts(b.data)
    # What remains is the product of the small ones.
    total = small_a @ large_b + large_a @ small_b + large_a @ large_b
    out = _PLAIN(self, a, b, d, input_precision, most_imprecise)
    out.data = d.data + total
    return out


def _parts(x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """What TF32 holds of a number, and what it holds of the rest."""
    large = _rounded(x)
    return large, _rounded(x - large)


def _rounded(x: np.ndarray) -> np.ndarray:
    bits = x.astype(np.float32).view(np.uint32)
    return ((bits + (np.uint32(1) << (_CUT - np.uint32(1)))) >> _CUT << _CUT).view(np.float32)
