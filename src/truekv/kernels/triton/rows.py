"""Norms, activations, gates and rotary turns in Triton: one pass over memory each, float32 inside, rounded once.

Shapes as in core/ops.py. Rows may be slices of wider ones, of any stride, as long as a row's numbers lie side by side.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.interpreter import INTERPRETED

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.ops import Activation

EMULATED = tl.constexpr(INTERPRETED)
"""The interpreter cuts float32 to bfloat16 where devices round."""
BLOCK: Final = 1024
"""Numbers of one program that has no whole row to see."""


@triton.jit
def narrow(x, out):
    """Round float32 to the numbers that `out` points to, to nearest, ties to even."""
    if EMULATED and out.dtype.element_ty == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = ((bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000).to(tl.float32, bitcast=True)
        x = tl.where(x == x, nearest, x)  # noqa: PLR0124 (NaN)
    return x.to(out.dtype.element_ty)


@triton.jit
def silu(x):
    """Return x * sigmoid(x)."""
    return x / (1.0 + tl.exp(-x))


@triton.jit
def soft(x):
    """Return log(1 + exp(x)), exact to a few bits where exp(x) vanishes beside 1 (Kahan's log1p)."""
    raised = tl.exp(tl.minimum(x, 20.0))
    one = 1.0 + raised
    log = tl.where(one == 1.0, raised, tl.log(one) * (raised / tl.where(one == 1.0, 1.0, one - 1.0)))
    return tl.where(x > 20.0, x, log)


def dense(x: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with those of the last dimension side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def _warps(numbers: int) -> int:
    return min(8, max(1, numbers // 512))


def rms_norm(x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Normalise the last dimension of [T, D] or [T, H, D]."""
    x = dense(x)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    outer, inner, dim = (x.shape[0], 1, x.shape[1]) if x.ndim == 2 else x.shape
    if out.numel():
        given = out if gain is None else gain
        block = triton.next_power_of_2(dim)
        _norm[(outer * inner,)](
            *(x, x, given, out, out, inner, dim, x.stride(0), x.stride(-2), 0, eps),
            ADDED=False,
            GAINED=gain is not None,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


def add_norm(
    x: torch.Tensor, change: torch.Tensor, gain: torch.Tensor, eps: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return x + change, and its norm, for [T, C]."""
    x, change = dense(x), dense(change)
    rows, dim = x.shape
    total, out = (torch.empty(rows, dim, dtype=x.dtype, device=x.device) for _ in range(2))
    if rows:
        block = triton.next_power_of_2(dim)
        _norm[(rows,)](
            *(x, change, gain, total, out, 1, dim, x.stride(0), 0, change.stride(0), eps),
            ADDED=True,
            GAINED=True,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return total, out


@triton.jit
def _norm(
    xs,
    changes,
    gain,
    totals,
    outs,
    inner,
    dim,
    stride,
    inner_stride,
    change_stride,
    eps,
    ADDED: tl.constexpr,
    GAINED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    real = place < dim
    x = tl.load(xs + row // inner * stride + row % inner * inner_stride + place, mask=real, other=0.0).to(tl.float32)
    if ADDED:
        x += tl.load(changes + row * change_stride + place, mask=real, other=0.0).to(tl.float32)
        rounded = narrow(x, totals)
        tl.store(totals + row * dim + place, rounded, mask=real)
        x = rounded.to(tl.float32)
    x *= 1.0 / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
    if GAINED:
        x *= tl.load(gain + place, mask=real, other=0.0)
    tl.store(outs + row * dim + place, narrow(x, outs), mask=real)


def gated_norm(
    x: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, gate_first: bool
) -> torch.Tensor:
    """Normalise rows [T, H, D] before or after they are multiplied by silu(gate): to [T, H * D]."""
    x, gate = x.contiguous(), dense(gate)
    outer, inner, dim = x.shape
    out = torch.empty(outer, inner * dim, dtype=gate.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(dim)
        _gated_norm[(outer * inner,)](
            *(x, gate, gain, out, inner, dim, gate.stride(0), 0 if gain.shape[0] == dim else dim, eps),
            FIRST=gate_first,
            BLOCK=block,
            num_warps=_warps(block),
        )
    return out


@triton.jit
def _gated_norm(
    xs, gates, gain, outs, inner, dim, gate_stride, gain_stride, eps, FIRST: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of one head."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    real = place < dim
    x = tl.load(xs + row * dim + place, mask=real, other=0.0)
    gate = tl.load(gates + row // inner * gate_stride + row % inner * dim + place, mask=real, other=0.0)
    by = silu(gate.to(tl.float32))
    if FIRST:
        x *= by
    x *= 1.0 / tl.sqrt(tl.sum(x * x, 0) / dim + eps)
    x *= tl.load(gain + row % inner * gain_stride + place, mask=real, other=0.0)
    if not FIRST:
        x *= by
    tl.store(outs + row * dim + place, narrow(x, outs), mask=real)


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply an activation: [T, 2 I] or [T, I] to [T, I]."""
    x = dense(x)
    rows, width = x.shape
    width = width // 2 if activation == "swiglu" else width
    out = torch.empty(rows, width, dtype=x.dtype, device=x.device)
    if out.numel():
        block = min(BLOCK, triton.next_power_of_2(width))
        _activate[(rows, triton.cdiv(width, block))](
            x, out, width, x.stride(0), SWIGLU=activation == "swiglu", BLOCK=block
        )
    return out


@triton.jit
def _activate(xs, outs, width, stride, SWIGLU: tl.constexpr, BLOCK: tl.constexpr):
    """One block of one row."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    real = place < width
    x = tl.load(xs + row * stride + place, mask=real, other=0.0).to(tl.float32)
    if SWIGLU:
        out = silu(x) * tl.load(xs + row * stride + width + place, mask=real, other=0.0).to(tl.float32)
    else:
        # Not tl.maximum, which may return 0 for NaN.
        x = tl.where(x < 0.0, 0.0, x)
        out = x * x
    tl.store(outs + row * width + place, narrow(out, outs), mask=real)


def gate(x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
    """X * sigmoid(by), in by's dtype, for x [T, H, D] and by [T, H, D] or [T, H, 1]."""
    x, by = dense(x), dense(by)
    outer, inner, dim = x.shape
    out = torch.empty(outer, inner, dim, dtype=by.dtype, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(dim)
        strides = x.stride(0), x.stride(1), by.stride(0), by.stride(1)
        _gate[(outer * inner,)](
            *(x, by, out, inner, dim, *strides), ALIKE=by.shape[2] == 1, BLOCK=block, num_warps=_warps(block)
        )
    return out


@triton.jit
def _gate(
    xs, bys, outs, inner, dim, stride, inner_stride, by_stride, by_inner, ALIKE: tl.constexpr, BLOCK: tl.constexpr
):
    """One row of one head."""
    row = tl.program_id(0).to(tl.int64)
    outer, head = row // inner, row % inner
    place = tl.arange(0, BLOCK)
    real = place < dim
    x = tl.load(xs + outer * stride + head * inner_stride + place, mask=real, other=0.0).to(tl.float32)
    at = bys + outer * by_stride + head * by_inner
    by = (tl.load(at) if ALIKE else tl.load(at + place, mask=real, other=0.0)).to(tl.float32)
    tl.store(outs + row * dim + place, narrow(x / (1.0 + tl.exp(-by)), outs), mask=real)


def softplus(x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """log(1 + exp(x + bias)) in float32, for x [T, H]."""
    x = dense(x)
    rows, heads = x.shape
    out = torch.empty(rows, heads, dtype=torch.float32, device=x.device)
    if out.numel():
        block = triton.next_power_of_2(heads)
        _softplus[(rows,)](x, bias, out, heads, x.stride(0), BLOCK=block, num_warps=_warps(block))
    return out


@triton.jit
def _softplus(xs, biases, outs, heads, stride, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)
    real = head < heads
    x = tl.load(xs + row * stride + head, mask=real, other=0.0).to(tl.float32)
    tl.store(outs + row * heads + head, soft(x + tl.load(biases + head, mask=real, other=0.0)), mask=real)


def delta_gates(
    b: torch.Tensor, a: torch.Tensor, bias: torch.Tensor, rate: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return sigmoid(b) and rate * softplus(a + bias), float32 [T, H]."""
    b, a = dense(b), dense(a)
    rows, heads = b.shape
    beta, decay = (torch.empty(rows, heads, dtype=torch.float32, device=b.device) for _ in range(2))
    if rows:
        block = triton.next_power_of_2(heads)
        _delta_gates[(rows,)](
            *(b, a, bias, rate, beta, decay, heads, b.stride(0), a.stride(0)), BLOCK=block, num_warps=_warps(block)
        )
    return beta, decay


@triton.jit
def _delta_gates(bs, a_s, biases, rates, betas, decays, heads, b_stride, a_stride, BLOCK: tl.constexpr):
    """One row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.arange(0, BLOCK)
    real = head < heads
    b = tl.load(bs + row * b_stride + head, mask=real, other=0.0).to(tl.float32)
    a = tl.load(a_s + row * a_stride + head, mask=real, other=0.0).to(tl.float32)
    bias, rate = tl.load(biases + head, mask=real, other=0.0), tl.load(rates + head, mask=real, other=0.0)
    tl.store(betas + row * heads + head, 1.0 / (1.0 + tl.exp(-b)), mask=real)
    tl.store(decays + row * heads + head, rate * soft(a + bias), mask=real)


def norm_rotate(
    heads: Seq[torch.Tensor],
    gains: Seq[torch.Tensor | None],
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    interleaved: bool,
) -> tuple[torch.Tensor, ...]:
    """Norm one or two tensors [T, H, D] where they have a gain, and turn their first 2 P dimensions, in one launch."""
    first, *others = (dense(x) for x in heads)
    tokens, count, dim = first.shape
    second = others[0] if others else None
    gain, other_gain = (*gains, None)[:2]
    more, planes = 0 if second is None else second.shape[1], cos.shape[1]
    assert len(heads) == len(gains) <= 2
    assert second is None or second.shape == (tokens, more, dim)
    outs = tuple(torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in heads)
    if tokens:
        rest, whole = dim - 2 * planes, triton.next_power_of_2(dim)
        _norm_rotate[(tokens * (count + more),)](
            *(first, outs[0], gain, first.stride(0), first.stride(1)),
            *((None,) * 3 + (0, 0) if second is None else (second, outs[1], other_gain, *second.stride()[:2])),
            *(cos.contiguous(), sin.contiguous(), dim, planes, eps),
            HEADS=count,
            HEADS2=more,
            BETWEEN=2 if interleaved else 1,
            APART=1 if interleaved else planes,
            KEPT=rest > 0,
            WHOLE=whole,
            BLOCK=triton.next_power_of_2(planes),
            REST=triton.next_power_of_2(max(1, rest)),
            num_warps=_warps(whole),
        )
    return outs


@triton.jit
def _norm_rotate(
    xs,
    outs,
    gain,  # float32 [D], or None
    stride,
    head_stride,
    xs2,  # another tensor of as many tokens, or None
    outs2,
    gain2,
    stride2,
    head_stride2,
    cosines,
    sines,
    dim,
    planes,
    eps,
    HEADS: tl.constexpr,
    HEADS2: tl.constexpr,
    BETWEEN: tl.constexpr,
    APART: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """One row of one head: of each token first the heads of the one tensor, then those of the other."""
    token = (tl.program_id(0) // (HEADS + HEADS2)).to(tl.int64)
    head = tl.program_id(0) % (HEADS + HEADS2)
    cosines += token * planes
    sines += token * planes
    if head < HEADS:
        _turn(
            *(xs + token * stride + head.to(tl.int64) * head_stride, outs + (token * HEADS + head) * dim, gain),
            *(cosines, sines, dim, planes, eps, BETWEEN, APART, KEPT, WHOLE, BLOCK, REST),
        )
    elif xs2 is not None:
        other = (head - HEADS).to(tl.int64)
        _turn(
            *(xs2 + token * stride2 + other * head_stride2, outs2 + (token * HEADS2 + other) * dim, gain2),
            *(cosines, sines, dim, planes, eps, BETWEEN, APART, KEPT, WHOLE, BLOCK, REST),
        )


@triton.jit
def _turn(
    x,
    out,
    gain,
    cosines,
    sines,
    dim,
    planes,
    eps,
    BETWEEN: tl.constexpr,
    APART: tl.constexpr,
    KEPT: tl.constexpr,
    WHOLE: tl.constexpr,
    BLOCK: tl.constexpr,
    REST: tl.constexpr,
):
    """One row; planes are (BETWEEN i, BETWEEN i + APART)."""
    by = 1.0
    if gain is not None:
        # As in _norm, in whose order squares are added up.
        place = tl.arange(0, WHOLE)
        row = tl.load(x + place, mask=place < dim, other=0.0).to(tl.float32)
        by = 1.0 / tl.sqrt(tl.sum(row * row, 0) / dim + eps)
    plane = tl.arange(0, BLOCK)
    real = plane < planes
    cos, sin = tl.load(cosines + plane, mask=real, other=0.0), tl.load(sines + plane, mask=real, other=0.0)
    first = _normed(x, out, gain, by, BETWEEN * plane, real)
    second = _normed(x, out, gain, by, BETWEEN * plane + APART, real)
    tl.store(out + plane, narrow(first * cos - second * sin, out), mask=real)
    tl.store(out + planes + plane, narrow(second * cos + first * sin, out), mask=real)
    if KEPT:
        place = 2 * planes + tl.arange(0, REST)
        tl.store(out + place, narrow(_normed(x, out, gain, by, place, place < dim), out), mask=place < dim)


@triton.jit
def _normed(xs, out, gain, by, place, real):
    """Return some numbers of a row as its norm rounds them to what `out` points to, or as they are."""
    x = tl.load(xs + place, mask=real, other=0.0).to(tl.float32)
    if gain is not None:
        x = narrow(x * by * tl.load(gain + place, mask=real, other=0.0), out).to(tl.float32)
    return x
