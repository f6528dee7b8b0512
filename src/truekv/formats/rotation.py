"""The random-sign Hadamard rotation of a row: the same matrix in every backend and for ever.

    H = (P kron S) diag(signs) / sqrt(dim)

S is Sylvester's matrix of order 2^k. P is 1 if dim is a power of two, else a Paley matrix of order 12, 20,
28 ...: so that 80, 96 and 192 mix all of their channels too, and not blocks of them. The signs come from
a hash of our own, not from a library's generator, which may change.

It is applied as a product that is exact before its last rounding: the result of a row does not depend on
the batch, the library or the device.

Sources: Sylvester (1867), Paley (1933) for the matrices; Ailon and Chazelle (2006) for the random signs.
"""

# Shape suffixes: D dim.

from __future__ import annotations

import functools
import math
from typing import Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.formats.planes import on_grid

_WORD: Final = 0xFFFFFFFF


def signs(dim: int) -> tuple[int, ...]:
    """Return +1 or -1 for each channel: the lowest bit of a 32-bit integer hash of (dim, channel)."""
    return tuple(1 - 2 * (_hash(dim * 0x9E3779B1 + channel * 0x85EBCA77) & 1) for channel in range(dim))


def check_rotation(dim: int) -> None:
    """Refuse a row length for which no Hadamard matrix is constructed here."""
    _factors(dim)


def rotate(rows: torch.Tensor) -> torch.Tensor:
    """Return H x for every row of float32 [..., D]."""
    return _multiply(rows, _signed(rows.shape[-1], rows.device).T)


def unrotate(rows: torch.Tensor) -> torch.Tensor:
    """Return H^T y for every row of float32 [..., D]: undoes `rotate`."""
    return _multiply(rows, _signed(rows.shape[-1], rows.device))


def matrix(dim: int) -> torch.Tensor:
    """Return H as float32 [D, D] on the CPU, for kernels and for weights that fold it (H @ x rotates x)."""
    return (_signed(dim, torch.device("cpu")) * (1 / math.sqrt(dim))).float()


def parts(dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return signs float64 [D] and Paley's matrix float64 [P, P]; see core.protocols.RowFrame.rotation."""
    paley = torch.tensor(_paley(_factors(dim)[0]), dtype=torch.float64)
    return torch.tensor(signs(dim), dtype=torch.float64), paley


def _multiply(rows: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    # Entries are +1 and -1, so the products are exact and so are their sums.
    return ((on_grid(rows) @ factor) * (1 / math.sqrt(rows.shape[-1]))).float()


@functools.lru_cache(maxsize=64)
def _signed(dim: int, device: torch.device) -> torch.Tensor:
    """Return sqrt(dim) * H, float64 [D, D] of +1 and -1."""
    order, width = _factors(dim)
    paley = torch.tensor(_paley(order), dtype=torch.float64)
    sylvester = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(width.bit_length() - 1):
        sylvester = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), sylvester)
    return (torch.kron(paley, sylvester) * torch.tensor(signs(dim))).to(device)


@functools.cache
def _factors(dim: int) -> tuple[int, int]:
    """Write dim as (order of a Paley matrix, power of two)."""
    odd = dim // (dim & -dim) if dim > 0 else 0
    candidates = [1] if odd == 1 else [odd << k for k in range(2, 12) if odd and dim % (odd << k) == 0]
    for order in candidates:
        if order == 1 or _paley_prime(order):
            return order, dim // order
    raise Refused(f"no Hadamard rotation is known here for rows of {dim} numbers: use bf16 or fp8 for them")


def _paley_prime(order: int) -> int:
    """Return the prime of Paley's first or second construction of this order, or 0."""
    first, second = order - 1, order // 2 - 1
    if first % 4 == 3 and _is_prime(first):
        return first
    return second if second % 4 == 1 and _is_prime(second) else 0


@functools.cache
def _paley(order: int) -> tuple[tuple[int, ...], ...]:
    """Return a Hadamard matrix of this order (1, or one that `_paley_prime` knows)."""
    if order == 1:
        return ((1,),)
    prime = _paley_prime(order)
    squares = {value * value % prime for value in range(1, prime)}
    # Jacobsthal's matrix, bordered: skew-symmetric for primes 3 mod 4, symmetric for primes 1 mod 4.
    skew = prime % 4 == 3
    core = [[0] + [1] * prime]
    for row in range(prime):
        inner = [0 if column == row else 1 if (column - row) % prime in squares else -1 for column in range(prime)]
        core.append([-1 if skew else 1, *inner])
    if skew:
        return tuple(tuple(value + (i == j) for j, value in enumerate(row)) for i, row in enumerate(core))
    tops, bottoms = {0: (1, -1), 1: (1, 1), -1: (-1, -1)}, {0: (-1, -1), 1: (1, -1), -1: (-1, 1)}
    pairs = [[[value for entry in row for value in half[entry]] for half in (tops, bottoms)] for row in core]
    return tuple(tuple(line) for pair in pairs for line in pair)


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % divisor for divisor in range(2, math.isqrt(number) + 1))


def _hash(word: int) -> int:
    """Mix the bits of a 32-bit word: each output bit depends on every input bit."""
    word &= _WORD
    word = ((word ^ (word >> 16)) * 0x7FEB352D) & _WORD
    word = ((word ^ (word >> 15)) * 0x846CA68B) & _WORD
    return word ^ (word >> 16)
