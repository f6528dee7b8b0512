"""The decoder that every family composes: embedding, residual layers, final norm, head.

Shapes: T tokens of a step, C hidden size, V vocabulary.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from truekv.core.spec import ModelSpec
from truekv.models.blocks import Embedding, Head, RMSNorm, Shapes, norm
from truekv.models.draft import no_draft_head
from truekv.models.ffn import MoeShape
from truekv.models.rotary import Rotary

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.lazy import torch
    from truekv.core.protocols import DraftHead, LayerMemory
    from truekv.core.spec import LayerSpec, Live
    from truekv.core.weights import Weights
    from truekv.models.draft import DraftShape
    from truekv.models.ffn import FeedForward, MlpShape
    from truekv.models.reading import Sizes
    from truekv.models.rotary import Angles, Rope


class Mixer(Protocol):
    """What moves information between tokens: attention or a recurrence, with its memory."""

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C]; `angles` is None in models without rotary positions."""
        ...


class MixerShape(Protocol):
    """A mixer before any weight is read."""

    def spec(self) -> LayerSpec:
        """Return what the layer remembers."""
        ...

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        ...

    @property
    def live(self) -> Live:
        """What it needs for each token of a step."""
        ...

    def build(self, weights: Weights, prefix: str) -> Mixer:
        """Compose the mixer from its tensors."""
        ...


