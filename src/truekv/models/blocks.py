"""What every family is made of: RMS norms, the embedding and the output head.

Shapes: T tokens of a step, C hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truekv.core.lazy import torch
    from truekv.core.ops import Matrix, Ops
    from truekv.core.weights import Weights

Shapes = dict[str, tuple[int, ...]]
"""Tensor names of a checkpoint and their shapes."""


def linear_shapes(name: str, out: int, into: int, *, bias: bool = False) -> Shapes:
    """Tensors of one linear map from `into` to `out` features."""
    shapes: Shapes = {f"{name}.weight": (out, into)}
    return shapes | {f"{name}.bias": (out,)} if bias else shapes


def tile_columns(dim: int) -> int:
    """Most numbers that a kernel takes for a row of `dim`: a power of two."""
    return max(32, 1 << (dim - 1).bit_length())


class RMSNorm:
    """x / rms(x) * w over the last dimension; zero-centred checkpoints store w - 1."""

    def __init__(self, ops: Ops, weight: torch.Tensor, eps: float, *, zero_centred: bool = False) -> None:
        """`weight` is [dim]; it is kept in float32, so that 1 + w loses nothing to bfloat16."""
        self.ops = ops
        self.weight = weight.float() + 1.0 if zero_centred else weight.float()
        self.eps = eps

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise [..., dim] in float32 and return x's dtype."""
        return self.ops.rms_norm(x, self.weight, self.eps)

    def after(self, x_TC: torch.Tensor, change_TC: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Add a change to the residual, if there is one yet; return both it and its norm."""
        if change_TC is None:
            return x_TC, self(x_TC)
        return self.ops.add_norm(x_TC, change_TC, self.weight, self.eps)


def norm(weights: Weights, name: str, eps: float, *, zero_centred: bool = False) -> RMSNorm:
    """Take `name.weight`."""
    return RMSNorm(weights.ops, weights.take(f"{name}.weight"), eps, zero_centred=zero_centred)


class Embedding:
    """Token rows, optionally scaled (Granite's embedding multiplier)."""

    def __init__(self, matrix: Matrix, scale: float = 1.0) -> None:
        """`matrix` maps C -> V; its rows are the embedding."""
        self.matrix = matrix
        self.scale = scale

    def __call__(self, tokens: torch.Tensor) -> torch.Tensor:
        """Look up [T] token ids: [T, C]."""
        rows_TC = self.matrix.rows(tokens)
        return rows_TC if self.scale == 1.0 else rows_TC * self.scale


class Head:
    """The final norm and the output map, tied to the embedding or not."""

    def __init__(self, norm: RMSNorm, matrix: Matrix, scale: float = 1.0) -> None:
        """`matrix` maps C -> V; logits are multiplied by `scale`."""
        self.norm = norm
        self.matrix = matrix
        self.scale = scale

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the last residual [N, C] to float32 logits [N, V]."""
        logits_NV = self.matrix(self.norm(hidden), widened=True)
        return logits_NV if self.scale == 1.0 else logits_NV * self.scale
