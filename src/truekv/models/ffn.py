"""Feed-forward blocks: gated and plain MLPs, and mixtures of experts with the routers in use.

Shapes: T tokens, C hidden size, I inner size, E experts, K experts per token, G expert groups.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, cast

from truekv.core.lazy import torch
from truekv.models.blocks import Linear, Shapes, linear, linear_shapes

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping
    from collections.abc import Sequence as Seq

# Up to this many experts, every expert sees every token: no host read, so a step can be captured.
DENSE_EXPERTS = 16

Activation = Literal["silu", "relu2"]


def _relu2(x: torch.Tensor) -> torch.Tensor:
    return torch.relu(x).square()


def _activation(name: Activation) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return the function of an activation's name."""
    return {"silu": torch.nn.functional.silu, "relu2": _relu2}[name]


class FeedForward(Protocol):
    """Anything that maps each token on its own."""

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Map [T, C] to [T, C]."""
        ...


class MLP:
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where there is no gate."""

    def __init__(self, gate: Linear | None, up: Linear, down: Linear, activation: Activation = "silu") -> None:
        """Linear maps C -> I, C -> I, I -> C."""
        self.gate = gate
        self.up = up
        self.down = down
        self.activation = _activation(activation)

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Map [T, C] to [T, C] in x's dtype."""
        up_TI = self.up(x_TC)
        return self.down(self.activation(up_TI) if self.gate is None else self.activation(self.gate(x_TC)) * up_TI)


@dataclass(frozen=True, slots=True)
class MlpShape:
    """Sizes and tensors of an MLP: `gate_proj` (if gated), `up_proj`, `down_proj`."""

    hidden: int
    inner: int
    gated: bool = True
    activation: Activation = "silu"
    bias: bool = False

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        shapes = linear_shapes(f"{prefix}up_proj", self.inner, self.hidden, bias=self.bias)
        if self.gated:
            shapes |= linear_shapes(f"{prefix}gate_proj", self.inner, self.hidden, bias=self.bias)
        return shapes | linear_shapes(f"{prefix}down_proj", self.hidden, self.inner, bias=self.bias)

    def build(self, weights: Mapping[str, torch.Tensor], prefix: str) -> MLP:
        """Compose the MLP from its tensors."""
        gate = linear(weights, f"{prefix}gate_proj") if self.gated else None
        return MLP(gate, linear(weights, f"{prefix}up_proj"), linear(weights, f"{prefix}down_proj"), self.activation)


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


