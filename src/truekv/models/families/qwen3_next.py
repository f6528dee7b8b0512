"""Qwen3-Next: Gated DeltaNet layers with gated attention in between, over experts with a shared one."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final, cast

from truekv.core.errors import Refused
from truekv.core.ops import Routing
from truekv.models.decoder import DecoderShape, LayerShape
from truekv.models.draft import DraftShape
from truekv.models.ffn import MlpShape, MoeShape
from truekv.models.mixers.gdn import GdnShape
from truekv.models.mixers.gqa import GqaShape
from truekv.models.reading import Sizes, layer_kinds
from truekv.models.rotary import read_rope

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.config import Config
    from truekv.core.protocols import Family


class Qwen3Next:
    """Qwen3NextForCausalLM."""

    model_types = ("qwen3_next",)

    def read(self, config: Config) -> DecoderShape:
        """Understand the config of a released Qwen3-Next."""
        sizes = Sizes.read(config)
        mixture = read_mixture(config, sizes.hidden, normalised=config.boolean("norm_topk_prob", default=True))
        every = config.integer("decoder_sparse_step", 1, high=1024)
        dense = cast("list[object]", config.get("mlp_only_layers", []))
        if not isinstance(dense, list):  # pyright: ignore[reportUnnecessaryIsInstance] (JSON)
            raise Refused(f"{config.where}: 'mlp_only_layers' is {dense!r}, but must be a list of layers")
        mlp = MlpShape(sizes.hidden, config.integer("intermediate_size", mixture.shared_inner))
        ffns = [mlp if index in dense or (index + 1) % every else mixture for index in range(sizes.layers)]
        # Released configs do not say that the checkpoint has a head.
        return read_hybrid(config, "qwen3_next", sizes, ffns, packed=True, drafts=1)


def read_mixture(config: Config, hidden: int, *, normalised: bool) -> MoeShape:
    """Read the sizes of Qwen's mixture: softmax routing and one gated shared expert."""
    experts = config.integer("num_experts", high=4096)
    return MoeShape(
        Routing(
            experts,
            config.integer("num_experts_per_tok", high=experts),
            normalised=normalised,
            float32_logits=False,
        ),
        hidden,
        config.integer("moe_intermediate_size"),
        shared_inner=config.integer("shared_expert_intermediate_size"),
        shared_gate=True,
    )


def _read_attention(config: Config, sizes: Sizes) -> GqaShape:
    """Read the sizes of the gated attention."""
    bias = config.boolean("attention_bias", default=False)
    return GqaShape(
        sizes.hidden,
        sizes.heads,
        sizes.kv_heads,
        sizes.head_dim,
        bias=bias,
        out_bias=bias,
        head_norm=True,
        zero_centred=True,
        eps=sizes.eps,
        gated=True,
    )


def _read_gdn(config: Config, sizes: Sizes, *, packed: bool) -> GdnShape:
    """Read the sizes of the gated delta rule."""
    shape = GdnShape(
        sizes.hidden,
        config.integer("linear_num_key_heads", high=4096),
        config.integer("linear_num_value_heads", high=4096),
        config.integer("linear_key_head_dim", high=4096),
        config.integer("linear_value_head_dim", high=4096),
        config.integer("linear_conv_kernel_dim", low=2, high=16),
        sizes.eps,
        packed=packed,
    )
    if shape.value_heads % shape.key_heads:
        raise Refused(
            f"{config.where}: {shape.value_heads} value heads cannot share {shape.key_heads} key heads evenly"
        )
    return shape


def read_hybrid(
    config: Config,
    family: str,
    sizes: Sizes,
    ffns: Seq[MlpShape | MoeShape],
    *,
    packed: bool,
    prefixes: tuple[str, ...] = ("model.",),
    drafts: int = 0,
) -> DecoderShape:
    """Read the rest of a GDN hybrid and close its config.

    `ffns` has one block per layer; `drafts` counts the prediction layers where the config does not.
    """
    attention = _read_attention(config, sizes)
    recurrence = _read_gdn(config, sizes, packed=packed)
    every = config.integer("full_attention_interval", 4, high=1024)
    usual = ["linear_attention" if (index + 1) % every else "full_attention" for index in range(sizes.layers)]
    kinds = layer_kinds(config, sizes.layers, usual, "linear_attention", "full_attention")
    layers = tuple(
        LayerShape("self_attn", attention, ffn)
        if kind == "full_attention"
        else LayerShape("linear_attn", recurrence, ffn)
        for kind, ffn in zip(kinds, ffns, strict=True)
    )
    rope = read_rope(config, sizes.head_dim, sizes.max_positions, partial=0.25)
    drafts = config.integer("mtp_num_hidden_layers", drafts, low=0, high=16)
    config.only("mtp_use_dedicated_embeddings", False)  # noqa: FBT003 (a neutral value, not a switch)
    config.only("attn_output_gate", True)  # noqa: FBT003 (a neutral value, not a switch)
    config.only("output_gate_type", "swish", "silu")
    config.only("mamba_ssm_dtype", "float32")
    config.close()
    shape = DecoderShape.of(family, sizes, layers, rope, zero_centred=True)
    return dataclasses.replace(
        shape,
        spec=dataclasses.replace(shape.spec, draft_layers=(attention.spec(),) * drafts),
        prefixes=prefixes,
        ignored=(*shape.ignored, _DRAFT_NAMES),
        draft=_draft(attention, ffns),
        # The decay is exp(-exp(A_log) * ...): bfloat16 there moves how long a state remembers.
        float32=(r".*\.A_log", r".*\.dt_bias"),
    )


_DRAFT_NAMES: Final = r"mtp\..*"


def _draft(attention: GqaShape, ffns: Seq[MlpShape | MoeShape]) -> DraftShape:
    """Describe Qwen's head: its layer is one of full attention, with experts where the trunk has any."""
    ffn = next((ffn for ffn in ffns if isinstance(ffn, MoeShape)), ffns[0])
    return DraftShape(
        LayerShape("self_attn", attention, ffn),
        prefix="mtp.",
        layer_prefix="mtp.layers.0.",
        embedding_norm="pre_fc_norm_embedding",
        state_norm="pre_fc_norm_hidden",
        join="fc",
        norm="norm",
        names=_DRAFT_NAMES,
    )


FAMILY: Final[Family] = Qwen3Next()
