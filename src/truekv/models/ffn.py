"""Feed-forward blocks: gated and plain MLPs, and mixtures of experts with the routers in use.

Shapes: T tokens, C hidden size, I inner size, E experts, K experts per token, G expert groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, Protocol

from truekv.core.ops import Expert, Part
from truekv.core.spec import Live
from truekv.models.blocks import Shapes, linear_shapes

if TYPE_CHECKING:
    from collections.abc import Iterator

    from truekv.core.lazy import torch
    from truekv.core.ops import Activation, Experts, Matrix, Ops, Routing
    from truekv.core.weights import Weights


class FeedForward(Protocol):
    """Anything that maps each token on its own."""

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Map [T, C] to [T, C]."""
        ...


class MLP:
    """down(silu(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    def __init__(self, ops: Ops, first: Matrix, down: Matrix, activation: Activation = "swiglu") -> None:
        """`first` maps C -> I, or to the gate and up side by side, C -> 2 I; `down` maps I -> C."""
        self.ops = ops
        self.first = first
        self.down = down
        self.activation: Activation = activation

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Map [T, C] to [T, C] in x's dtype."""
        return self.down(self.ops.activate(self.first(x_TC), self.activation))


@dataclass(frozen=True, slots=True)
class MlpShape:
    """Sizes and tensors of an MLP: `gate_proj` (if gated), `up_proj`, `down_proj`."""

    hidden: int
    inner: int
    activation: Activation = "swiglu"
    bias: bool = False

    @property
    def first(self) -> tuple[str, ...]:
        """Names of the maps into the inner space, in the order in which the activation takes them."""
        return ("gate_proj", "up_proj") if self.activation == "swiglu" else ("up_proj",)

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        shapes = linear_shapes(f"{prefix}down_proj", self.hidden, self.inner, bias=self.bias)
        for name in self.first:
            shapes |= linear_shapes(f"{prefix}{name}", self.inner, self.hidden, bias=self.bias)
        return shapes

    @property
    def live(self) -> Live:
        """What the maps into the inner space give, side by side, and the activation's."""
        return Live((len(self.first) + 1) * self.inner, 0)

    def build(self, weights: Weights, prefix: str) -> MLP:
        """Compose the MLP from its tensors."""
        first = weights.linear(*(f"{prefix}{name}" for name in self.first))
        return MLP(weights.ops, first, weights.linear(f"{prefix}down_proj"), self.activation)


