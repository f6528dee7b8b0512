"""Linear maps, norms, gates, rotary positions, routers and experts in plain torch: the specification.

Shapes as in core/ops.py. Rows of a torch product may differ in the last bits with the number of rows;
native kernels keep the promise of core/ops.py, this file says what they compute.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Final, cast

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Iterable
    from collections.abc import Sequence as Seq

    from truekv.core.ops import Activation, Expert, Ops, Part, Routing

# Up to this many experts, every expert sees every token: no host read, so a step can be captured.
DENSE_EXPERTS: Final = 16


class ReferenceMatrix:
    """y = x W^T + b with torch's own product, part by part."""

    def __init__(self, parts: Seq[Part]) -> None:
        """Keep the parts as they are."""
        self.parts = parts

    def __call__(self, x: torch.Tensor, *, widened: bool = False) -> torch.Tensor:
        """Map [T, in] to [T, out]; what is widened was rounded to the weight's dtype before."""
        outs = [torch.nn.functional.linear(x, part.weight, part.bias) for part in self.parts]
        out = outs[0] if len(outs) == 1 else torch.cat(outs, -1)
        return out.float() if widened else out

    def rows(self, indices: torch.Tensor) -> torch.Tensor:
        """Return rows of the only part's weight."""
        (part,) = self.parts
        return torch.nn.functional.embedding(indices, part.weight)


class ReferenceHeads:
    """One product per head."""

    def __init__(self, weight_HOI: torch.Tensor) -> None:
        """Keep them as [H, in, out]."""
        self.weight_HIO = weight_HOI.transpose(1, 2).contiguous()

    def __call__(self, x_THI: torch.Tensor) -> torch.Tensor:
        """Map [T, H, in] to [T, H, out]."""
        out_THO = x_THI.new_empty(*x_THI.shape[:2], self.weight_HIO.shape[2])
        # Heads of a token side by side, as what follows wants them.
        torch.bmm(x_THI.transpose(0, 1), self.weight_HIO, out=out_THO.transpose(0, 1))
        return out_THO