class Router:
    """Scores the experts of each token in float32 and keeps the best."""

    def __init__(self, routing: Routing, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """`weight` is [E, C]; `bias` [E] corrects the choice, not the weights."""
        self.routing = routing
        self.weight = weight.float() if routing.float32_logits else weight
        self.bias = None if bias is None else bias.float()

    def __call__(self, x_TC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the chosen experts' weights, float32 [T, K], and their indices [T, K]."""
        routing = self.routing
        logits_TE = torch.nn.functional.linear(x_TC.to(self.weight.dtype), self.weight).float()
        scores_TE = logits_TE.softmax(-1) if routing.score == "softmax" else logits_TE.sigmoid()
        choice_TE = scores_TE if self.bias is None else scores_TE + self.bias
        if routing.groups > routing.kept_groups:
            choice_TE = self._limit(choice_TE)
        chosen_TK = choice_TE.topk(routing.per_token, -1).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if routing.normalised:
            # The floor is transformers': it matters only where every chosen score underflows.
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * routing.scale, chosen_TK

    def _limit(self, choice_TE: torch.Tensor) -> torch.Tensor:
        """Bar every expert outside the best groups."""
        routing = self.routing
        grouped_TGe = choice_TE.view(len(choice_TE), routing.groups, -1)
        score_TG = grouped_TGe.topk(1 if routing.score == "softmax" else 2, -1).values.sum(-1)
        kept_Tg = score_TG.topk(routing.kept_groups, -1).indices
        barred_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, kept_Tg, value=False)
        return grouped_TGe.masked_fill(barred_TG[..., None], -torch.inf).flatten(1)


class MoE:
    """Routed experts, and optionally a shared expert (with or without a gate of its own)."""

    def __init__(
        self,
        router: Router,
        experts: Seq[FeedForward],
        shared: FeedForward | None = None,
        shared_gate: Linear | None = None,
        latent: tuple[Linear, Linear] | None = None,
    ) -> None:
        """`shared_gate` maps C -> 1; `latent` maps into and out of the space the experts work in."""
        self.router = router
        self.experts = experts
        self.shared = shared
        self.shared_gate = shared_gate
        self.latent = latent

    def __call__(self, x_TC: torch.Tensor) -> torch.Tensor:
        """Map [T, C] to [T, C]; experts are summed in float32 and rounded once."""
        weights_TK, chosen_TK = self.router(x_TC)
        routed_TC = x_TC if self.latent is None else self.latent[0](x_TC)
        run = self._dense if len(self.experts) <= DENSE_EXPERTS else self._grouped
        routed_TC = run(routed_TC, weights_TK, chosen_TK).to(x_TC.dtype)
        if self.latent is not None:
            routed_TC = self.latent[1](routed_TC)
        if self.shared is None:
            return routed_TC
        shared_TC = self.shared(x_TC)
        if self.shared_gate is not None:
            shared_TC = torch.sigmoid(self.shared_gate(x_TC)) * shared_TC
        return routed_TC + shared_TC

    def _dense(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Run every expert on every token, weight zero where it was not chosen."""
        share_TE = weights_TK.new_zeros(len(x_TC), len(self.experts)).scatter(1, chosen_TK, weights_TK)
        out_TC = torch.zeros_like(x_TC, dtype=torch.float32)
        for index, expert in enumerate(self.experts):
            # where, not a product: an unchosen expert that overflows must not turn 0 * inf into NaN.
            share_T1 = share_TE[:, index, None]
            out_TC += torch.where(share_T1 > 0, expert(x_TC).float() * share_T1, 0.0)
        return out_TC

    def _grouped(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Run each expert on the tokens that chose it. Reads the choice on the host."""
        out_TC = torch.zeros_like(x_TC, dtype=torch.float32)
        for index in sorted(set(cast("list[int]", chosen_TK.flatten().tolist()))):
            token, slot = torch.where(chosen_TK == index)
            out_TC[token] += self.experts[index](x_TC[token]).float() * weights_TK[token, slot, None]
        return out_TC


@dataclass(frozen=True, slots=True)
class MoeShape:
    """Sizes and tensors of a mixture: `gate`, `experts`, and a shared expert under `shared_name`.

    Checkpoints hold the experts one by one (`experts.0.gate_proj.weight`) or fused
    (`experts.gate_up_proj` [E, 2I, C], `experts.down_proj` [E, C, I]); `build` takes either.
    """

    routing: Routing
    hidden: int
    inner: int
    gated: bool = True
    activation: Activation = "silu"
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
        return MlpShape(self.latent or self.hidden, self.inner, self.gated, self.activation)

    @property
    def shared(self) -> MlpShape:
        """The shared expert."""
        return MlpShape(self.hidden, self.shared_inner, self.gated, self.activation)

    def tensors(self, prefix: str, *, fused: bool = False) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes, in either layout."""
        count, width = self.routing.experts, self.latent or self.hidden
        shapes: Shapes = {f"{prefix}gate.weight": (count, self.hidden)}
        if self.correction:
            shapes[f"{prefix}gate.{self.correction}"] = (count,)
        if fused:
            first = "gate_up_proj" if self.gated else "up_proj"
            shapes[f"{prefix}experts.{first}"] = (count, self.inner * (2 if self.gated else 1), width)
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

    def build(self, weights: Mapping[str, torch.Tensor], prefix: str) -> MoE:
        """Compose the mixture from its tensors, in the layout they have; no weight is copied."""
        bias = weights[f"{prefix}gate.{self.correction}"] if self.correction else None
        latent = None
        if self.latent:
            latent = (linear(weights, f"{prefix}fc1_latent_proj"), linear(weights, f"{prefix}fc2_latent_proj"))
        return MoE(
            Router(self.routing, weights[f"{prefix}gate.weight"], bias),
            self._experts(weights, f"{prefix}experts."),
            self.shared.build(weights, f"{prefix}{self.shared_name}.") if self.shared_inner else None,
            linear(weights, f"{prefix}shared_expert_gate") if self.shared_gate else None,
            latent,
        )

    def _experts(self, weights: Mapping[str, torch.Tensor], prefix: str) -> list[MLP]:
        """Return one MLP per expert; those of a fused tensor are views of it."""
        count = self.routing.experts
        if f"{prefix}down_proj" not in weights:
            return [self.expert.build(weights, f"{prefix}{index}.") for index in range(count)]
        return fused_experts(
            weights[f"{prefix}gate_up_proj" if self.gated else f"{prefix}up_proj"],
            weights[f"{prefix}down_proj"],
            self.activation,
            gated=self.gated,
        )


def fused_experts(first: torch.Tensor, down: torch.Tensor, activation: Activation, *, gated: bool) -> list[MLP]:
    """Split fused experts, [E, 2I or I, C] and [E, C, I], into one MLP each (views)."""
    experts: list[MLP] = []
    for first_IC, down_CI in zip(first.unbind(0), down.unbind(0), strict=True):
        gate, up = first_IC.chunk(2) if gated else (None, first_IC)
        experts.append(MLP(None if gate is None else Linear(gate), Linear(up), Linear(down_CI), activation))
    return experts
