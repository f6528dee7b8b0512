"""Mamba-2 mixer (Dao and Gu 2024): a gated state space model with one decay per head.

Shapes: T tokens, C hidden size, H heads, P head dim, G groups, N state dim, K conv taps,
I = H P inner size, D = I + 2 G N channels of the convolution (x, B and C side by side).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.spec import Live, Recurrent, Slab
from truekv.models.blocks import Shapes, linear_shapes

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step
    from truekv.core.config import Config
    from truekv.core.ops import Matrix, Ops
    from truekv.core.protocols import LayerMemory, StateMemory
    from truekv.core.weights import Weights
    from truekv.models.rotary import Angles


@dataclass(frozen=True, slots=True)
class Mamba2Shape:
    """Sizes of one Mamba-2 layer, before any weight is read."""

    hidden: int
    heads: int
    head_dim: int
    groups: int
    state: int
    kernel: int
    eps: float
    limits: tuple[float, float]
    """Every time step dt is clamped to this range."""
    bias: bool = False
    """Whether the maps out of and back into the residual have a bias."""
    conv_bias: bool = True

    @property
    def inner(self) -> int:
        """I, the width of the mixer's output before the last map."""
        return self.heads * self.head_dim

    @property
    def channels(self) -> int:
        """D, what the convolution runs over."""
        return self.inner + 2 * self.groups * self.state

    def spec(self) -> Recurrent:
        """Remember the state space and the convolution's window; a token replays from its channels and dt."""
        return Recurrent(
            rule="mamba2",
            sizes=(
                ("heads", self.heads),
                ("head_dim", self.head_dim),
                ("groups", self.groups),
                ("state", self.state),
                ("kernel", self.kernel),
            ),
            state=(
                Slab("state", (self.heads, self.head_dim, self.state), "float32"),
                Slab("conv", (self.channels, self.kernel - 1), "model"),
            ),
            log=(Slab("conv", (self.channels,), "model"), Slab("dt", (self.heads,), "float32")),
        )

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        shapes: Shapes = {
            **linear_shapes(f"{prefix}in_proj", self.inner + self.channels + self.heads, self.hidden, bias=self.bias),
            f"{prefix}conv1d.weight": (self.channels, 1, self.kernel),
            f"{prefix}dt_bias": (self.heads,),
            f"{prefix}A_log": (self.heads,),
            f"{prefix}D": (self.heads,),
            f"{prefix}norm.weight": (self.inner,),
            **linear_shapes(f"{prefix}out_proj", self.hidden, self.inner, bias=self.bias),
        }
        return shapes | {f"{prefix}conv1d.bias": (self.channels,)} if self.conv_bias else shapes

    @property
    def live(self) -> Live:
        """Products and time steps; then convolved channels and what is read of the state."""
        products = self.inner + self.channels + self.heads
        return Live(products + self.inner, 4 * self.heads + self.channels + self.inner, places=True)

    def build(self, weights: Weights, prefix: str) -> Mamba2:
        """Compose the layer from its tensors."""
        scan = {
            "conv": weights.take(f"{prefix}conv1d.weight")[:, 0].contiguous(),
            "A": -weights.take(f"{prefix}A_log").float().exp(),
            "D": weights.take(f"{prefix}D").float(),
        }
        if self.conv_bias:
            scan["conv_bias"] = weights.take(f"{prefix}conv1d.bias")
        vectors = weights.take(f"{prefix}dt_bias").float(), weights.take(f"{prefix}norm.weight").float()
        into, out = weights.linear(f"{prefix}in_proj"), weights.linear(f"{prefix}out_proj")
        return Mamba2(self, weights.ops, into, scan, vectors, out)


class Mamba2:
    """One Mamba-2 layer; the convolution and the recurrence are the memory's, which holds their state."""

    def __init__(
        self,
        shape: Mamba2Shape,
        ops: Ops,
        into: Matrix,
        scan: Mapping[str, torch.Tensor],
        vectors: tuple[torch.Tensor, torch.Tensor],
        out: Matrix,
    ) -> None:
        """`into` maps C -> I + D + H; `scan` holds the rule's weights (conv, conv_bias, A, D).

        `vectors` are the bias of the time steps [H] and the weight of the norm [I].
        """
        self.shape = shape
        self.ops = ops
        self.into = into
        self.scan = scan
        self.dt_bias, self.norm = vectors
        self.out = out

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C]; a recurrence needs no rotary positions."""
        del angles
        shape = self.shape
        gate_TI, conv_TD, dt_TH = torch.split_with_sizes(
            self.into(x_TC), [shape.inner, shape.channels, shape.heads], -1
        )
        dt_TH = self.ops.softplus(dt_TH, self.dt_bias)
        # What softplus returns is not negative as it is.
        if shape.limits != (0.0, math.inf):
            dt_TH = dt_TH.clamp(*shape.limits)
        y_THP = cast("StateMemory", memory).scan({"conv": conv_TD, "dt": dt_TH}, self.scan, step)
        # Each of G groups of channels has its own rms, whatever heads it takes from.
        y_TGd = y_THP.reshape(len(y_THP), shape.groups, -1)
        return self.out(self.ops.gated_norm(y_TGd, gate_TI, self.norm, shape.eps, gate_first=True))


def read_time_limits(config: Config, name: str) -> tuple[float, float]:
    """Read a [low, high] pair of time steps; transformers writes infinity as {"__float__": "Infinity"}."""
    pair = config.get(name, [0.0, float("inf")])
    numbers = [
        float("inf") if item == {"__float__": "Infinity"} else item
        for item in cast("list[object]", pair if isinstance(pair, list | tuple) else [])
        if not isinstance(item, bool)
    ]
    match numbers:
        case [int() | float() as low, int() | float() as high] if 0.0 <= low < high:
            return float(low), float(high)
        case _:
            raise Refused(f"{config.where}: '{name}' is {pair!r}, but must be two time steps, the lower one first")


def checked(config: Config, shape: Mamba2Shape) -> Mamba2Shape:
    """Refuse sizes that no Mamba-2 layer can have."""
    if shape.heads % shape.groups:
        raise Refused(f"{config.where}: {shape.heads} Mamba heads cannot be shared out to {shape.groups} groups")
    if shape.kernel < 2:
        raise Refused(
            f"{config.where}: a Mamba convolution of {shape.kernel} tap is not implemented; it needs 2 or more"
        )
    return shape
