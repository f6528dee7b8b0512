"""Decoders whose layers are not all alike: any half may be missing, residuals scaled, positions absent.

Shapes: C hidden size, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from truekv.models.blocks import Embedding, Head, Shapes, norm
from truekv.models.decoder import Decoder, Layer
from truekv.models.draft import no_draft_head
from truekv.models.rotary import Rotary

if TYPE_CHECKING:
    from truekv.core.spec import Live, ModelSpec
    from truekv.core.weights import Weights
    from truekv.models.decoder import MixerShape
    from truekv.models.ffn import FeedForward
    from truekv.models.rotary import Rope


class FeedForwardShape(Protocol):
    """A feed-forward block before any weight is read."""

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` and their shapes."""
        ...

    @property
    def live(self) -> Live:
        """What it needs for each token of a step."""
        ...

    def build(self, weights: Weights, prefix: str) -> FeedForward:
        """Compose the block from its tensors."""
        ...


@dataclass(frozen=True, slots=True)
class MixerHalf:
    """The half of a layer that looks at other tokens, and the norm before it."""

    norm: str
    prefix: str
    """What its tensors' names begin with, after the layer's own prefix."""
    shape: MixerShape


@dataclass(frozen=True, slots=True)
class FeedForwardHalf:
    """The half of a layer that looks at each token alone, and the norm before it."""

    norm: str
    prefix: str
    """What its tensors' names begin with, after the layer's own prefix."""
    shape: FeedForwardShape


@dataclass(frozen=True, slots=True)
class HybridLayer:
    """One layer of a checkpoint: either half, or both."""

    mixer: MixerHalf | None
    ffn: FeedForwardHalf | None

    def tensors(self, prefix: str, hidden: int) -> Shapes:
        """Tensor names under `prefix` and their shapes."""
        shapes: Shapes = {}
        for half in (self.mixer, self.ffn):
            if half is not None:
                shapes |= {f"{prefix}{half.norm}.weight": (hidden,), **half.shape.tensors(f"{prefix}{half.prefix}")}
        return shapes

    def build(self, weights: Weights, prefix: str, eps: float, scale: float) -> Layer:
        """Compose the layer from its tensors."""
        mixer, ffn = self.mixer, self.ffn
        return Layer(
            mixer
            and (norm(weights, f"{prefix}{mixer.norm}", eps), mixer.shape.build(weights, f"{prefix}{mixer.prefix}")),
            ffn and (norm(weights, f"{prefix}{ffn.norm}", eps), ffn.shape.build(weights, f"{prefix}{ffn.prefix}")),
            scale,
        )


@dataclass(frozen=True)
class HybridShape:
    """A decoder of such layers before any weight is read."""

    spec: ModelSpec
    layers: tuple[HybridLayer, ...]
    eps: float
    tied: bool
    """Whether the output head is the embedding."""
    rope: Rope | None = None
    """None: positions enter through the recurrence alone."""
    prefix: str = "model."
    embedding: str = "embed_tokens"
    final_norm: str = "norm"
    embedding_scale: float = 1.0
    residual_scale: float = 1.0
    """What each half's output is multiplied by before it joins the residual."""
    logits_scale: float = 1.0
    ignored: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    """Regular expressions (full match) of tensors that stay float32 whatever the compute dtype."""

    @property
    def tensors(self) -> Shapes:
        """Name and shape of every tensor that `build` consumes."""
        hidden, vocabulary = self.spec.hidden_size, self.spec.vocab_size
        shapes: Shapes = {
            f"{self.prefix}{self.embedding}.weight": (vocabulary, hidden),
            f"{self.prefix}{self.final_norm}.weight": (hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (vocabulary, hidden)
        for index, layer in enumerate(self.layers):
            shapes |= layer.tensors(f"{self.prefix}layers.{index}.", hidden)
        return shapes

    @property
    def live(self) -> tuple[Live, ...]:
        """See core.protocols.Architecture."""
        halves = (half for layer in self.layers for half in (layer.mixer, layer.ffn) if half is not None)
        return tuple(half.shape.live for half in halves)

    def with_draft_head(self) -> HybridShape:
        """Refuse: no head of these families is implemented."""
        raise no_draft_head(self.spec)

    def build(self, weights: Weights) -> Decoder:
        """Compose the model from its tensors."""
        embedding = weights.linear(f"{self.prefix}{self.embedding}")
        final_norm = norm(weights, f"{self.prefix}{self.final_norm}", self.eps)
        return Decoder(
            self.spec,
            Embedding(embedding, self.embedding_scale),
            [
                layer.build(weights, f"{self.prefix}layers.{index}.", self.eps, self.residual_scale)
                for index, layer in enumerate(self.layers)
            ],
            Head(final_norm, embedding if self.tied else weights.linear("lm_head"), self.logits_scale),
            None if self.rope is None else Rotary(self.rope, weights.ops, weights.device),
        )
