"""The kernel of attend.cu for one head size: compiled, loaded, and tried on the device before it is trusted."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Final, Protocol

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.cuda.compiler import compiled
from truekv.kernels.cuda.driver import Function
from truekv.kernels.triton.codebook import LEVELS
from truekv.kernels.triton.tiles import SPAN, arch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.kernels.cuda.driver import Argument

SOURCE: Final = Path(__file__).parent / "attend.cu"
DIMS: Final = (64, 128, 256)
"""Head sizes; what the kernel is compiled for, one by one."""
QUERIES: Final = 8
"""Query rows of one kv head, at most."""
PAGE_TOKENS: Final = 32
BOUND: Final = 5e-4
"""Of the error on a device, relative to the largest number: weights are halves, of 11 bits."""
_FACTOR: Final = 8.0
_UNITS: Final = 32512.0
_LOWEST: Final = -3.0e38


class Launchable(Protocol):
    """What runs the kernel."""

    def launch(self, grid: tuple[int, int, int], arguments: Seq[Argument]) -> None:
        """Run it with as many blocks."""
        ...


def definitions(dim: int) -> dict[str, int]:
    """Return what the source leaves open."""
    return {"DIM": dim, "PAGE": PAGE_TOKENS, "SPAN": SPAN}


@functools.cache
def load(dim: int, device: torch.device) -> Launchable:
    """Return the kernel of a head size on a device; Refused where it does not compile or load."""
    return Function(compiled(SOURCE, definitions(dim)), "attend", device)


def runs_on(device: torch.device) -> bool:
    """Return whether a device is of the one kind that the kernel is written for."""
    return torch.cuda.is_available() and arch(device) == 90


@functools.cache
def problem(dim: int, device: torch.device) -> str | None:
    """Return why the kernel of a head size cannot be used on a device, or None: it is compiled and tried."""
    if not runs_on(device):
        return "the CUDA kernels run on CUDA devices of compute capability 9.0"
    try:
        off = error(dim, device)
    except Refused as reason:
        return str(reason)
    if not off <= BOUND:
        return f"the CUDA kernel for heads of {dim} is off by {off:.1e} of the largest number on this device"
    return None


def error(dim: int, device: torch.device) -> float:
    """Return the kernel's largest error on a small step of random rows, relative to the largest number.

    Two sequences, of two spans and of two pages; two kv heads, two query heads each.
    """
    run = load(dim, device)
    make = torch.Generator().manual_seed(0)
    lengths, counts, heads, group, width = (600, 33), (2, 1), 2, 2, 19
    pages = torch.randperm(2 * width, generator=make).view(2, width)
    codes = torch.randint(0, 256, (2, 2 * width, heads, PAGE_TOKENS * dim // 2), dtype=torch.uint8, generator=make)
    scales = torch.rand(2, 2 * width, heads, PAGE_TOKENS, generator=make).half() / 40
    data = torch.cat([codes, scales.view(torch.uint8)], -1).to(device)
    query = torch.randn(sum(counts), heads * group, dim, generator=make)
    # Numbers that the kernel takes as they are: only weights are rounded.
    query = (torch.nn.functional.normalize(query, dim=-1) * _UNITS).round() / _UNITS
    position = torch.tensor([length - count for length, count in zip(lengths, counts, strict=True)])
    gather = torch.tensor([[0, 1], [2, 2]])
    average = torch.zeros(2, sum(counts), heads * group, dim, device=device)
    # A span that a query sees nothing of is not written.
    largest = torch.full(average.shape[:-1], -torch.inf, device=device)
    total = torch.zeros_like(largest)
    step = (gather, position, torch.tensor(counts), pages)
    run.launch(
        (heads, 2, 2),
        (
            data[0],
            data[1],
            query.to(device),
            torch.full(query.shape[:-1], _FACTOR, device=device),
            *(item.to(device) for item in step),
            average,
            largest,
            total,
            *(ctypes.c_uint32(side[0].numel()) for side in data),
            ctypes.c_int64(sum(counts)),
            *(ctypes.c_int32(number) for number in (2, width, 0, group, 1)),
        ),
    )
    share = torch.exp2(largest - largest.amax(0)) * (largest > _LOWEST)
    got = ((average * share[..., None]).sum(0) / (total * share).sum(0)[..., None]).double().cpu()
    k, v = _decoded(codes, scales, dim)
    off, size = 0.0, 0.0
    for row, token in ((0, 0), (0, 1), (1, 2)):
        seen = int(position[row]) + 1 + (token == 1)
        for head in range(heads * group):
            keys, values = (side[pages[row], head // group].flatten(0, 1)[:seen] for side in (k, v))
            weights = torch.softmax(keys @ query[token, head].double() * (_FACTOR * math.log(2)), 0)
            expected = weights @ values
            size = max(size, float(expected.abs().max()))
            # NaN is to stay.
            off = float((got[token, head] - expected).abs().max().clamp(min=off))
    return off / size


def _decoded(codes: torch.Tensor, scales: torch.Tensor, dim: int) -> torch.Tensor:
    """Return rows [.., lines, dim] in storage order: the codes of a byte side by side."""
    lines = codes.view(*codes.shape[:-1], PAGE_TOKENS, dim // 2)
    each = torch.stack([lines & 15, lines >> 4], -1).flatten(-2)
    return torch.tensor(LEVELS["kv4"], dtype=torch.float64)[each.long()] * scales.double()[..., None]
