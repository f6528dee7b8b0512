"""Multi-token-prediction heads: one more layer that guesses the token after next (DeepSeek-V3, section 2.2).

Shapes: T tokens, N states, C hidden size, V vocabulary.

    row t = layer(join[norm_e(embedding of token t + 1), norm_s(state at t)])     state = norm(row t)

The state at t that comes from the trunk is its residual after the final norm, what its own output head
reads; a chained pass takes the head's own state, after the head's norm. Both follow the released models'
code and what was measured on them: the DeepSeek-R1 checkpoint's modeling_deepseek.py hands the head the
output of `model.norm`; transformers (`MtpModel`), vLLM (`qwen3_next_mtp`, `deepseek_mtp` since pull
request 45895) and SGLang (`deepseek_nextn`, `qwen3_next_mtp`) feed and chain normed states; on Qwen3.5-0.8B
three drafts were accepted 1.7 times as far as from the bare residual (LightLLM pull request 1402, likewise
llama.cpp 24025). All put the embedding first. Embedding and output map are the trunk's own.

Every row of the head is turned by the position of its state. Engines that turn it by that of the
embedded token, one further, compute the same: attention reads differences of positions only.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.models.blocks import Shapes, norm

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.ops import Matrix
    from truekv.core.protocols import LayerMemory
    from truekv.core.spec import ModelSpec
    from truekv.core.weights import Weights
    from truekv.models.blocks import RMSNorm
    from truekv.models.decoder import Decoder, Layer, LayerShape


class DraftHead:
    """A head of one layer; implements core.protocols.DraftHead."""

    def __init__(
        self, trunk: Decoder, norms: tuple[RMSNorm, RMSNorm], join: Matrix, layer: Layer, norm: RMSNorm
    ) -> None:
        """`norms` are those of the embedding and of the state, whose outputs `join` maps, side by side, 2 C -> C."""
        self.embedding = trunk.embedding
        self.rotary = trunk.rotary
        self.trunk_norm = trunk.head.norm
        self.output = trunk.head.matrix
        self.embedding_norm, self.state_norm = norms
        self.join = join
        self.layer = layer
        self.norm = norm

    def begin(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the trunk's residuals [T, C] to its states: the final norm."""
        return self.trunk_norm(hidden)

    def forward(self, state: torch.Tensor, step: Step, memory: Seq[LayerMemory]) -> torch.Tensor:
        """Map states [T, C] and the tokens after them to the states one token on, [T, C]."""
        (remembered,) = memory
        embedded_TC = self.embedding_norm(self.embedding(step.tokens))
        x_TC = self.join(torch.cat((embedded_TC, self.state_norm(state)), -1))
        angles = None if self.rotary is None else self.rotary.angles(step.positions)
        x_TC, change_TC = self.layer(x_TC, None, remembered, step, angles)
        return self.norm.after(x_TC, change_TC)[1]

    def logits(self, state: torch.Tensor) -> torch.Tensor:
        """Map states [N, C] to float32 [N, V]."""
        return self.output(state, widened=True)


@dataclass(frozen=True, slots=True)
class DraftShape:
    """A head before any weight is read: its layer, and what its tensors are called after `prefix`."""

    layer: LayerShape
    prefix: str
    layer_prefix: str
    """What the names of the layer's tensors begin with."""
    embedding_norm: str
    state_norm: str
    join: str
    norm: str
    names: str
    """Regular expression of all names that belong to heads: a model without its head ignores them."""
    copies: tuple[str, ...] = ()
    """Regular expressions of tensors that repeat the trunk's."""

    def tensors(self, hidden: int, *, fused: bool) -> Shapes:
        """Tensor names and their shapes; `fused` is the layout of experts."""
        norms = (self.embedding_norm, self.state_norm, self.norm)
        return {
            **{f"{self.prefix}{name}.weight": (hidden,) for name in norms},
            f"{self.prefix}{self.join}.weight": (hidden, 2 * hidden),
            **self.layer.tensors(self.layer_prefix, hidden, fused=fused),
        }

    def build(self, weights: Weights, trunk: Decoder, eps: float, *, zero_centred: bool) -> DraftHead:
        """Compose the head from its tensors and the trunk's embedding, final norm and output map."""

        def own(name: str) -> RMSNorm:
            return norm(weights, f"{self.prefix}{name}", eps, zero_centred=zero_centred)

        return DraftHead(
            trunk,
            (own(self.embedding_norm), own(self.state_norm)),
            weights.linear(f"{self.prefix}{self.join}"),
            self.layer.build(weights, self.layer_prefix, eps, zero_centred=zero_centred),
            own(self.norm),
        )


def no_draft_head(spec: ModelSpec) -> Refused:
    """Say why a model cannot be loaded with a head, and what guesses without one."""
    count = len(spec.draft_layers)
    what = f"has {count} layers, but only heads of one are implemented" if count else "is not announced by its config"
    return Refused(
        f"the multi-token-prediction head of this {spec.family} model {what}; "
        "speculate with the method ngram, which needs none"
    )
