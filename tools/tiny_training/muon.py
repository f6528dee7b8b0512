"""Muon: momentum whose update is made orthogonal (Jordan et al., 2024), for hidden matrices."""

from collections import defaultdict
from collections.abc import Iterable
from typing import Final

import torch
from torch import Tensor, nn

NEWTON_SCHULZ: Final = (3.4445, -4.7750, 2.0315)
ITERATIONS: Final = 5


def orthogonalise(matrices: Tensor) -> Tensor:
    """Push the singular values of a batch of matrices towards one, by a quintic Newton-Schulz iteration."""
    a, b, c = NEWTON_SCHULZ
    x = matrices
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon:
    """Nesterov momentum with orthogonal updates; matrices of one shape are treated together."""

    def __init__(self, parameters: Iterable[nn.Parameter], momentum: float = 0.95, decay: float = 0.0) -> None:
        """Group the parameters by shape; a parameter of three dimensions is a stack of matrices."""
        self._momentum, self._decay = momentum, decay
        self._groups: dict[tuple[int, ...], list[nn.Parameter]] = defaultdict(list)
        for parameter in parameters:
            self._groups[tuple(parameter.shape)].append(parameter)
        self._buffers = {shape: torch.zeros(len(group), *shape) for shape, group in self._groups.items()}

    @torch.no_grad()
    def step(self, learning_rate: float) -> None:
        """Update every parameter from its gradient."""
        for shape, group in self._groups.items():
            gradient = torch.stack([torch.zeros_like(p) if p.grad is None else p.grad for p in group])
            buffer = self._buffers[shape].lerp_(gradient, 1 - self._momentum)
            update = orthogonalise(gradient.lerp(buffer, self._momentum))
            scale = learning_rate * max(1.0, shape[-2] / shape[-1]) ** 0.5
            for parameter, delta in zip(group, update, strict=True):
                parameter.mul_(1 - learning_rate * self._decay).sub_(delta, alpha=scale)
