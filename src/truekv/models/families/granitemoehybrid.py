"""Granite 4.0: Mamba-2 and attention layers over experts with a shared MLP, under four multipliers."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.ops import Routing
from truekv.core.spec import Live, ModelSpec
from truekv.models.ffn import MLP, FeedForward, MlpShape, MoE, MoeShape, Router, fused_experts
from truekv.models.hybrid import FeedForwardHalf, HybridLayer, HybridShape, MixerHalf
from truekv.models.mixers.gqa import GqaShape
from truekv.models.mixers.mamba2 import Mamba2Shape, checked, read_time_limits
from truekv.models.reading import Sizes, layer_kinds
from truekv.models.rotary import read_rope

if TYPE_CHECKING:
    from truekv.core.config import Config
    from truekv.core.protocols import Family
    from truekv.core.weights import Weights
    from truekv.models.blocks import Shapes


@dataclass(frozen=True, slots=True)
class GraniteFeedForward:
    """Routed experts beside a shared MLP; gate and up are one map, the gate first."""

    routing: Routing | None
    """None: a dense model, which has the shared MLP alone."""
    hidden: int
    inner: int
    shared_inner: int

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (a layer's) and their shapes."""
        shapes: Shapes = {
            f"{prefix}shared_mlp.input_linear.weight": (2 * self.shared_inner, self.hidden),
            f"{prefix}shared_mlp.output_linear.weight": (self.hidden, self.shared_inner),
        }
        if self.routing is None:
            return shapes
        mixture, experts = f"{prefix}block_sparse_moe.", self.routing.experts
        return shapes | {
            f"{mixture}router.layer.weight": (experts, self.hidden),
            f"{mixture}input_linear.weight": (experts, 2 * self.inner, self.hidden),
            f"{mixture}output_linear.weight": (experts, self.hidden, self.inner),
        }

    @property
    def live(self) -> Live:
        """What it needs for each token of a step."""
        shared = MlpShape(self.hidden, self.shared_inner)
        if self.routing is None:
            return shared.live
        # The same as any mixture's, but for the names.
        return MoeShape(self.routing, self.hidden, self.inner, shared_inner=self.shared_inner).live

    def build(self, weights: Weights, prefix: str) -> FeedForward:
        """Compose the block from its tensors; experts are views of the fused ones."""
        ops = weights.ops
        first, down = (
            weights.linear(f"{prefix}shared_mlp.input_linear"),
            weights.linear(f"{prefix}shared_mlp.output_linear"),
        )
        shared = MLP(ops, first, down)
        if self.routing is None:
            return shared
        mixture = f"{prefix}block_sparse_moe."
        router = Router(ops, self.routing, weights.take(f"{mixture}router.layer.weight"))
        fused = fused_experts(
            weights.take(f"{mixture}input_linear.weight"), weights.take(f"{mixture}output_linear.weight")
        )
        return MoE(router, ops.experts(self.routing.experts, fused, "swiglu"), shared)


