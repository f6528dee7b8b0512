"""The tensors of a checkpoint on their way into a model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from truekv.core.ops import Part

if TYPE_CHECKING:
    from truekv.core.lazy import torch
    from truekv.core.ops import Matrix, Ops


class Weights(Mapping[str, "torch.Tensor"]):
    """Tensors by name, and the operations that will run on them.

    Kernels keep large weights in a layout of their own. `take` and `linear` let go of the original,
    so that a model needs little more memory while it is built than after.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: Ops) -> None:
        """Hold every tensor until it is taken."""
        self._tensors = dict(tensors)
        self.ops = ops
        self.device = next(iter(self._tensors.values())).device
        """Where they lie, all of them."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Look a tensor up and leave it here; a KeyError if it is not, or no longer, here."""
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors that are still here."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Count the tensors that are still here."""
        return len(self._tensors)

    def take(self, name: str) -> torch.Tensor:
        """Remove a tensor and return it."""
        return self._tensors.pop(name)

    def linear(self, *names: str) -> Matrix:
        """Take `name.weight`, and `name.bias` where the checkpoint has one; several names make one map."""
        return self.ops.matrix(
            [Part(self.take(f"{name}.weight"), self._tensors.pop(f"{name}.bias", None)) for name in names]
        )
