"""Zeros that take no memory before they are written."""

from __future__ import annotations

import math
import mmap
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq


_LARGE: Final = 1 << 21
"""Bytes of a large page on x86-64 and, as a rule, on 64-bit Arm."""


def untouched(shape: Seq[int], dtype: torch.dtype, device: torch.device | str, *, piece: int = _LARGE) -> torch.Tensor:
    """Return zeros of a shape; on the CPU the system provides each page of them when it is first written.

    torch.zeros writes its zeros, so a cache of which little is used would take all of its memory at once.
    `piece`: bytes that are taken into use at a time. Large pages are read faster, and the system is asked for
    them where they hold no more than that: a page is resident as a whole.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(*shape, dtype=dtype)
    data = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if piece >= _LARGE and hasattr(mmap, "MADV_HUGEPAGE"):
        data.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(data, dtype=dtype).view(*shape)