class GraniteMoeHybrid:
    """GraniteMoeHybridForCausalLM, with experts or without."""

    model_types = ("granitemoehybrid",)

    def read(self, config: Config) -> HybridShape:
        """Understand the config of a released Granite 4.0 (H or dense)."""
        sizes = Sizes.read(config)
        # Released configs name the kinds as before transformers 5: mamba and attention.
        kinds = layer_kinds(
            config, sizes.layers, ["mamba"] * sizes.layers, "linear_attention", "full_attention", "mamba", "attention"
        )
        attention, recurrence = _read_attention(config, sizes), _read_mamba(config, sizes)
        ffn = FeedForwardHalf("post_attention_layernorm", "", _read_feed_forward(config, sizes))
        mixers = {
            "full_attention": MixerHalf("input_layernorm", "self_attn.", attention),
            "linear_attention": MixerHalf("input_layernorm", "mamba.", recurrence),
        }
        mixers |= {"attention": mixers["full_attention"], "mamba": mixers["linear_attention"]}
        config.only("position_embedding_type", "rope", "nope")
        turned = config.get("position_embedding_type", "nope") == "rope"
        # Without rotary positions the config still carries their fields; they say nothing then.
        config.ignore("rope_parameters", "rope_theta", "rope_scaling")
        rope = read_rope(config, sizes.head_dim, sizes.max_positions) if turned else None
        config.only("normalization_function", "rmsnorm")
        config.ignore("normalization_function", "init_method")  # the latter is about training
        embedding_scale, residual_scale, divisor = _read_multipliers(config)
        config.close()
        layers = tuple(HybridLayer(mixers[kind], ffn) for kind in kinds)
        return HybridShape(
            ModelSpec(
                family="granitemoehybrid",
                hidden_size=sizes.hidden,
                vocab_size=sizes.vocabulary,
                max_positions=sizes.max_positions,
                dtype=sizes.dtype,
                layers=tuple(mixers[kind].shape.spec() for kind in kinds),
            ),
            layers,
            sizes.eps,
            sizes.tied,
            rope,
            embedding_scale=embedding_scale,
            residual_scale=residual_scale,
            logits_scale=1.0 / divisor,
            ignored=(r"lm_head\.weight",) if sizes.tied else (),
            float32=(r".*\.A_log", r".*\.dt_bias", r".*\.mamba\.D"),
        )


def _read_multipliers(config: Config) -> tuple[float, float, float]:
    """Return what embeddings and residual branches are multiplied by, and what logits are divided by."""
    values: list[float] = []
    for name in ("embedding_multiplier", "residual_multiplier", "logits_scaling"):
        value = config.number(name, 1.0)
        if not 0.0 < value < math.inf:
            raise Refused(f"{config.where}: '{name}' is {value:g}, but must be a positive finite number")
        values.append(value)
    embedding, residual, divisor = values
    return embedding, residual, divisor


def _read_attention(config: Config, sizes: Sizes) -> GqaShape:
    bias = config.boolean("attention_bias", default=False)
    scale = config.number("attention_multiplier", 1.0)  # in place of 1 / sqrt(head_dim), not besides it
    return GqaShape(
        sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim, bias=bias, out_bias=bias, eps=sizes.eps, scale=scale
    )


def _read_mamba(config: Config, sizes: Sizes) -> Mamba2Shape:
    heads = config.integer("mamba_n_heads", high=4096)
    inner = config.integer("mamba_expand", 2, high=64) * sizes.hidden
    config.only("mamba_d_head", "auto", inner // heads)
    config.ignore("mamba_d_head", "mamba_chunk_size")  # a chunk is how far kernels look ahead, not what they compute
    if inner % heads:
        raise Refused(f"{config.where}: {heads} Mamba heads cannot share {inner} channels evenly")
    shape = Mamba2Shape(
        sizes.hidden,
        heads,
        inner // heads,
        config.integer("mamba_n_groups", 1, high=4096),
        config.integer("mamba_d_state", high=4096),
        config.integer("mamba_d_conv", 4, high=64),
        sizes.eps,
        read_time_limits(config, "time_step_limit"),
        bias=config.boolean("mamba_proj_bias", default=False),
        conv_bias=config.boolean("mamba_conv_bias", default=True),
    )
    return checked(config, shape)


def _read_feed_forward(config: Config, sizes: Sizes) -> GraniteFeedForward:
    experts = config.integer("num_local_experts", 0, low=0, high=4096)
    config.ignore("num_experts_per_tok")
    routing = None
    if experts:
        chosen = config.integer("num_experts_per_tok", high=experts)
        # The best logits, and a softmax over them alone: the same as a softmax over all, renormalised.
        routing = Routing(experts, chosen, normalised=True, float32_logits=False)
    inner, shared = config.integer("intermediate_size"), config.integer("shared_intermediate_size")
    return GraniteFeedForward(routing, sizes.hidden, inner, shared)


FAMILY: Final[Family] = GraniteMoeHybrid()
