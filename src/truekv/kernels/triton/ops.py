"""Linear maps by torch's own products (cuBLAS), all else by Triton: norms, gates, routers, experts, greedy tokens.

Unlike the native kernels', the last bits of a product's row may depend on how many rows there are.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final

from truekv.core.lazy import torch
from truekv.kernels.reference.ops import ReferenceMatrix, ReferenceOps
from truekv.kernels.triton import rows
from truekv.kernels.triton.experts import TritonExperts
from truekv.kernels.triton.largest import best, largest
from truekv.kernels.triton.router import route

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from truekv.core.ops import Activation, Expert, Experts, Matrix, Ops, Part


class TritonOps:
    """Every operation of core/ops.py."""

    apart: ClassVar[bool] = True

    def __init__(self) -> None:
        """Take what is fast enough in torch from the reference."""
        reference = ReferenceOps()
        self.head_matrices = reference.head_matrices
        self.angles = reference.angles
        self.finite = reference.finite

    def matrix(self, parts: Seq[Part]) -> Matrix:
        """Join the parts, so that there is one product."""
        if len(parts) == 1:
            return ReferenceMatrix(parts)
        joined = torch.cat([part.weight for part in parts])
        if any(part.bias is not None for part in parts):
            zeros = [part.weight.new_zeros(len(part.weight)) if part.bias is None else part.bias for part in parts]
            return ReferenceMatrix([type(parts[0])(joined, torch.cat(zeros))])
        return ReferenceMatrix([type(parts[0])(joined)])

    def experts(self, count: int, experts: Iterable[Expert], activation: Activation) -> Experts:
        """Stack the experts."""
        return TritonExperts(count, experts, activation)

    rms_norm = staticmethod(rows.rms_norm)
    add_norm = staticmethod(rows.add_norm)
    gated_norm = staticmethod(rows.gated_norm)
    activate = staticmethod(rows.activate)
    gate = staticmethod(rows.gate)
    softplus = staticmethod(rows.softplus)
    delta_gates = staticmethod(rows.delta_gates)
    norm_rotate = staticmethod(rows.norm_rotate)
    largest = staticmethod(largest)
    best = staticmethod(best)
    route = staticmethod(route)


OPS: Final[Ops] = TritonOps()