class Layer:
    """x + mixer(norm(x)), then x + ffn(norm(x)); a layer may lack either half."""

    def __init__(
        self, mixer: tuple[RMSNorm, Mixer] | None, ffn: tuple[RMSNorm, FeedForward] | None, scale: float = 1.0
    ) -> None:
        """Each half comes with the norm before it; `scale` multiplies what it adds to the residual."""
        self.mixer = mixer
        self.ffn = ffn
        self.scale = scale

    def __call__(
        self,
        x_TC: torch.Tensor,
        change_TC: torch.Tensor | None,
        memory: LayerMemory,
        step: Step,
        angles: Angles | None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Take the residual and what is still to be added to it; return both as they are after the layer.

        A change waits for the next norm, which adds it in the same pass.
        """
        if self.mixer is not None:
            norm, mixer = self.mixer
            x_TC, normed_TC = norm.after(x_TC, change_TC)
            change_TC = self._scaled(mixer(normed_TC, memory, step, angles))
        if self.ffn is not None:
            norm, ffn = self.ffn
            x_TC, normed_TC = norm.after(x_TC, change_TC)
            change_TC = self._scaled(ffn(normed_TC))
        return x_TC, change_TC

    def _scaled(self, change_TC: torch.Tensor) -> torch.Tensor:
        return change_TC if self.scale == 1.0 else change_TC * self.scale


class Decoder:
    """A causal language model: tokens and memory in, numbers out."""

    draft_head: DraftHead | None = None
    """Its prediction head, where it was asked for."""

    def __init__(
        self, spec: ModelSpec, embedding: Embedding, layers: Seq[Layer], head: Head, rotary: Rotary | None
    ) -> None:
        """`layers` follow `spec.layers` one to one."""
        self.spec = spec
        self.embedding = embedding
        self.layers = layers
        self.head = head
        self.rotary = rotary

    def forward(self, step: Step, memory: Seq[LayerMemory]) -> torch.Tensor:
        """Return the last residual [T, C], before the final norm."""
        x_TC = self.embedding(step.tokens)
        angles = None if self.rotary is None else self.rotary.angles(step.positions)
        change_TC = None
        for layer, remembered in zip(self.layers, memory, strict=True):
            x_TC, change_TC = layer(x_TC, change_TC, remembered, step, angles)
        return x_TC if change_TC is None else x_TC + change_TC

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Apply the final norm and the output head: [N, C] -> float32 [N, V]."""
        return self.head(hidden)


@dataclass(frozen=True, slots=True)
class LayerShape:
    """One layer of a checkpoint: its mixer and its feed-forward block, with the names they go by."""

    mixer_name: str
    mixer: MixerShape
    ffn: MlpShape | MoeShape
    ffn_name: str = "mlp"

    def tensors(self, prefix: str, hidden: int, *, fused: bool) -> Shapes:
        """Tensor names under `prefix` and their shapes; `fused` is the layout of experts."""
        ffn_prefix = f"{prefix}{self.ffn_name}."
        ffn = self.ffn.tensors(ffn_prefix, fused=fused) if isinstance(self.ffn, MoeShape) else None
        return {
            f"{prefix}input_layernorm.weight": (hidden,),
            f"{prefix}post_attention_layernorm.weight": (hidden,),
            **self.mixer.tensors(f"{prefix}{self.mixer_name}."),
            **(self.ffn.tensors(ffn_prefix) if ffn is None else ffn),
        }

    @property
    def live(self) -> tuple[Live, Live]:
        """What its halves need for each token of a step."""
        return self.mixer.live, self.ffn.live

    def build(self, weights: Weights, prefix: str, eps: float, *, zero_centred: bool) -> Layer:
        """Compose the layer from its tensors."""
        mixer = self.mixer.build(weights, f"{prefix}{self.mixer_name}.")
        ffn = self.ffn.build(weights, f"{prefix}{self.ffn_name}.")
        before, between = (
            norm(weights, f"{prefix}{name}", eps, zero_centred=zero_centred)
            for name in ("input_layernorm", "post_attention_layernorm")
        )
        return Layer((before, mixer), (between, ffn))


@dataclass(frozen=True)
class DecoderShape:
    """A decoder before any weight is read: the Architecture of most families."""

    spec: ModelSpec
    layers: tuple[LayerShape, ...]
    rope: Rope
    eps: float
    tied: bool
    """Whether the output head is the embedding."""
    zero_centred: bool = False
    """Whether norm weights are stored minus one."""
    prefixes: tuple[str, ...] = ("model.",)
    """What tensor names may start with; the checkpoint decides."""
    ignored: tuple[str, ...] = ()
    float32: tuple[str, ...] = ()
    """Regular expressions (full match) of tensors that stay float32 whatever the compute dtype."""
    draft: DraftShape | None = None
    """The head that the config announces."""
    drafted: bool = False
    """Whether that head is loaded too."""

    @classmethod
    def of(
        cls, family: str, sizes: Sizes, layers: tuple[LayerShape, ...], rope: Rope, *, zero_centred: bool = False
    ) -> DecoderShape:
        """Compose a family of ordinary layers: every one has a mixer, a feed-forward block and two norms."""
        spec = ModelSpec(
            family=family,
            hidden_size=sizes.hidden,
            vocab_size=sizes.vocabulary,
            max_positions=sizes.max_positions,
            dtype=sizes.dtype,
            layers=tuple(layer.mixer.spec() for layer in layers),
        )
        # A tied checkpoint may hold its head a second time.
        ignored = (r"lm_head\.weight",) if sizes.tied else ()
        return cls(spec, layers, rope, sizes.eps, sizes.tied, zero_centred=zero_centred, ignored=ignored)

    @property
    def tensors(self) -> Shapes:
        """The layout that transformers writes: experts one by one."""
        return self.layouts[0]

    @functools.cached_property
    def layouts(self) -> tuple[Shapes, ...]:
        """Every layout that `build` takes: under each prefix, experts one by one, and fused where there are any.

        A checkpoint may hold the head's experts in another way than the trunk's.
        """
        trunks = [self._tensors(prefix, fused=fused) for prefix in self.prefixes for fused in _ways(*self.layers)]
        if self.draft is None or not self.drafted:
            return tuple(trunks)
        heads = [self.draft.tensors(self.spec.hidden_size, fused=fused) for fused in _ways(self.draft.layer)]
        return tuple(trunk | head for trunk, head in itertools.product(trunks, heads))

    @property
    def live(self) -> tuple[Live, ...]:
        """See core.protocols.Architecture."""
        head = (self.draft.layer,) if self.draft is not None and self.drafted else ()
        return tuple(half for layer in (*self.layers, *head) for half in layer.live)

    def with_draft_head(self) -> DecoderShape:
        """Return the same with its head's tensors; see core.protocols.Architecture."""
        if self.draft is None or len(self.spec.draft_layers) != 1:
            raise no_draft_head(self.spec)
        ignored = (*(name for name in self.ignored if name != self.draft.names), *self.draft.copies)
        return replace(self, drafted=True, ignored=ignored)

    def _tensors(self, prefix: str, *, fused: bool) -> Shapes:
        hidden, vocabulary = self.spec.hidden_size, self.spec.vocab_size
        shapes: Shapes = {
            f"{prefix}embed_tokens.weight": (vocabulary, hidden),
            f"{prefix}norm.weight": (hidden,),
        }
        if not self.tied:
            shapes["lm_head.weight"] = (vocabulary, hidden)
        for index, layer in enumerate(self.layers):
            shapes |= layer.tensors(f"{prefix}layers.{index}.", hidden, fused=fused)
        return shapes

    def build(self, weights: Weights) -> Decoder:
        """Compose the model from its tensors, in any of its layouts."""
        prefix = next(item for item in self.prefixes if f"{item}embed_tokens.weight" in weights)
        embedding = weights.linear(f"{prefix}embed_tokens")
        layers = [
            layer.build(weights, f"{prefix}layers.{index}.", self.eps, zero_centred=self.zero_centred)
            for index, layer in enumerate(self.layers)
        ]
        final = norm(weights, f"{prefix}norm", self.eps, zero_centred=self.zero_centred)
        head = Head(final, embedding if self.tied else weights.linear("lm_head"))
        model = Decoder(self.spec, Embedding(embedding), layers, head, Rotary(self.rope, weights.ops, weights.device))
        if self.draft is not None and self.drafted:
            model.draft_head = self.draft.build(weights, model, self.eps, zero_centred=self.zero_centred)
        return model


def _ways(*layers: LayerShape) -> tuple[bool, ...]:
    """Return the layouts of experts that layers may have: fused or not, if they have experts."""
    return (False, True) if any(isinstance(layer.ffn, MoeShape) for layer in layers) else (False,)
