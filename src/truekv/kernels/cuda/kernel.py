"""The kernels of attend.cu and latent.cu: compiled for rows of one kind, and tried on the device before their use."""

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

SOURCES: Final = Path(__file__).parent
QUERIES: Final = 8
"""Query rows of one kv head that attend.cu takes, at most."""
LATENT, ROPE = 512, 64
"""Numbers of the rows that latent.cu takes."""
LATENT_QUERIES: Final = 128
"""Query rows of a sequence that it takes, at most."""
PAGE_TOKENS: Final = 32
BOUND: Final = 5e-4
"""Of the error on a device, relative to the largest number: weights are halves, of 11 bits."""
_FACTOR: Final = 8.0
_UNITS: Final = 32512.0
_BITS: Final = {"kv3": 3, "kv4": 4, "int8": 8}
_LOWEST: Final = -3.0e38


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    keys: str
    """Their code: kv4, kv3 or int8."""
    dim: int
    values: str = "kv4"
    """Their code: kv4 or kv3, or that of latent keys, which they are."""
    tiles: int = 0
    """Of eight query rows that one block has, where rows are latent ones; else 0."""

    @property
    def source(self) -> Path:
        """What is compiled."""
        return SOURCES / ("latent.cu" if self.tiles else "attend.cu")

    @property
    def definitions(self) -> dict[str, int]:
        """What the source leaves open."""
        whole = {"PAGE": PAGE_TOKENS, "SPAN": SPAN}
        if self.tiles:
            return {"TILES": self.tiles, **whole}
        return {"DIM": self.dim, "KEY_BITS": _BITS[self.keys], "VALUE_BITS": _BITS[self.values], **whole}

    def __str__(self) -> str:
        """Name the rows."""
        if self.tiles:
            return f"{8 * self.tiles} query rows of latent {self.keys} rows"
        return f"heads of {self.dim}, {self.keys} keys and {self.values} values"


_THREE_BITS: Final = (("kv3", "kv3"), ("kv4", "kv3"), ("kv3", "kv4"))
# With int8 keys of 256 numbers the compiler runs out of registers.
GROUPED: Final = (
    *(Kind("kv4", dim) for dim in (64, 128, 256)),
    *(Kind("int8", dim) for dim in (64, 128)),
    *(
        Kind(keys, dim, values)
        for keys, values in (("kv3", "kv3"), ("kv4", "kv3"), ("kv3", "kv4"))
        for dim in (128, 256)
    ),
)
LATENTS: Final = tuple(Kind("int8", LATENT, "int8", tiles) for tiles in (2, 3))
KINDS: Final = GROUPED + LATENTS


class Launchable(Protocol):
    """What runs the kernel."""

    def launch(self, grid: tuple[int, int, int], arguments: Seq[Argument]) -> None:
        """Run it with as many blocks."""
        ...


@functools.cache
def load(kind: Kind, device: torch.device) -> Launchable:
    """Return the kernel of a kind on a device; Refused where it does not compile or load."""
    return Function(compiled(kind.source, kind.definitions), "attend", device)


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
        return f"the CUDA kernel for {kind} is off by {off:.1e} of the largest number on this device"
    return None


def error(kind: Kind, device: torch.device) -> float:
    """Return the kernel's largest error on a small step of random rows, relative to the largest number.

    Two sequences, of two spans and of two pages; two kv heads with two query heads each, or one latent row for so many
    that their queries take two blocks.
    """
    run, dim = load(kind, device), kind.dim
    make = torch.Generator().manual_seed(0)
    lengths, counts, width = (600, 33), (2, 1), 19
    heads, group = (1, 4 * kind.tiles + 1) if kind.tiles else (2, 2)
    pages = torch.randperm(2 * width, generator=make).view(2, width)
    wanted = (kind.keys, dim), (kind.values, ROPE if kind.tiles else dim)
    sides = [_random(code, size, (2 * width, heads), make) for code, size in wanted]
    scored = sides if kind.tiles else sides[:1]
    # Numbers that the kernel takes as they are: only weights are rounded. Those of two parts have a largest one of 1.
    units, factor = _UNITS / len(scored), _FACTOR / len(scored) ** 3
    shape = (sum(counts), heads * group)
    queries = [torch.randn(*shape, rows.shape[-1], generator=make) for _, rows in scored]
    order = math.inf if kind.tiles else 2
    queries = [(torch.nn.functional.normalize(query, p=order, dim=-1) * units).round() / units for query in queries]
    factors = [torch.full(shape, factor, device=device) for _ in scored]
    if kind.tiles:
        # Both fields of a page, one behind the other.
        (whole,) = (torch.cat([codes[:, 0] for codes, _ in sides], -1).to(device),)
        data, page_bytes = (whole, whole[:, sides[0][0].shape[-1] :]), [whole.stride(0)]
    else:
        data = tuple(codes.to(device) for codes, _ in sides)
        page_bytes = [side[0].numel() for side in data]
    position = torch.tensor([length - count for length, count in zip(lengths, counts, strict=True)])
    gather = torch.tensor([[0, 1], [2, 2]])
    average = torch.zeros(2, *shape, sides[0 if kind.tiles else 1][1].shape[-1], device=device)
    # A span that a query sees nothing of is not written.
    largest = torch.full(average.shape[:-1], -torch.inf, device=device)
    total = torch.zeros_like(largest)
    run.launch(
        (heads if not kind.tiles else 2, 2, 2),
        (
            *data,
            *(query.to(device) for query in queries),
            *factors,
            *(item.to(device) for item in (gather, position, torch.tensor(counts), pages)),
            average,
            largest,
            total,
            *(ctypes.c_uint32(size) for size in page_bytes),
            ctypes.c_int64(shape[0]),
            *(ctypes.c_int32(number) for number in ((2, width, group, 1) if kind.tiles else (2, width, 0, group, 1))),
        ),
    )
    share = torch.exp2(largest - largest.amax(0)) * (largest > _LOWEST)
    got = ((average * share[..., None]).sum(0) / (total * share).sum(0)[..., None]).double().cpu()
    values = sides[0][1] if kind.tiles else sides[1][1]
    off, size = 0.0, 0.0
    for row, token in ((0, 0), (0, 1), (1, 2)):
        seen = int(position[row]) + 1 + (token == 1)
        for head in range(heads * group):
            held = [
                rows[pages[row], head // group].flatten(0, 1)[:seen] for rows in (*(one for _, one in scored), values)
            ]
            score = sum(keys @ query[token, head].double() for keys, query in zip(held, queries, strict=False))
            expected = torch.softmax(torch.as_tensor(score) * (factor * math.log(2)), 0) @ held[-1]
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
    elif code == "kv3":
        two, third = (codes[..., : dim // 8], codes[..., dim // 8 : dim // 4]), codes[..., dim // 4 :]
        each = [two[part % 2] >> part // 2 * 2 & 3 | (third >> part & 1) << 2 for part in range(8)]
        rows = torch.tensor(LEVELS[code], dtype=torch.float64)[torch.stack(each, -1).flatten(-2).long()]
    else:
        each = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        rows = torch.tensor(LEVELS[code], dtype=torch.float64)[each.long()]
    return torch.cat([codes.flatten(-2), scales.view(torch.uint8)], -1), rows * scales.double()[..., None]