class ReferenceExperts:
    """Experts one after the other, summed in float32 and rounded once."""

    def __init__(self, experts: Iterable[Expert], activation: Activation) -> None:
        """Keep views of fused tensors, and both halves of separate ones."""
        self.experts = [
            (expert.first[0] if len(expert.first) == 1 else torch.cat(expert.first), expert.down) for expert in experts
        ]
        self.activation: Activation = activation

    def __call__(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Sum each token's chosen experts: [T, C]."""
        run = self._dense if len(self.experts) <= DENSE_EXPERTS else self._grouped
        return run(x_TC, weights_TK, chosen_TK).to(x_TC.dtype)

    def _expert(self, index: int, x_TC: torch.Tensor) -> torch.Tensor:
        first, down = self.experts[index]
        inner = activate(torch.nn.functional.linear(x_TC, first), self.activation)
        return torch.nn.functional.linear(inner, down).float()

    def _dense(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Run every expert on every token, weight zero where it was not chosen."""
        share_TE = weights_TK.new_zeros(len(x_TC), len(self.experts)).scatter(1, chosen_TK, weights_TK)
        out_TC = torch.zeros_like(x_TC, dtype=torch.float32)
        for index in range(len(self.experts)):
            # where, not a product: an unchosen expert that overflows must not turn 0 * inf into NaN.
            share_T1 = share_TE[:, index, None]
            out_TC += torch.where(share_T1 > 0, self._expert(index, x_TC) * share_T1, 0.0)
        return out_TC

    def _grouped(self, x_TC: torch.Tensor, weights_TK: torch.Tensor, chosen_TK: torch.Tensor) -> torch.Tensor:
        """Run each expert on the tokens that chose it. Reads the choice on the host."""
        out_TC = torch.zeros_like(x_TC, dtype=torch.float32)
        for index in sorted(set(cast("list[int]", chosen_TK.flatten().tolist()))):
            token, slot = torch.where(chosen_TK == index)
            out_TC[token] += self._expert(index, x_TC[token]) * weights_TK[token, slot, None]
        return out_TC


def activate(x: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Apply an activation in float32 and round once."""
    match activation:
        case "swiglu":
            gate, up = x.float().chunk(2, -1)
            return (torch.nn.functional.silu(gate) * up).to(x.dtype)
        case "relu2":
            return torch.relu(x.float()).square().to(x.dtype)


def normalised(x: torch.Tensor, eps: float) -> torch.Tensor:
    """Return x / sqrt(mean(x^2) + eps) over the last dimension, a new float32 tensor."""
    x32 = x.float()
    return x32 * torch.rsqrt(x32.square().mean(-1, keepdim=True) + eps)


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, *, interleaved: bool) -> torch.Tensor:
    """Turn planes (i, i + P) of [T, H, D], or (2i, 2i + 1) if interleaved."""
    planes = cos.shape[-1]
    cos_T1P, sin_T1P = cos[:, None], sin[:, None]
    turned, kept = x[..., : 2 * planes].float(), x[..., 2 * planes :]
    first, second = (
        (turned[..., 0::2], turned[..., 1::2]) if interleaved else (turned[..., :planes], turned[..., planes:])
    )
    cos_part = (first * cos_T1P - second * sin_T1P).to(x.dtype)
    sin_part = (second * cos_T1P + first * sin_T1P).to(x.dtype)
    return torch.cat((cos_part, sin_part, kept), -1)


class ReferenceOps:
    """Every operation of core/ops.py, in torch."""

    apart: ClassVar[bool] = False

    def matrix(self, parts: Seq[Part]) -> ReferenceMatrix:
        """Keep the parts."""
        return ReferenceMatrix(parts)

    def head_matrices(self, weight_HOI: torch.Tensor) -> ReferenceHeads:
        """Make one map per head."""
        return ReferenceHeads(weight_HOI)

    def experts(self, count: int, experts: Iterable[Expert], activation: Activation) -> ReferenceExperts:
        """Take the experts."""
        taken = ReferenceExperts(experts, activation)
        assert len(taken.experts) == count
        return taken

    def rms_norm(self, x: torch.Tensor, gain: torch.Tensor | None, eps: float) -> torch.Tensor:
        """Normalise the last dimension."""
        rows = normalised(x, eps)
        return (rows if gain is None else rows.mul_(gain)).to(x.dtype)

    def add_norm(
        self, x: torch.Tensor, change: torch.Tensor, gain: torch.Tensor, eps: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return x + change and its norm."""
        total = x + change
        return total, self.rms_norm(total, gain, eps)

    def gated_norm(
        self, x: torch.Tensor, gate: torch.Tensor, gain: torch.Tensor, eps: float, *, gate_first: bool
    ) -> torch.Tensor:
        """Normalise rows [T, H, D] before or after they are multiplied by silu(gate)."""
        silu = torch.nn.functional.silu(gate.float()).view(x.shape)
        gain = gain.view(-1, x.shape[-1])
        out = normalised(x * silu, eps) * gain if gate_first else normalised(x, eps) * gain * silu
        return out.flatten(1).to(gate.dtype)

    def activate(self, x: torch.Tensor, activation: Activation) -> torch.Tensor:
        """Apply an activation."""
        return activate(x, activation)

    def gate(self, x: torch.Tensor, by: torch.Tensor) -> torch.Tensor:
        """X * sigmoid(by)."""
        return (x.float() * torch.sigmoid(by.float())).to(by.dtype)

    def softplus(self, x: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        """log(1 + exp(x + bias)) in float32."""
        return torch.nn.functional.softplus(x.float() + bias)

    def delta_gates(
        self, b: torch.Tensor, a: torch.Tensor, bias: torch.Tensor, rate: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return sigmoid(b) and rate * softplus(a + bias)."""
        return b.float().sigmoid(), rate * self.softplus(a, bias)

    def angles(
        self, positions: torch.Tensor, frequencies: torch.Tensor, amplitude: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosine and sine of position times frequency."""
        turned_TP = positions.float()[:, None] * frequencies
        return turned_TP.cos() * amplitude, turned_TP.sin() * amplitude

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
        """Norm what has a gain, then turn it."""
        return tuple(
            rotated(x if gain is None else self.rms_norm(x, gain, eps), cos, sin, interleaved=interleaved)
            for x, gain in zip(heads, gains, strict=True)
        )

    def route(
        self, logits: torch.Tensor, bias: torch.Tensor | None, routing: Routing
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score the experts of each token and keep the best."""
        scores_TE = logits.softmax(-1) if routing.score == "softmax" else logits.sigmoid()
        choice_TE = scores_TE if bias is None else scores_TE + bias
        if routing.groups > routing.kept_groups:
            choice_TE = limited(choice_TE, routing)
        chosen_TK = choice_TE.topk(routing.per_token, -1).indices
        weights_TK = scores_TE.gather(1, chosen_TK)
        if routing.normalised:
            # The floor is transformers': it matters only where every chosen score underflows.
            weights_TK = weights_TK / (weights_TK.sum(-1, keepdim=True) + 1e-20)
        return weights_TK * routing.scale, chosen_TK

    def finite(self, *parts: torch.Tensor, rows: torch.Tensor | None = None) -> bool:
        """Whether every number is finite."""
        return all(bool(torch.isfinite(part if rows is None else part[rows]).all()) for part in parts)

    def best(self, x: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Sort whole rows."""
        sorted_ND, order_ND = x.sort(dim=-1, descending=True, stable=True)
        return sorted_ND[:, :count], order_ND[:, :count]

    def largest(self, x: torch.Tensor) -> torch.Tensor:
        """Where each row's largest number is, -1 where one is not finite."""
        return x.argmax(-1).masked_fill(torch.isfinite(x).all(-1).logical_not(), -1)


def limited(choice_TE: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Bar every expert outside the best groups."""
    grouped_TGe = choice_TE.view(len(choice_TE), routing.groups, -1)
    score_TG = grouped_TGe.topk(1 if routing.score == "softmax" else 2, -1).values.sum(-1)
    kept_Tg = score_TG.topk(routing.kept_groups, -1).indices
    barred_TG = torch.ones_like(score_TG, dtype=torch.bool).scatter(1, kept_Tg, value=False)
    return grouped_TGe.masked_fill(barred_TG[..., None], -torch.inf).flatten(1)


OPS: Final[Ops] = ReferenceOps()
