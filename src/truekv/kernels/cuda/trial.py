"""Before a kernel is used on a device it computes a small step there, beside float64."""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.cuda.kernel import BITS, BLOCK, PAGE_TOKENS, ROPE, load, runs_on
from truekv.kernels.triton.codebook import LEVELS

if TYPE_CHECKING:
    from truekv.kernels.cuda.kernel import Kind, Launchable

BOUND: Final = 5e-4
"""Of the error on a device, relative to the largest number: weights are halves, of 11 bits."""
_LENGTHS: Final = (600, 33)
"""Of two sequences: two spans, and two pages."""
_COUNTS: Final = (2, 1)
_WIDTH: Final = 19
_UNITS: Final = 32512.0
_LOWEST: Final = -3.0e38


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

    A block takes one span, and then both.
    """
    run, case = load(kind, device), _draw(kind)
    expected = case.expected()
    # NaN is to stay.
    off = [(case.launched(run, kind, device, each) - expected).abs().max() for each in (1, 2)]
    return float(torch.stack(off).max() / expected.abs().max())


@dataclass(frozen=True, slots=True)
class _Case:
    """Random rows, and queries that the kernel takes as they are: only weights are rounded."""

    codes: tuple[torch.Tensor, ...]
    """Of each field: uint8 [pages, heads, bytes]."""
    rows: tuple[torch.Tensor, ...]
    """What they stand for: float64 [pages, heads, lines, D]."""
    queries: tuple[torch.Tensor, ...]
    """Of each field that is scored: [T, H, D]."""
    factor: float
    heads: int
    pages: torch.Tensor

    def launched(self, run: Launchable, kind: Kind, device: torch.device, each: int) -> torch.Tensor:
        """Return [T, H, D] as the kernel has it, with so many spans in a block."""
        (tokens, heads, _), places = self.queries[0].shape, 2 // each
        if kind.tiles:
            # Both fields of a page, one behind the other.
            whole = torch.cat([codes[:, 0] for codes in self.codes], -1).to(device)
            data, sizes, blocks = (whole, whole[:, self.codes[0].shape[-1] :]), [whole.stride(0)], 2
        else:
            data = tuple(codes.to(device) for codes in self.codes)
            sizes, blocks = [codes[0].numel() for codes in self.codes], self.heads
        position = torch.tensor(_LENGTHS) - torch.tensor(_COUNTS)
        average = torch.zeros(places, tokens, heads, self.values.shape[-1], device=device)
        # A span that a query sees nothing of is not written.
        largest = torch.full(average.shape[:-1], -torch.inf, device=device)
        total = torch.zeros_like(largest)
        window = () if kind.tiles else (0,)
        run.launch(
            (blocks, 2, places),
            (
                *data,
                *(query.to(device) for query in self.queries),
                *(torch.full((tokens, heads), self.factor, device=device) for _ in self.queries),
                torch.tensor([[0, 1], [2, 2]], device=device),
                *(item.to(device) for item in (position, torch.tensor(_COUNTS), self.pages)),
                average,
                largest,
                total,
                *(ctypes.c_uint32(size) for size in sizes),
                ctypes.c_int64(tokens),
                *(ctypes.c_int32(number) for number in (2, _WIDTH, *window, heads // self.heads, each)),
            ),
        )
        share = torch.exp2(largest - largest.amax(0)) * (largest > _LOWEST)
        return ((average * share[..., None]).sum(0) / (total * share).sum(0)[..., None]).double().cpu()

    @property
    def values(self) -> torch.Tensor:
        """The rows that are averaged: the second field, or the first of two that are scored."""
        return self.rows[0 if len(self.queries) > 1 else 1]

    def expected(self) -> torch.Tensor:
        """Return [T, H, D] in float64."""
        tokens, heads, _ = self.queries[0].shape
        out = torch.zeros(tokens, heads, self.values.shape[-1], dtype=torch.float64)
        for row, token, seen in ((0, 0, _LENGTHS[0] - 1), (0, 1, _LENGTHS[0]), (1, 2, _LENGTHS[1])):
            for head in range(heads):
                read = (*self.rows[: len(self.queries)], self.values)
                *keys, values = (
                    rows[self.pages[row], head * self.heads // heads].flatten(0, 1)[:seen] for rows in read
                )
                scores = [one @ query[token, head].double() for one, query in zip(keys, self.queries, strict=True)]
                weights = torch.softmax(torch.stack(scores).sum(0) * (self.factor * math.log(2)), 0)
                out[token, head] = weights @ values
        return out


def _draw(kind: Kind) -> _Case:
    """Two kv heads with two query heads each, or one latent row for so many that their queries take two blocks."""
    make = torch.Generator().manual_seed(0)
    heads, group = (1, 4 * kind.tiles + 1) if kind.tiles else (2, 2)
    pages = torch.randperm(2 * _WIDTH, generator=make).view(2, _WIDTH)
    fields = (kind.keys, kind.dim), (kind.values, ROPE if kind.tiles else kind.dim)
    drawn = [_random(code, dim, (2 * _WIDTH, heads), make) for code, dim in fields]
    scored = 2 if kind.tiles else 1
    queries: list[torch.Tensor] = []
    for _, rows in drawn[:scored]:
        query = torch.randn(sum(_COUNTS), heads * group, rows.shape[-1], generator=make)
        # One part is a unit vector; of two parts the largest number is 1, and units are half as many. Those of bf16 are
        # as they are.
        query = torch.nn.functional.normalize(query, p=math.inf if kind.tiles else 2, dim=-1)
        exact = (
            query.bfloat16().float() if kind.keys == "bf16" else (query * (_UNITS / scored)).round() / _UNITS * scored
        )
        queries.append(exact)
    codes, rows = zip(*drawn, strict=True)
    return _Case(codes, rows, tuple(queries), 1.0 if kind.tiles else 8.0, heads, pages)


def _random(code: str, dim: int, shape: tuple[int, int], make: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Return pages of random codes and scales as bytes, and their rows [*shape, lines, dim] in storage order."""
    if code == "bf16":
        numbers_of = torch.randn(*shape, PAGE_TOKENS, dim, generator=make).bfloat16()
        return numbers_of.view(torch.uint8).flatten(2), numbers_of.double()
    # Of each scale: one of a row, or one of each block.
    block = BLOCK if code in {"q8_0", "q4_0"} else dim
    parts = (*shape, PAGE_TOKENS, dim // block)
    codes = torch.randint(0, 256, (*parts, block * BITS[code] // 8), dtype=torch.uint8, generator=make)
    scales = torch.rand(parts, generator=make)
    if code == "q4_0":
        # Of either sign, and codes are a sixteenth of the others'.
        scales = 32 * scales - 16
    scales = (scales / 40).half()
    held = scales[..., None].view(torch.uint8)
    rows = (numbers(code, codes) * scales.double()[..., None]).flatten(-2)
    if block < dim:
        return torch.cat([held, codes], -1).flatten(2), rows
    return torch.cat([codes.flatten(2), held.flatten(2)], -1), rows


def numbers(code: str, codes: torch.Tensor) -> torch.Tensor:
    """Return what codes [..., bytes] stand for, before they meet a scale: float64 [..., numbers] in storage order."""
    if code in {"int8", "q8_0"}:
        return codes.view(torch.int8).double()
    if code == "kv3":
        width = codes.shape[-1] // 3
        two, third = (codes[..., :width], codes[..., width : 2 * width]), codes[..., 2 * width :]
        each = [two[part % 2] >> part // 2 * 2 & 3 | (third >> part & 1) << 2 for part in range(8)]
    else:
        each = [codes & 15, codes >> 4]
    found = torch.stack(each, -1).flatten(-2)
    return found.double() - 8 if code == "q4_0" else torch.tensor(LEVELS[code], dtype=torch.float64)[found.long()]
