"""Grouped-query attention: biases, per-head norms, partial rotary positions and an output gate as the family asks.

Shapes: T tokens, C hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.lazy import torch
from truekv.core.spec import Field, Live, Paged
from truekv.models.blocks import RMSNorm, Shapes, linear_shapes, norm, tile_columns

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.ops import Matrix, Ops
    from truekv.core.protocols import LayerMemory, PagedMemory
    from truekv.core.weights import Weights
    from truekv.models.rotary import Angles


@dataclass(frozen=True, slots=True)
class GqaShape:
    """Sizes and tensors of grouped-query attention: `q_proj`, `k_proj`, `v_proj`, `o_proj`."""

    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool = False
    """Whether q, k and v have biases."""
    out_bias: bool = False
    head_norm: bool = False
    """Whether queries and keys are normalised per head (`q_norm`, `k_norm`)."""
    zero_centred: bool = False
    eps: float = 1e-6
    gated: bool = False
    """Whether `q_proj` also holds, after each head's query, the gate of its output."""
    scale: float | None = None
    """What scores are multiplied by; by default 1 / sqrt(head_dim)."""

    def spec(self) -> Paged:
        """Remember one key and one value per kv head and token."""
        return Paged(
            (Field("k", self.kv_heads, self.head_dim, "key"), Field("v", self.kv_heads, self.head_dim, "value"))
        )

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        query, rows = self.heads * self.head_dim, self.kv_heads * self.head_dim
        shapes = {
            **linear_shapes(f"{prefix}q_proj", query * (2 if self.gated else 1), self.hidden, bias=self.bias),
            **linear_shapes(f"{prefix}k_proj", rows, self.hidden, bias=self.bias),
            **linear_shapes(f"{prefix}v_proj", rows, self.hidden, bias=self.bias),
            **linear_shapes(f"{prefix}o_proj", self.hidden, query, bias=self.out_bias),
        }
        if self.head_norm:
            shapes |= {f"{prefix}{name}.weight": (self.head_dim,) for name in ("q_norm", "k_norm")}
        return shapes

    @property
    def live(self) -> Live:
        """Products, normed and turned; then queries in the frame of the keys, and what is read."""
        rows, columns = (self.heads + self.kv_heads) * self.head_dim, tile_columns(self.head_dim)
        products = rows + (self.kv_heads + self.gated * self.heads) * self.head_dim
        read = self.heads * self.head_dim
        return Live(
            products + rows + 2 * read,
            self.heads * (columns + 1) + read + 3 * self.head_dim,
            merged=self.heads * (columns + 2),
            group=self.heads // self.kv_heads,
        )

    def build(self, weights: Weights, prefix: str) -> GQA:
        """Compose the attention from its tensors."""
        names = ("q_norm", "k_norm") if self.head_norm else ()
        norms = [norm(weights, prefix + name, self.eps, zero_centred=self.zero_centred) for name in names]
        inputs = weights.linear(*(f"{prefix}{name}_proj" for name in "qkv"))
        return GQA(self, weights.ops, inputs, weights.linear(f"{prefix}o_proj"), norms)


class GQA:
    """Causal attention of H query heads over K shared key/value heads."""

    def __init__(self, shape: GqaShape, ops: Ops, inputs: Matrix, out: Matrix, norms: Seq[RMSNorm] = ()) -> None:
        """Take the map to q (with its gates), k and v side by side, and the norms of queries and keys if any."""
        self.shape = shape
        self.ops = ops
        self.inputs = inputs
        self.out = out
        self.norms = norms
        self.scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C]; without `angles`, positions do not enter."""
        shape, dim = self.shape, self.shape.head_dim
        # Heads of D numbers side by side: queries (a gated one takes two places), then keys, then values.
        heads_THD = self.inputs(x_TC).view(len(x_TC), -1, dim)
        queries = shape.heads * (2 if shape.gated else 1)
        q_THD, k_TKD, v_TKD = torch.split_with_sizes(heads_THD, [queries, shape.kv_heads, shape.kv_heads], 1)
        gate_THD = q_THD[:, 1::2] if shape.gated else None
        q_THD = q_THD[:, ::2] if shape.gated else q_THD
        if angles is not None:
            q_THD, k_TKD = angles.rotate(q_THD, k_TKD, norms=self.norms)
        elif self.norms:
            q_THD, k_TKD = (norm(x_THD) for norm, x_THD in zip(self.norms, (q_THD, k_TKD), strict=True))
        out_THD = cast("PagedMemory", memory).attend((q_THD,), (k_TKD, v_TKD), self.scale, step)
        out_THD = out_THD.to(x_TC.dtype) if gate_THD is None else self.ops.gate(out_THD, gate_THD)
        return self.out(out_THD.flatten(1))
