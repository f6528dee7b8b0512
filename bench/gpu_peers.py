"""What the GPU kernels are compared with: other attention and other scans in the same run, where they are installed.

One of them is written here: the access pattern of vLLM's TurboQuant decoding as its Triton source has it, one program
per query head, four keys at a time, one warp, two gathers of bytes and one of a level for every number. It reads
kv4's bytes, so that only the pattern differs.
"""

# ruff: noqa: ANN001, ANN201, PLR0917
# pyright: basic, reportArgumentType=false, reportCallIssue=false
# Arguments of the kernel have Triton's types.

from __future__ import annotations

import functools
from importlib import import_module
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import triton
import triton.language as tl

from truekv.core.lazy import torch
from truekv.kernels.triton.codebook import LEVELS

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.batch import Step
    from truekv.core.protocols import Stored

SPAN = 512
BLOCK = 4


@triton.jit
def gathered_kernel(
    keys,
    values,
    key_levels,
    query,
    pages,
    position,
    average,
    largest,
    total,
    page_bytes,
    width,
    scale,
    HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    DIM: tl.constexpr,
    PAGE: tl.constexpr,
    SPAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Grid: (rows, query heads, spans); a span's unnormalised average, as ours leaves it."""
    row, head, span = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    end = tl.minimum(tl.load(position + row).to(tl.int32) + 1, (span + 1) * SPAN)
    dim, line = tl.arange(0, DIM), tl.arange(0, BLOCK)
    q = tl.load(query + (row * HEADS * GROUP + head) * DIM + dim).to(tl.float32)
    mean, top, weights = tl.zeros([DIM], tl.float32), tl.full([], -3.0e38, tl.float32), tl.zeros([], tl.float32)
    head_bytes = PAGE * (DIM // 2 + 2)
    for block in range(span * SPAN, end, BLOCK):
        key = block + line
        there = key < end
        page = tl.load(pages + row * width + key // PAGE, mask=there, other=0)
        start = page * page_bytes + head // GROUP * head_bytes
        at = (start + key % PAGE * (DIM // 2))[:, None] + (dim % (DIM // 2))[None, :]
        shift = (dim // (DIM // 2) * 4)[None, :]
        norm = start + PAGE * (DIM // 2) + key % PAGE * 2
        k = tl.load(key_levels + ((tl.load(keys + at, mask=there[:, None], other=0) >> shift) & 15))
        k_norm = tl.load((keys + norm).to(tl.pointer_type(tl.float16)), mask=there, other=0.0).to(tl.float32)
        score = tl.where(there, tl.sum(k * q[None, :], 1) * k_norm * scale, float("-inf"))
        raised = tl.maximum(top, tl.max(score, 0))
        weight, old = tl.exp2(score - raised), tl.exp2(top - raised)
        v = tl.load(key_levels + ((tl.load(values + at, mask=there[:, None], other=0) >> shift) & 15))
        v_norm = tl.load((values + norm).to(tl.pointer_type(tl.float16)), mask=there, other=0.0).to(tl.float32)
        mean = mean * old + tl.sum((weight * v_norm)[:, None] * v, 0)
        weights, top = weights * old + tl.sum(weight, 0), raised
    out = (span.to(tl.int64) * tl.num_programs(0) + row) * HEADS * GROUP + head
    tl.store(average + out * DIM + dim, mean)
    tl.store(largest + out, top)
    tl.store(total + out, weights)


@functools.cache
def _levels(device: torch.device) -> torch.Tensor:
    """Return what kv4's codes stand for; no launch is to wait for the copy."""
    return torch.tensor(LEVELS["kv4"], dtype=torch.float32, device=device)


def gathered(query: torch.Tensor, fields: tuple[Stored, ...], scale: float, step: Step) -> torch.Tensor:
    """Attend to kv4 rows [batch, heads, dim] in their frame with the pattern above, one new token a row."""
    key, value = fields
    batch, heads, dim = query.shape
    device, kv_heads = query.device, key.field.heads
    spans = triton.cdiv(step.pages.shape[1] * key.page_tokens, SPAN)
    average = torch.zeros(spans, batch, heads, dim, device=device)
    largest = torch.full((spans, batch, heads), -3e38, device=device)
    total = torch.zeros_like(largest)
    gathered_kernel[(batch, heads, spans)](
        *(key.data[:, key.start :], value.data[:, value.start :], _levels(device), query, step.pages, step.position),
        *(average, largest, total, key.data.stride(0), step.pages.shape[1], scale * 1.4426950408889634),
        HEADS=kv_heads,
        GROUP=heads // kv_heads,
        DIM=dim,
        PAGE=key.page_tokens,
        SPAN=SPAN,
        BLOCK=BLOCK,
        num_warps=1,
    )
    weight = torch.exp2(largest - largest.amax(0))
    return (average * weight[..., None]).sum(0) / (total * weight).sum(0)[..., None]


def sdpa(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """Return torch's own attention of [B, H, 1, D] over dense rows [B, K, N, D]."""
    attend = torch.nn.functional.scaled_dot_product_attention
    return lambda: attend(query, k, v, enable_gqa=True)


def flex(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """Return torch's flex attention, compiled."""
    module: Any = import_module("torch.nn.attention.flex_attention")
    attend = torch.compile(module.flex_attention)
    return lambda: attend(query, k, v, enable_gqa=True)


def flashinfer(query: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Callable[[], object]:
    """Return flashinfer's paged decoding over the same rows, in pages of 16 tokens."""
    module: Any = import_module("flashinfer")
    batch, kv_heads, tokens, dim = k.shape
    pages = tokens // 16
    rows = torch.stack([k, v], 1).view(batch, 2, kv_heads, pages, 16, dim).permute(0, 3, 1, 4, 2, 5)
    cache = rows.reshape(batch * pages, 2, 16, kv_heads, dim).contiguous()
    workspace = torch.empty(128 << 20, dtype=torch.uint8, device=query.device)
    wrapper = module.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
    steps = torch.arange(batch + 1, dtype=torch.int32, device=query.device) * pages
    indices = torch.arange(batch * pages, dtype=torch.int32, device=query.device)
    last = torch.full((batch,), 16, dtype=torch.int32, device=query.device)
    wrapper.plan(steps, indices, last, query.shape[1], kv_heads, dim, 16, q_data_type=query.dtype)
    asked = query[:, :, 0].contiguous()
    return lambda: wrapper.run(asked, cache)


def fla(batch: int, heads: int, dim: int, device: str) -> Callable[[], object]:
    """Return one token of flash-linear-attention's gated delta rule, states of float32 in place of ours."""
    ops: Any = import_module("fla.ops.gated_delta_rule")
    shape = (batch, 1, heads, dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    gate, beta = -torch.rand(shape[:3], device=device), torch.rand(shape[:3], device=device)
    state = torch.zeros(batch, heads, dim, dim, device=device)
    run = ops.fused_recurrent_gated_delta_rule
    return lambda: run(
        q, k, v, g=gate, beta=beta, initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True
    )


def fla_prompt(tokens: int, heads: int, dim: int, device: str) -> Callable[[], object]:
    """Return a prompt of so many tokens through flash-linear-attention's gated delta rule in chunks."""
    ops: Any = import_module("fla.ops.gated_delta_rule")
    shape = (1, tokens, heads, dim)
    q, k, v = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(3))
    gate, beta = -torch.rand(shape[:3], device=device), torch.rand(shape[:3], device=device)
    run = ops.chunk_gated_delta_rule
    return lambda: run(q, k, v, g=gate, beta=beta, output_final_state=True, use_qk_l2norm_in_kernel=True)


PEERS: dict[str, tuple[str, Callable[..., Callable[[], object]]]] = {
    "torch SDPA": ("torch", sdpa),
    "flex attention": ("torch", flex),
    "flashinfer": ("flashinfer", flashinfer),
}
"""Attention over dense bf16 rows, by the package that each needs."""


def missing(package: str) -> bool:
    """Whether a peer's package is not installed."""
    return find_spec(package) is None
