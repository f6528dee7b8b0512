"""Gated DeltaNet (Yang et al. 2024): short convolution, delta rule with decay, gated norm.

Shapes: T tokens, C hidden size, M convolved channels (q, k and v side by side), Hk key heads,
Hv value heads, N key size, D value size; value head h reads key head h // (Hv / Hk).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.lazy import torch
from truekv.core.ops import Part
from truekv.core.spec import Live, Recurrent, Slab
from truekv.models.blocks import Shapes, linear_shapes

if TYPE_CHECKING:
    from truekv.core.batch import Step
    from truekv.core.ops import Matrix
    from truekv.core.protocols import LayerMemory, StateMemory
    from truekv.core.weights import Weights
    from truekv.models.rotary import Angles


@dataclass(frozen=True, slots=True)
class GdnShape:
    """Sizes and tensors of a Gated DeltaNet.

    The four inputs come from `in_proj_qkv`, `in_proj_z`, `in_proj_b`, `in_proj_a` (Qwen3.5), or
    `packed` as `in_proj_qkvz` and `in_proj_ba`, interleaved per key head (Qwen3-Next).
    """

    hidden: int
    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int
    taps: int
    """Kernel size of the convolution."""
    eps: float
    packed: bool = False

    @property
    def keys(self) -> int:
        """Channels of all queries, or of all keys."""
        return self.key_heads * self.key_dim

    @property
    def values(self) -> int:
        """Channels of all values."""
        return self.value_heads * self.value_dim

    @property
    def channels(self) -> int:
        """M, the channels that are convolved."""
        return 2 * self.keys + self.values

    def spec(self) -> Recurrent:
        """Remember one [N, D] state per value head and the last taps - 1 inputs of the convolution."""
        return Recurrent(
            rule="gdn",
            sizes=(
                ("key_heads", self.key_heads),
                ("value_heads", self.value_heads),
                ("key_dim", self.key_dim),
                ("value_dim", self.value_dim),
                ("taps", self.taps),
            ),
            state=(
                Slab("state", (self.value_heads, self.key_dim, self.value_dim), "float32"),
                Slab("conv", (self.channels, self.taps - 1), "model"),
            ),
            log=(
                Slab("conv", (self.channels,), "model"),
                Slab("beta", (self.value_heads,), "float32"),
                Slab("decay", (self.value_heads,), "float32"),
            ),
        )

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        if self.packed:
            maps = {"in_proj_qkvz": self.channels + self.values, "in_proj_ba": 2 * self.value_heads}
        else:
            maps = {"in_proj_qkv": self.channels, "in_proj_z": self.values}
            maps |= {"in_proj_b": self.value_heads, "in_proj_a": self.value_heads}
        shapes: Shapes = {f"{prefix}{name}.weight": (rows, self.hidden) for name, rows in maps.items()}
        return {
            **shapes,
            f"{prefix}conv1d.weight": (self.channels, 1, self.taps),
            f"{prefix}A_log": (self.value_heads,),
            f"{prefix}dt_bias": (self.value_heads,),
            f"{prefix}norm.weight": (self.value_dim,),
            **linear_shapes(f"{prefix}out_proj", self.hidden, self.values),
        }

    @property
    def live(self) -> Live:
        """Products and gates; then convolved channels, and what chunks of a long row read, write and fade by."""
        products, heads = self.channels + self.values + 2 * self.value_heads, self.value_heads
        chunks = heads * (self.key_dim + self.value_dim + 2)
        return Live(products + self.values, 4 * heads + self.channels + self.values + chunks, places=True)

    def build(self, weights: Weights, prefix: str) -> GatedDeltaNet:
        """Compose the mixer from its tensors."""
        if self.packed:
            qkvz, ba = weights.take(f"{prefix}in_proj_qkvz.weight"), weights.take(f"{prefix}in_proj_ba.weight")
            inputs = weights.ops.matrix([Part(self._unpacked(qkvz, ba))])
        else:
            inputs = weights.linear(*(f"{prefix}in_proj_{name}" for name in ("qkv", "z", "b", "a")))
        return GatedDeltaNet(self, inputs, weights, prefix)

    def _unpacked(self, qkvz: torch.Tensor, ba: torch.Tensor) -> torch.Tensor:
        """Sort the interleaved rows once: per key head [q, k, its values, its gates] and [its b, its a]."""
        group = self.value_heads // self.key_heads
        sizes = [self.key_dim, self.key_dim, group * self.value_dim, group * self.value_dim]
        parts = torch.split(qkvz.view(self.key_heads, -1, self.hidden), sizes, 1)
        parts += torch.split(ba.view(self.key_heads, -1, self.hidden), group, 1)
        return torch.cat([part.flatten(0, 1) for part in parts])


class GatedDeltaNet:
    """Linear attention that forgets by `decay` and overwrites by `beta`."""

    def __init__(self, shape: GdnShape, inputs: Matrix, weights: Weights, prefix: str) -> None:
        """Take the map to qkv, z (the output gate), b (for beta) and a (for the decay), side by side."""
        self.shape = shape
        self.ops = weights.ops
        self.inputs = inputs
        self.taps = {"conv": weights.take(f"{prefix}conv1d.weight").squeeze(1)}
        self.rate_H = -weights.take(f"{prefix}A_log").float().exp()
        self.dt_bias_H = weights.take(f"{prefix}dt_bias").float()
        self.norm_D = weights.take(f"{prefix}norm.weight").float()
        self.out = weights.linear(f"{prefix}out_proj")

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C]; the recurrence knows the order of tokens, so `angles` do not enter."""
        del angles
        shape = self.shape
        sizes = [shape.channels, shape.values, shape.value_heads, shape.value_heads]
        qkv_TM, gate_TV, b_TH, a_TH = torch.split_with_sizes(self.inputs(x_TC), sizes, -1)
        beta_TH, decay_TH = self.ops.delta_gates(b_TH, a_TH, self.dt_bias_H, self.rate_H)
        inputs = {"conv": qkv_TM, "beta": beta_TH, "decay": decay_TH}
        out_THD = cast("StateMemory", memory).scan(inputs, self.taps, step)
        return self.out(self.ops.gated_norm(out_THD, gate_TV, self.norm_D, shape.eps, gate_first=False))
