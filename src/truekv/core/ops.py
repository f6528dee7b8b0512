"""What a model computes between its memories: the seam between families and kernels.

Shapes: T tokens, H heads, D head size, P rotary planes, E experts, K experts per token, C, I features.
Every operation computes in float32 and rounds once, to the dtype of its input where nothing else is
said. A row of a result depends on nothing but the same row of the input, down to the last bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from truekv.core.lazy import torch

Activation = Literal["swiglu", "relu2"]
"""swiglu: silu of the first half times the second half. relu2: max(x, 0) squared."""


class Part(NamedTuple):
    """One linear map of a checkpoint: `weight` [out, in] and `bias` [out]."""

    weight: torch.Tensor
    bias: torch.Tensor | None = None


class Expert(NamedTuple):
    """One routed expert: the map into its inner space (gate before up, one tensor or two), and out of it."""

    first: tuple[torch.Tensor, ...]
    down: torch.Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """How a token chooses its experts.

    "softmax": probabilities; a group scores its best expert (DeepSeek-V2's group_limited_greedy).
    "sigmoid": independent scores, chosen with a correction bias that does not weigh; a group
    scores its best two (DeepSeek-V3's noaux_tc).
    """

    experts: int
    per_token: int
    score: Literal["softmax", "sigmoid"] = "softmax"
    normalised: bool = True
    """Whether the chosen weights are divided by their sum."""
    scale: float = 1.0
    groups: int = 1
    kept_groups: int = 1
    """Only experts of the best `kept_groups` of `groups` groups may be chosen."""
    float32_logits: bool = True
    """Whether the router's product is taken in float32, or in the model's dtype and then widened."""


class Matrix(Protocol):
    """A linear map as its kernels want it stored; the only copy of its weight."""

    def __call__(self, x: torch.Tensor, *, widened: bool = False) -> torch.Tensor:
        """Map [T, in] to [T, out] in x's dtype, which is the weight's; `widened`: to float32."""
        ...

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return the weight's rows [N, in] of int64 `indices` [N]: what an embedding is."""
        ...


class HeadMatrices(Protocol):
    """One linear map per head."""

    def __call__(self, x_THI: torch.Tensor) -> torch.Tensor:
        """Map [T, H, in] to [T, H, out]."""
        ...


class Experts(Protocol):
    """The routed experts of one layer."""

    def __call__(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Sum each token's chosen experts, times their weights: [T, C]."""
        ...


class Ops(Protocol):
    """What a backend offers: `ops.py` of its folder, under the name OPS."""

    apart: ClassVar[bool]
    """Whether numbers lie where copying them to the host costs more than choosing which."""

    def matrix(self, parts: Seq[Part]) -> Matrix:
        """Make one map of several of the same input, their outputs side by side."""
        ...

    def head_matrices(self, weight_HOI: torch.Tensor) -> HeadMatrices:
        """Make one map [in -> out] per head."""
        ...

    def experts(self, count: int, experts: Iterable[Expert], activation: Activation) -> Experts:
        """Take `count` experts, one after the other, so that no second copy of all of them is needed."""
        ...

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
        """X / sqrt(mean(x^2) + eps) * gain over the last dimension; `gain` is float32 [D]."""
        ...

    def add_norm(
        self, x: torch.Tensor, change: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + change, and rms_norm of that as it was rounded, for [T, C] of one dtype."""
        ...

    def gated_norm(
        self, x: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, gate_first: bool
    ) -> torch.Tensor:
        """rms_norm(x) * silu(gate), or rms_norm(x * silu(gate)): float32 [T, H, D] to gate's dtype [T, H * D].

        Each of the H rows has its own rms. `gate` is [T, H * D]; `gain` is float32 [D] or [H * D].
        """
        ...

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Apply an activation: [T, 2 I] or [T, I] to [T, I]."""
        ...

    def gate(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """X * sigmoid(by), in by's dtype, for x [T, H, D] and by [T, H, D], or [T, H, 1] for all D alike."""
        ...

    def softplus(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """log(1 + exp(x + bias)) in float32, for x [T, H] and float32 bias [H]."""
        ...

    def delta_gates(
        self, b: torch.Tensor, a: torch.Tensor, bias: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """sigmoid(b) and rate * softplus(a + bias): what a delta rule writes with, and what it forgets by.

        Both float32 [T, H], for a and b [T, H] of one dtype and float32 bias and rate [H].
        """
        ...

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, amplitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of position times frequency, times the amplitude: float32 [T, P] each."""
        ...

    def norm_rotate(
        self,
        heads: Seq[torch.Tensor],
        gains: Seq[torch.Tensor | None],
        eps: float,
        cos: torch.Tensor,
        sin: torch.Tensor,
        *,
        interleaved: bool,
    ) -> tuple[torch.Tensor, ...]:
        """Turn the first 2 P dimensions of one or two tensors [T, H, D], each of its own H and with a gain or without.

        What has a gain is first normed, to the very numbers of rms_norm. Interleaved planes come out as halves: queries
        and keys share the layout, so their products do not depend on it.
        """
        ...

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose experts by float32 logits [T, E]: their weights, float32 [T, K], and indices, int64 [T, K]."""
        ...

    def finite(self, *parts: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
        """Whether every number of one to four tensors [T, ...], or of their rows of int64 indices [N], is finite."""
        ...

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Where the largest number of each row of [N, D] is, of equal ones the first; -1 where one is not finite."""
        ...

    def best(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the `count` largest numbers of each row of [N, D], and their places, int64: [N, count] each.

        The largest first, of equal ones the first. Of a row with a number that is not finite any numbers and places.
        """
        ...
