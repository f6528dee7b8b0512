"""DeepSeek V2 and V3: latent attention; the first layers are dense, the others mix experts with shared ones."""

from __future__ import annotations

import dataclasses
import math
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.ops import Routing
from truekv.models.decoder import DecoderShape, LayerShape
from truekv.models.draft import DraftShape
from truekv.models.ffn import MlpShape, MoeShape
from truekv.models.mixers.mla import read_mla
from truekv.models.reading import Sizes

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.config import Config
    from truekv.core.protocols import Family


class DeepSeek:
    """DeepseekV2ForCausalLM and DeepseekV3ForCausalLM."""

    model_types = ("deepseek_v2", "deepseek_v3")

    def read(self, config: Config) -> DecoderShape:
        """Understand the config of a released DeepSeek V2, V2-Lite, V3 or R1."""
        family = config.string("model_type")
        sizes = Sizes.read(config)
        routing, interleaved, drafts = _VERSIONS[family](config)
        dense = min(config.integer("first_k_dense_replace", 0, low=0, high=1024), sizes.layers)
        config.only("moe_layer_freq", 1)
        config.only("mlp_bias", False)  # noqa: FBT003 (a neutral value, not a switch)
        config.ignore("moe_layer_freq", "ep_size")
        sparse = [index >= dense for index in range(sizes.layers)]
        return read_latent_decoder(config, family, sizes, sparse, routing, interleaved=interleaved, drafts=drafts)


def read_latent_decoder(
    config: Config,
    family: str,
    sizes: Sizes,
    sparse: Seq[bool],
    routing: Routing,
    *,
    interleaved: bool,
    drafts: int,
) -> DecoderShape:
    """Read the rest of a latent-attention model and close its config; `sparse` says which layers mix experts."""
    attention, rope = read_mla(config, sizes.hidden, sizes.max_positions, interleaved=interleaved)
    mlp = MlpShape(sizes.hidden, config.integer("intermediate_size"))
    inner = config.integer("moe_intermediate_size")
    mixture = MoeShape(
        routing,
        sizes.hidden,
        inner,
        shared_inner=inner * config.integer("n_shared_experts", 0, low=0, high=1024),
        shared_name="shared_experts",
        correction="e_score_correction_bias" if routing.score == "sigmoid" else "",
    )
    config.close()
    layers = tuple(LayerShape("self_attn", attention, mixture if mixes else mlp) for mixes in sparse)
    shape = DecoderShape.of(family, sizes, layers, rope)
    # The multi-token-prediction layers follow the last one under its numbers. Checkpoints hold them
    # even where the config has been stripped of the field that counts them.
    past_end = "|".join(str(sizes.layers + index) for index in range(max(1, drafts)))
    draft = _draft(LayerShape("self_attn", attention, mixture), f"model.layers.{sizes.layers}.", past_end)
    return dataclasses.replace(
        shape,
        spec=dataclasses.replace(shape.spec, draft_layers=(attention.spec(),) * drafts),
        ignored=(*shape.ignored, draft.names, r"model\.layers\.\d+\.self_attn\.rotary_emb\..*"),
        draft=draft,
        # The bias decides between experts whose scores are close: bfloat16 would choose others.
        float32=(r".*\.e_score_correction_bias",),
    )


def _draft(layer: LayerShape, prefix: str, past_end: str) -> DraftShape:
    """Describe the head that follows the last layer; it always mixes experts."""
    return DraftShape(
        layer,
        prefix=prefix,
        layer_prefix=prefix,
        embedding_norm="enorm",
        state_norm="hnorm",
        join="eh_proj",
        norm="shared_head.norm",
        names=rf"model\.layers\.({past_end})\..*",
        # Released checkpoints hold the trunk's embedding and output head a second time under these names.
        copies=(rf"model\.layers\.({past_end})\.(embed_tokens|shared_head\.head)\.weight",),
    )


def read_sigmoid_routing(config: Config) -> Routing:
    """Read the fields of the router that DeepSeek-V3 introduced (noaux_tc)."""
    config.only("scoring_func", "sigmoid")
    config.only("topk_method", "noaux_tc")
    config.ignore("scoring_func", "topk_method")
    routing = Routing(
        experts=config.integer("n_routed_experts", high=4096),
        per_token=config.integer("num_experts_per_tok", high=4096),
        score="sigmoid",
        normalised=config.boolean("norm_topk_prob", default=True),
        scale=config.number("routed_scaling_factor", 1.0),
        groups=config.integer("n_group", 1, high=4096),
        kept_groups=config.integer("topk_group", 1, high=4096),
    )
    return checked_routing(config, routing, ranked=2)


def checked_routing(config: Config, routing: Routing, *, ranked: int) -> Routing:
    """Refuse groups that cannot be ranked by their `ranked` best experts or hold too few, and unusable scales."""
    size = routing.experts // routing.groups
    if routing.experts % routing.groups or size < ranked or routing.kept_groups > routing.groups:
        raise Refused(
            f"{config.where}: {routing.experts} experts cannot be routed in {routing.groups} groups "
            f"of which {routing.kept_groups} are kept"
        )
    if not 0.0 < routing.scale < math.inf:
        raise Refused(f"{config.where}: 'routed_scaling_factor' is {routing.scale:g}, but must be positive and finite")
    if routing.per_token > size * routing.kept_groups:
        raise Refused(
            f"{config.where}: 'num_experts_per_tok' is {routing.per_token}, "
            f"but the kept groups hold {size * routing.kept_groups} experts"
        )
    return routing


def _read_v2(config: Config) -> tuple[Routing, bool, int]:
    """Return V2's routing, whether rotary planes are interleaved, and its draft layers (none)."""
    config.only("scoring_func", "softmax")
    config.only("topk_method", "greedy", "group_limited_greedy")
    config.only("norm_topk_prob", False)  # noqa: FBT003 (a neutral value, not a switch)
    config.ignore("scoring_func", "norm_topk_prob")
    groups, kept = config.integer("n_group", 1, high=4096), config.integer("topk_group", 1, high=4096)
    limited = config.string("topk_method", "greedy") == "group_limited_greedy"
    routing = Routing(
        experts=config.integer("n_routed_experts", high=4096),
        per_token=config.integer("num_experts_per_tok", high=4096),
        normalised=False,
        scale=config.number("routed_scaling_factor", 1.0),
        groups=groups if limited else 1,
        kept_groups=kept if limited else 1,
    )
    return checked_routing(config, routing, ranked=1), True, 0


def _read_v3(config: Config) -> tuple[Routing, bool, int]:
    """Return V3's routing, whether rotary planes are interleaved, and its draft layers."""
    interleaved = config.boolean("rope_interleave", default=True)
    return read_sigmoid_routing(config), interleaved, config.integer("num_nextn_predict_layers", 0, low=0, high=16)


_VERSIONS: Final = {"deepseek_v2": _read_v2, "deepseek_v3": _read_v3}
FAMILY: Final[Family] = DeepSeek()
