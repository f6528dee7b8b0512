"""Grouped-query attention: biases, per-head norms, partial rotary positions and an output gate as the family asks.

Shapes: T tokens, C hidden size, H query heads, K key/value heads, D head size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.lazy import torch
from truekv.core.spec import Field, Paged
from truekv.models.blocks import Linear, RMSNorm, Shapes, linear, linear_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step
    from truekv.core.protocols import LayerMemory, PagedMemory
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

    def build(self, weights: Mapping[str, torch.Tensor], prefix: str) -> GQA:
        """Compose the attention from its tensors."""
        q, k, v, out = (linear(weights, f"{prefix}{name}_proj") for name in "qkvo")
        norms = None
        if self.head_norm:
            norms = (
                RMSNorm(weights[f"{prefix}q_norm.weight"], self.eps, zero_centred=self.zero_centred),
                RMSNorm(weights[f"{prefix}k_norm.weight"], self.eps, zero_centred=self.zero_centred),
            )
        return GQA(self, (q, k, v, out), norms)


class GQA:
    """Causal attention of H query heads over K shared key/value heads."""

    def __init__(
        self, shape: GqaShape, maps: tuple[Linear, Linear, Linear, Linear], norms: tuple[RMSNorm, RMSNorm] | None
    ) -> None:
        """Take the maps q, k, v and out, and the norms of queries and keys."""
        self.shape = shape
        self.query, self.key, self.value, self.out = maps
        self.norms = norms
        self.scale = shape.head_dim**-0.5 if shape.scale is None else shape.scale

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C]; without `angles`, positions do not enter."""
        shape, gate_TQ = self.shape, None
        q_THD = self.query(x_TC).view(len(x_TC), shape.heads, -1)
        if shape.gated:
            gate_TQ = q_THD[..., shape.head_dim :].flatten(1)
            q_THD = q_THD[..., : shape.head_dim]
        k_TKD = self.key(x_TC).view(len(x_TC), shape.kv_heads, shape.head_dim)
        v_TKD = self.value(x_TC).view(len(x_TC), shape.kv_heads, shape.head_dim)
        if self.norms is not None:
            q_THD, k_TKD = self.norms[0](q_THD), self.norms[1](k_TKD)
        if angles is not None:
            q_THD, k_TKD = angles.rotate(q_THD), angles.rotate(k_TKD)
        out_THD = cast("PagedMemory", memory).attend((q_THD,), (k_TKD, v_TKD), self.scale, step)
        out_TQ = out_THD.flatten(1).to(x_TC.dtype)
        return self.out(out_TQ if gate_TQ is None else out_TQ * torch.sigmoid(gate_TQ))
