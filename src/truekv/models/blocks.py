"""What every family is made of: linear maps, RMS norms, the embedding and the output head.

Shapes: T tokens of a step, C hidden size, V vocabulary. Linear maps run in the model's dtype;
norms compute in float32 and round once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

Shapes = dict[str, tuple[int, ...]]
"""Tensor names of a checkpoint and their shapes."""


class Linear:
    """y = x W^T + b, in the dtype of the weight."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` is [out, in] and `bias` [out], as checkpoints store them."""
        self.weight = weight
        self.bias = bias

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Map [..., in] to [..., out]."""
        return torch.nn.functional.linear(x, self.weight, self.bias)


def linear(weights: Mapping[str, torch.Tensor], name: str) -> Linear:
    """Take `name.weight`, and `name.bias` where the checkpoint has one."""
    return Linear(weights[f"{name}.weight"], weights.get(f"{name}.bias"))


def linear_shapes(name: str, out: int, into: int, *, bias: bool = False) -> Shapes:
    """Tensors of one linear map from `into` to `out` features."""
    shapes: Shapes = {f"{name}.weight": (out, into)}
    return shapes | {f"{name}.bias": (out,)} if bias else shapes


class RMSNorm:
    """x / rms(x) * w over the last dimension; zero-centred checkpoints store w - 1."""

    def __init__(self, weight: torch.Tensor, eps: float, *, zero_centred: bool = False) -> None:
        """`weight` is [dim]; it is kept in float32, so that 1 + w loses nothing to bfloat16."""
        self.weight = weight.float() + 1.0 if zero_centred else weight.float()
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., dim] in float32 and return x's dtype."""
        return rms_normalised(x, self.eps).mul_(self.weight).to(x.dtype)


def rms_normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension, a new float32 tensor."""
    x32 = x.float()
    return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)


class Embedding:
    """Token rows, optionally scaled (Granite's embedding multiplier)."""

    def __init__(self, weight: torch.Tensor, scale: float = 1.0) -> None:
        """`weight` is [V, C]."""
        self.weight = weight
        self.scale = scale

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up [T] token ids: [T, C]."""
        rows_TC = torch.nn.functional.embedding(tokens, self.weight)
        return rows_TC if self.scale == 1.0 else rows_TC * self.scale


class Head:
    """The final norm and the output map, tied to the embedding or not."""

    def __init__(self, norm: RMSNorm, weight: torch.Tensor, scale: float = 1.0) -> None:
        """`weight` is [V, C]; logits are multiplied by `scale`."""
        self.norm = norm
        self.weight = weight
        self.scale = scale

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the last residual [N, C] to float32 logits [N, V]."""
        logits_NV = torch.nn.functional.linear(self.norm(hidden), self.weight).float()
        return logits_NV if self.scale == 1.0 else logits_NV * self.scale
