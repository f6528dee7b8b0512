"""Zeros that take no memory before they are written."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq


_LINE: Final = 64
"""Bytes of a cache line: a vector of that many should not lie on two."""


def untouched(shape: Seq[int], dtype: torch.dtype, device: torch.device | str) -> torch.Tensor:
    """Return zeros of a shape; on the CPU the system provides each page of them when it is first written.

    torch.zeros writes its zeros, so a cache of which little is used would take all of its memory at once.
    """
    if torch.device(device).type != "cpu":
        return torch.zeros(*shape, dtype=dtype, device=device)
    import numpy as np  # Planning reads this room too, and answers without numpy.

    size = math.prod(shape) * dtype.itemsize
    data = np.zeros(size + _LINE, np.uint8)
    start = -data.ctypes.data % _LINE
    return torch.from_numpy(data[start : start + size]).view(dtype).view(*shape)