class Router:
    """Scores the experts of each token in float32 and keeps the best."""

    def __init__(self, ops: Ops, routing: Routing, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` is [E, C]; `bias` [E] corrects the choice, not the weights."""
        self.ops = ops
        self.routing = routing
        self.matrix = ops.matrix([Part(weight.float() if routing.float32_logits else weight)])
        self.bias = None if bias is None else bias.float()

    def __call__(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen experts' weights, float32 [T, K], and their indices [T, K]."""
        logits_TE = self.matrix(x_TC.float() if self.routing.float32_logits else x_TC).float()
        return self.ops.route(logits_TE, self.bias, self.routing)


class MoE:
    """Routed experts, and optionally a shared expert (with or without a gate of its own)."""

    def __init__(
        self,
        router: Router,
        experts: Experts,
        shared: FeedForward | None = None,
        shared_gate: Matrix | None = None,
        latent: tuple[Matrix, Matrix] | None = None,
    ) -> None:
        """`shared_gate` maps C -> 1; `latent` maps into and out of the space the experts work in."""
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate
        self.latent = latent

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Map [T, C] to [T, C]."""
        weights_TK, chosen_TK = self.router(x_TC)
        routed_TC = self.experts(x_TC if self.latent is None else self.latent[0](x_TC), weights_TK, chosen_TK)
        if self.latent is not None:
            routed_TC = self.latent[1](routed_TC)
        if self.shared is None:
            return routed_TC
        shared_TC = self.shared(x_TC)
        if self.shared_gate is not None:
            shared_TC = self.router.ops.gate(shared_TC[:, None], self.shared_gate(x_TC)[:, None])[:, 0]
        return routed_TC + shared_TC


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Sizes and tensors of a mixture: `gate`, `experts`, and a shared expert under `shared_name`.

    Checkpoints hold the experts one by one (`experts.0.gate_proj.weight`) or fused
    (`experts.gate_up_proj` [E, 2I, C], `experts.down_proj` [E, C, I]); `build` takes either.
    """

    routing: Routing
    hidden: int
    inner: int
    activation: Activation = "swiglu"
    shared_inner: int = 0
    """Inner size of the shared expert; 0: there is none."""
    shared_name: str = "shared_expert"
    shared_gate: bool = False
    """Whether `shared_expert_gate` weighs the shared expert."""
    correction: str = ""
    """Name of the correction bias under `gate.`; empty: there is none."""
    latent: int = 0
    """Size of the space the experts work in (Nemotron's latent MoE); 0: the hidden size."""

    @property
    def expert(self) -> MlpShape:
        """One routed expert."""
        return MlpShape(self.latent or self.hidden, self.inner, self.activation)

    @property
    def shared(self) -> MlpShape:
        """The shared expert."""
        return MlpShape(self.hidden, self.shared_inner, self.activation)

    def tensors(self, prefix: str, *, fused: bool = False) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes, in either layout."""
        count, width = self.routing.experts, self.latent or self.hidden
        shapes: Shapes = {f"{prefix}gate.weight": (count, self.hidden)}
        if self.correction:
            shapes[f"{prefix}gate.{self.correction}"] = (count,)
        if fused:
            maps = len(self.expert.first)
            shapes[f"{prefix}experts.{_FUSED[maps]}"] = (count, self.inner * maps, width)
            shapes[f"{prefix}experts.down_proj"] = (count, width, self.inner)
        else:
            for index in range(count):
                shapes |= self.expert.tensors(f"{prefix}experts.{index}.")
        if self.shared_inner:
            shapes |= self.shared.tensors(f"{prefix}{self.shared_name}.")
        if self.shared_gate:
            shapes |= linear_shapes(f"{prefix}shared_expert_gate", 1, self.hidden)
        if self.latent:
            shapes |= linear_shapes(f"{prefix}fc1_latent_proj", self.latent, self.hidden)
            shapes |= linear_shapes(f"{prefix}fc2_latent_proj", self.hidden, self.latent)
        return shapes

    @property
    def live(self) -> Live:
        """The router's scores, then one inner row for each expert of a token; the shared expert comes after both."""
        count, each, width = self.routing.experts, self.routing.per_token, self.latent or self.hidden
        # Choices are 64-bit indices: sorted, with the sort's own memory, and cut into tiles.
        scores, choice = 6 * count + self.hidden, 40 * each
        routed = each * self.expert.live.model + 2 * width
        shared = self.shared.live.model + 2 * self.hidden
        return Live(max(routed, shared) + self.hidden + width, scores + choice + 2 * each * width + width)

    def build(self, weights: Weights, prefix: str) -> MoE:
        """Compose the mixture from its tensors, in the layout they have."""
        bias = weights.take(f"{prefix}gate.{self.correction}") if self.correction else None
        latent = None
        if self.latent:
            latent = weights.linear(f"{prefix}fc1_latent_proj"), weights.linear(f"{prefix}fc2_latent_proj")
        return MoE(
            Router(weights.ops, self.routing, weights.take(f"{prefix}gate.weight"), bias),
            weights.ops.experts(self.routing.experts, self._experts(weights, f"{prefix}experts."), self.activation),
            self.shared.build(weights, f"{prefix}{self.shared_name}.") if self.shared_inner else None,
            weights.linear(f"{prefix}shared_expert_gate") if self.shared_gate else None,
            latent,
        )

    def _experts(self, weights: Weights, prefix: str) -> Iterator[Expert]:
        names = self.expert.first
        if f"{prefix}down_proj" in weights:
            first, down = weights.take(f"{prefix}{_FUSED[len(names)]}"), weights.take(f"{prefix}down_proj")
            yield from fused_experts(first, down)
            return
        for index in range(self.routing.experts):
            first = tuple(weights.take(f"{prefix}{index}.{name}.weight") for name in names)
            yield Expert(first, weights.take(f"{prefix}{index}.down_proj.weight"))


def fused_experts(first: torch.Tensor, down: torch.Tensor) -> Iterator[Expert]:
    """Split fused experts, [E, 2I or I, C] and [E, C, I], into views of each."""
    for first_IC, down_CI in zip(first.unbind(0), down.unbind(0), strict=True):
        yield Expert((first_IC,), down_CI)


# What the fused map of one or two maps into the inner space is called.
_FUSED: Final = {1: "up_proj", 2: "gate_up_proj"}
