"""AMX on this machine: tried before it is trusted, as few processors have it and its tests run where none has.

The same small operations are run by its kernels and by those below it. Sums of integers are exact in any order, and the
numbers of the linear maps here are integers too, so all bits must agree. One map gives work to every thread, because
tiles are registers of a thread, set up in each.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.kernels.native.arguments import Linear, Pack
from truekv.kernels.native.paged import KEYS, Attend
from truekv.kernels.native.stored import CODES, StoredField

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from truekv.kernels.native.library import Library

    Call = Callable[[str, ctypes.Structure], None]

_KEYS: Final = 600
"""Two partial results, of which the second ends within a block."""
_TOKENS: Final = 4
_PANEL: Final = 64
"""Outputs that a thread maps to at a time: PANEL of native/linear.cpp."""
_BITS: Final = {"kv4": 4, "int8": 8}


def problem(library: Library, tried: str, trusted: str) -> str | None:
    """Return what an instruction set computes otherwise than one that is trusted, as a clause, or None."""

    def calls(isa: str) -> Call:
        return lambda op, arguments: library.function(op, isa, type(arguments))(ctypes.byref(arguments))

    for what, compute in _operations():
        # It comes first, so that no right answer lies about in memory where it writes none.
        if not torch.equal(compute(calls(tried)), compute(calls(trusted))):
            return f"on this machine {tried} and {trusted} disagree in {what}"
    return None


def _operations() -> Generator[tuple[str, Callable[[Call], torch.Tensor]]]:
    """Yield names, and what computes a result with the kernels that it is given."""
    make = torch.Generator().manual_seed(0)
    # Numbers that fill tiles and that do not; more inputs than are summed at a time, and an odd one.
    for rows, into, out in ((1, 32, 64), (16, 64, 16), (17, 1039, 80), (40, 70, _everywhere())):
        yield f"a linear map of [{rows}, {into}] to [{rows}, {out}]", _linear(rows, into, out, make)
    for keys, values in (("int8", "kv4"), ("kv4", "int8")):
        k, v = (_field(code, 2, 128, make) for code in (keys, values))
        yield f"attention over {keys} keys and {values} values", _attention((k,), v, 5, make)
    latent, rope = _field("int8", 1, 512, make), _field("int8", 1, 64, make)
    yield "attention over latent rows of int8", _attention((latent, rope), latent, 20, make)


def _everywhere() -> int:
    """So many outputs that every thread has some."""
    return _PANEL * max(torch.get_num_threads(), 16) + 17


def _linear(rows: int, into: int, out: int, make: torch.Generator) -> Callable[[Call], torch.Tensor]:
    """Integers of up to seven bits: 1,040 products of two stay below 2^24, up to which float32 holds all integers."""
    x, weight = (torch.randint(-127, 128, (n, into), generator=make).bfloat16() for n in (rows, out))

    def compute(call: Call) -> torch.Tensor:
        packed = torch.empty((into + into % 2) * (-(-out // 16) * 16), dtype=torch.bfloat16)
        call("pack", Pack(weight.data_ptr(), packed.data_ptr(), into, out, into, packed_out=out, bf16=True))
        got = torch.full((rows, out), torch.nan)
        pointers = (x.data_ptr(), packed.data_ptr(), None, got.data_ptr(), None, None)
        call("linear", Linear(*pointers, rows, into, out, groups=1, x_row=into, out_row=out, bf16=True))
        return got

    return compute


def _field(code: str, heads: int, dim: int, make: torch.Generator) -> StoredField:
    """Return pages of random codes and scales, some more than hold the keys."""
    pages, width = _KEYS // KEYS + 2, dim * _BITS[code] // 8
    codes = torch.randint(0, 256, (pages, heads, KEYS * width), dtype=torch.uint8, generator=make)
    scales = torch.rand(pages, heads, KEYS, generator=make).half() / 40
    data = torch.cat([codes, scales.view(torch.uint8)], -1)
    head_bytes = data.shape[-1]
    field = StoredField(
        data=data.data_ptr(),
        page_bytes=heads * head_bytes,
        head_bytes=head_bytes,
        order=1,
        code=CODES.index(code),
        dim=dim,
        heads=heads,
        page_tokens=KEYS,
    )
    field.tensors = (data,)
    return field


def _attention(
    scored: tuple[StoredField, ...], value: StoredField, group: int, make: torch.Generator
) -> Callable[[Call], torch.Tensor]:
    """Attend the last tokens of one sequence, whose query rows fill tiles and begin another."""
    heads = value.heads * group
    queries = [torch.randn(_TOKENS, heads, field.dim, generator=make) for field in scored]
    pages = torch.randperm(_KEYS // KEYS + 2, generator=make)
    gather, position, count = torch.arange(_TOKENS), torch.tensor([_KEYS - _TOKENS]), torch.tensor([_TOKENS])

    def compute(call: Call) -> torch.Tensor:
        out = torch.full((_TOKENS, heads, value.dim), torch.nan)
        arguments = Attend(
            scored=scored,
            value=value,
            queries=tuple(query.data_ptr() for query in queries),
            token_stride=tuple(query.stride(0) for query in queries),
            head_stride=tuple(query.stride(1) for query in queries),
            out=out.data_ptr(),
            gather=gather.data_ptr(),
            position=position.data_ptr(),
            count=count.data_ptr(),
            pages=pages.data_ptr(),
            batch=1,
            longest=_TOKENS,
            width=len(pages),
            tokens=_TOKENS,
            heads=value.heads,
            group=group,
            factor=sum(field.dim for field in scored) ** -0.5,
            fields=len(scored),
            latent=value is scored[0],
        )
        call("attend", arguments)
        return out

    return compute
