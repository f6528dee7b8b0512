"""What every codec does with bytes: refuse non-finite rows, view numbers as bytes, sum exactly."""

from __future__ import annotations

from typing import Final

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.recording import is_recording

HALF_MAX: Final = 65504.0
"""Largest finite fp16 number."""
HALF_STEP: Final = 2.0**-24
"""Distance between subnormal fp16 numbers: no scale is stored more finely."""


def finite(rows: torch.Tensor) -> torch.Tensor:
    """Return rows as float32; NaN or infinity raises Corrupted, unless the step is being recorded."""
    # One pass over the rows: a maximum carries NaN along.
    if rows.numel() and not is_recording() and not bool(torch.isfinite(rows.abs().amax())):
        # A NaN that enters the cache comes back as fluent nonsense many tokens later.
        bad = int((~torch.isfinite(rows)).any(-1).sum())
        raise Corrupted.rows(bad, rows.shape[:-1].numel())
    return rows.float()


def multiple(name: str, dim: int, of: int) -> None:
    """Refuse a row length that the layout of format `name` cannot hold."""
    if dim < 16 or dim % of:
        raise Refused(
            f"format '{name}' stores rows of at least 16 numbers, a multiple of {of}, "
            f"but this field has {dim}: use bf16 for it"
        )


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """View [..., n] numbers of any dtype as uint8 [..., n * itemsize], little endian."""
    return values.contiguous().view(torch.uint8)


def as_numbers(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """View uint8 [..., n * itemsize] as numbers [..., n], whatever the alignment of the rows."""
    # A slice of a row starts at an offset that a wider dtype cannot view, so it is copied first.
    return data.clone(memory_format=torch.contiguous_format).view(dtype)


def half_down(values: torch.Tensor) -> torch.Tensor:
    """Round non-negative float32 to the fp16 at or below it; numbers beyond fp16 give its largest."""
    near = values.clamp(max=HALF_MAX).half()
    bits = near.view(torch.int16)
    # Non-negative fp16 numbers are ordered as their bit patterns: one less is the next below.
    return torch.where(near.float() > values, bits - 1, bits).view(torch.float16)


def on_grid(rows: torch.Tensor) -> torch.Tensor:
    """Round [..., n] to float64 multiples of 2^-42 of each row's largest magnitude or finer.

    Sums of up to 1024 such numbers, of either sign, are exact in float64: every order of addition, every
    library and every device gives the same result, and a row's does not depend on the rest of the batch.
    """
    # Adding and subtracting 2^12 times the largest leaves what a float64 of that size can hold.
    shift = rows.abs().amax(-1, keepdim=True).double() * 4096.0
    return rows.to(torch.float64, copy=True).add_(shift).sub_(shift)


def row_sum(values: torch.Tensor) -> torch.Tensor:
    """Sum float32 [..., n] over the last axis to [..., 1], the same in any order of addition."""
    return on_grid(values).sum(-1, keepdim=True).float()


def root(values: torch.Tensor) -> torch.Tensor:
    """Return square roots of float32 numbers, rounded to nearest.

    torch's own for float32 is off by a unit in one of five numbers where MKL computes it. A root in float64 has
    more than twice the bits, so rounding it once more changes nothing.
    """
    return values.double().sqrt().float()


def split(values: torch.Tensor, width: int) -> torch.Tensor:
    """View [..., n] as [..., n / width, width]."""
    return values.reshape(*values.shape[:-1], values.shape[-1] // width, width)


def fold(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack [..., dim] codes into [..., dim * bits / 8] bytes, each of 8 / bits equal parts of the row."""
    parts = split(codes, codes.shape[-1] * bits // 8)
    packed = parts[..., 0, :]
    for part in range(1, 8 // bits):
        packed = packed | (parts[..., part, :] << (part * bits))
    return packed


def unfold(data: torch.Tensor, bits: int) -> torch.Tensor:
    """Undo `fold`."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)
    return ((data[..., None, :] >> shifts[:, None]) & ((1 << bits) - 1)).flatten(-2)
