"""Mamba-2 mixer (Dao and Gu 2024): a gated state space model with one decay per head.

Shapes: T tokens, C hidden size, H heads, P head dim, G groups, N state dim, K conv taps,
I = H P inner size, D = I + 2 G N channels of the convolution (x, B and C side by side).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.spec import Recurrent, Slab
from truekv.models.blocks import Linear, Shapes, linear, linear_shapes, rms_normalised

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step
    from truekv.core.config import Config
    from truekv.core.protocols import LayerMemory, StateMemory
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

    def build(self, weights: Mapping[str, torch.Tensor], prefix: str) -> Mamba2:
        """Compose the layer from its tensors."""
        scan = {
            "conv": weights[f"{prefix}conv1d.weight"][:, 0].contiguous(),
            "A": -weights[f"{prefix}A_log"].float().exp(),
            "D": weights[f"{prefix}D"].float(),
        }
        if self.conv_bias:
            scan["conv_bias"] = weights[f"{prefix}conv1d.bias"]
        norm = GatedGroupNorm(weights[f"{prefix}norm.weight"], self.groups, self.eps)
        into, out = linear(weights, f"{prefix}in_proj"), linear(weights, f"{prefix}out_proj")
        return Mamba2(self, into, weights[f"{prefix}dt_bias"], scan, norm, out)


class GatedGroupNorm:
    """rms_norm of y * silu(z), each of G groups of channels by its own rms, times a weight."""

    def __init__(self, weight: torch.Tensor, groups: int, eps: float) -> None:
        """`weight` is [I]."""
        self.weight = weight.float()
        self.groups = groups
        self.eps = eps

    def __call__(self, y_TI: torch.Tensor, gate_TI: torch.Tensor) -> torch.Tensor:
        """Gate and normalise [T, I] in float32; the result stays float32."""
        gated_TI = y_TI.float() * torch.nn.functional.silu(gate_TI.float())
        return rms_normalised(gated_TI.view(len(gated_TI), self.groups, -1), self.eps).flatten(1) * self.weight


class Mamba2:
    """One Mamba-2 layer; the convolution and the recurrence are the memory's, which holds their state."""

    def __init__(
        self,
        shape: Mamba2Shape,
        into: Linear,
        dt_bias: torch.Tensor,
        scan: Mapping[str, torch.Tensor],
        norm: GatedGroupNorm,
        out: Linear,
    ) -> None:
        """`into` maps C -> I + D + H; `scan` holds the rule's weights (conv, conv_bias, A, D)."""
        self.shape = shape
        self.into = into
        self.dt_bias = dt_bias.float()
        self.scan = scan
        self.norm = norm
        self.out = out

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C]; a recurrence needs no rotary positions."""
        del angles
        shape = self.shape
        gate_TI, conv_TD, dt_TH = torch.split(self.into(x_TC), [shape.inner, shape.channels, shape.heads], -1)
        dt_TH = torch.nn.functional.softplus(dt_TH.float() + self.dt_bias).clamp(*shape.limits)
        y_THP = cast("StateMemory", memory).scan({"conv": conv_TD, "dt": dt_TH}, self.scan, step)
        return self.out(self.norm(y_THP.flatten(1), gate_TI).to(x_TC.dtype))


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
