"""The kernel of attend.cu for keys of one kind: compiled, loaded, and tried on the device before it is trusted."""

from __future__ import annotations

import ctypes
import functools
import math
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.cuda.compiler import compiled
from truekv.kernels.cuda.driver import Function
from truekv.kernels.triton.codebook import LEVELS
from truekv.kernels.triton.tiles import SPAN

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.kernels.cuda.driver import Argument

SOURCE: Final = Path(__file__).parent / "attend.cu"
QUERIES: Final = 8
"""Query rows of one kv head, at most."""
PAGE_TOKENS: Final = 32
BOUND: Final = 5e-4
"""Of the error on a device, relative to the largest number: weights are halves, of 11 bits."""
_FACTOR: Final = 8.0
_UNITS: Final = 32512.0
_BITS: Final = {"kv4": 4, "int8": 8}
_LOWEST: Final = -3.0e38


class Kind(NamedTuple):
    """What the kernel is compiled for; values are kv4."""

    keys: str
    """Their code: kv4 or int8."""
    dim: int


KINDS: Final = (Kind("kv4", 64), Kind("kv4", 128), Kind("kv4", 256), Kind("int8", 64), Kind("int8", 128))
"""With int8 keys of 256 numbers the compiler runs out of registers."""


class Launchable(Protocol):
    """What runs the kernel."""

    def launch(self, grid: tuple[int, int, int], arguments: Seq[Argument]) -> None:
        """Run it with as many blocks."""
        ...


def definitions(kind: Kind) -> dict[str, int]:
    """Return what the source leaves open."""
    return {"DIM": kind.dim, "KEY_BITS": _BITS[kind.keys], "PAGE": PAGE_TOKENS, "SPAN": SPAN}


@functools.cache
def load(kind: Kind, device: torch.device) -> Launchable:
    """Return the kernel of a kind on a device; Refused where it does not compile or load."""
    return Function(compiled(SOURCE, definitions(kind)), "attend", device)


def runs_on(device: torch.device) -> bool:
    """Return whether a device is of the one kind that the kernel is written for."""
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def problem(kind: Kind, device: torch.device) -> str | None:
    """Return why the kernel of a kind cannot be used on a device, or None: it is compiled and tried."""
    if not runs_on(device):
        return "the CUDA kernels run on CUDA devices of compute capability 9.0"
    try:
        off = error(kind, device)
    except Refused as reason:
        return str(reason)
    if not off <= BOUND:
        return (
            f"the CUDA kernel for heads of {kind.dim} and {kind.keys} keys is off by {off:.1e} of the largest number "
            "on this device"
        )
    return None


def error(kind: Kind, device: torch.device) -> float:
    """Return the kernel's largest error on a small step of random rows, relative to the largest number.

    Two sequences, of two spans and of two pages; two kv heads, two query heads each.
    """
    run, dim = load(kind, device), kind.dim
    make = torch.Generator().manual_seed(0)
    lengths, counts, heads, group, width = (600, 33), (2, 1), 2, 2, 19
    pages = torch.randperm(2 * width, generator=make).view(2, width)
    sides = [_random(code, dim, (2 * width, heads), make) for code in (kind.keys, "kv4")]
    data = [codes.to(device) for codes, _ in sides]
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
    k, v = (rows for _, rows in sides)
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


def _random(code: str, dim: int, shape: tuple[int, int], make: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages of random codes and scales as bytes, and their rows [*shape, lines, dim] in storage order."""
    width = dim * _BITS[code] // 8
    codes = torch.randint(0, 256, (*shape, PAGE_TOKENS, width), dtype=torch.uint8, generator=make)
    scales = torch.rand(*shape, PAGE_TOKENS, generator=make).half() / 40
    if code == "int8":
        rows = codes.view(torch.int8).double()
    else:
        each = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        rows = torch.tensor(LEVELS[code], dtype=torch.float64)[each.long()]
    return torch.cat([codes.flatten(-2), scales.view(torch.uint8)], -1), rows * scales.double()[..., None]
