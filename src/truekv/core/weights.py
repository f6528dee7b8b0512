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

    Kernels keep large weights in a layout of their own. `take` and `linear` ask for a tensor and keep nothing of
    it, so that a model needs little more memory while it is built than after: tensors may be read when asked for.
    """

    def __init__(self, tensors: Mapping[str, torch.Tensor], ops: Ops, device: torch.device | None = None) -> None:
        """Offer every tensor until it is taken; `device`: where they lie, that of the first one if it is not given."""
        self._tensors = tensors
        self._left = dict.fromkeys(tensors)
        self.ops = ops
        self.device = next(iter(tensors.values())).device if device is None else device
        """Where they lie, all of them."""

    def __getitem__(self, name: str) -> torch.Tensor:
        """Look a tensor up and leave it here; a KeyError if it is not, or no longer, here."""
        if name not in self._left:
            raise KeyError(name)
        return self._tensors[name]

    def __contains__(self, name: object) -> bool:
        """Whether a tensor is still here; reads nothing."""
        return name in self._left

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names of the tensors that are still here."""
        return iter(self._left)

    def __len__(self) -> int:
        """Count the tensors that are still here."""
        return len(self._left)

    def take(self, name: str) -> torch.Tensor:
        """Remove a tensor and return it."""
        tensor = self[name]
        del self._left[name]
        return tensor

    def linear(self, *names: str) -> Matrix:
        """Take `name.weight`, and `name.bias` where the checkpoint has one; several names make one map."""
        return self.ops.matrix(
            [
                Part(self.take(f"{name}.weight"), self.take(bias) if (bias := f"{name}.bias") in self else None)
                for name in names
            ]
        )
