"""Nemotron-H and Nemotron 3: one mixer per block, Mamba-2, attention without positions, experts or an MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from truekv.core.errors import Refused
from truekv.core.spec import LayerSpec, ModelSpec, Stateless
from truekv.models.families.deepseek import read_sigmoid_routing
from truekv.models.ffn import MlpShape, MoeShape
from truekv.models.hybrid import FeedForwardHalf, HybridLayer, HybridShape, MixerHalf
from truekv.models.mixers.gqa import GqaShape
from truekv.models.mixers.mamba2 import Mamba2Shape, checked, read_time_limits
from truekv.models.reading import read_dtype

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from truekv.core.config import Config
    from truekv.core.protocols import Family

# One letter per block, as released configs spell the pattern, and both generations of names.
_LETTERS: Final = {"M": "linear_attention", "E": "moe", "*": "full_attention", "-": "mlp"}
_OLDER: Final = {"mamba": "linear_attention", "attention": "full_attention"}
_KINDS: Final = {**_LETTERS, **_OLDER, **{name: name for name in _LETTERS.values()}}


class NemotronH:
    """NemotronHForCausalLM."""

    model_types = ("nemotron_h",)

    def read(self, config: Config) -> HybridShape:
        """Understand the config of a released Nemotron-H, Nemotron Nano 2 or Nemotron 3."""
        hidden = config.integer("hidden_size")
        eps = config.number("layer_norm_epsilon", 1e-5)
        if not 0.0 < eps < 1.0:
            raise Refused(f"{config.where}: 'layer_norm_epsilon' is {eps:g}, but must be between 0 and 1")
        kinds = _read_kinds(config, "layers_block_type", "layer_types", "hybrid_override_pattern")
        config.only("num_hidden_layers", len(kinds))
        config.ignore("num_hidden_layers")
        draft_kinds = _read_kinds(config, "mtp_layers_block_type", "mtp_hybrid_override_pattern", default="*E")
        draft_kinds *= config.integer("num_nextn_predict_layers", 0, low=0, high=16)
        blocks = {kind: _READERS[kind](config, hidden, eps) for kind in dict.fromkeys(kinds + draft_kinds)}
        _close(config, eps)
        layers = tuple(blocks[kind] for kind in kinds)
        return HybridShape(
            ModelSpec(
                family="nemotron_h",
                hidden_size=hidden,
                vocab_size=config.integer("vocab_size"),
                max_positions=config.integer("max_position_embeddings", high=1 << 30),
                dtype=read_dtype(config),
                layers=tuple(_spec(layer) for layer in layers),
                draft_layers=tuple(_spec(blocks[kind]) for kind in draft_kinds),
            ),
            layers,
            eps,
            tied=False,
            prefix="backbone.",
            embedding="embeddings",
            final_norm="norm_f",
            ignored=(r"mtp\..*",),
            float32=(r".*\.A_log", r".*\.dt_bias", r".*\.mixer\.D", r".*\.e_score_correction_bias"),
        )


def _spec(layer: HybridLayer) -> LayerSpec:
    return Stateless() if layer.mixer is None else layer.mixer.shape.spec()


def _read_kinds(config: Config, *names: str, default: str = "") -> list[str]:
    """Read the kinds of blocks from the first field that is there: a list of names or a string of letters."""
    config.ignore(*names)
    name = next((name for name in names if name in config), None)
    listed: object = list(default) if name is None else config.get(name)
    kinds = [
        _KINDS.get(str(item), "") for item in cast("Seq[object]", listed if isinstance(listed, str | list) else "")
    ]
    if not kinds or not all(kinds):
        raise Refused(
            f"{config.where}: '{name or names[0]}' is {listed!r}, but must say for every block whether it is "
            f"{', '.join(sorted(_LETTERS.values()))} (letters: {' '.join(_LETTERS)})"
        )
    return kinds


def _read_mamba(config: Config, hidden: int, eps: float) -> HybridLayer:
    config.only("mamba_hidden_act", "silu")
    config.only("mamba_proj_bias", False)  # noqa: FBT003 (a neutral value, not a switch)
    config.only("mamba_ssm_cache_dtype", "float32")
    limits = read_time_limits(config, "time_step_limit")
    if limits != (0.0, float("inf")):
        raise Refused(f"{config.where}: 'time_step_limit' is {list(limits)}, but only [0.0, Infinity] is implemented")
    # The reference's forward over a whole sequence clamps dt to time_step_min and leaves time_step_limit
    # unread; its single-token step does not clamp at all. Here every token is clamped, however it came,
    # so prefill and decoding are one function, the one that the whole sequence defines.
    limits = (config.number("time_step_min", 0.001), float("inf"))
    if not 0.0 <= limits[0] < limits[1]:
        raise Refused(f"{config.where}: 'time_step_min' is {limits[0]:g}, but must be a finite time step, 0 or more")
    shape = Mamba2Shape(
        hidden,
        config.integer("mamba_num_heads", high=4096),
        config.integer("mamba_head_dim", high=4096),
        config.integer("n_groups", high=4096),
        config.integer("ssm_state_size", high=4096),
        config.integer("conv_kernel", 4, high=64),
        eps,
        limits,
        bias=config.boolean("use_bias", default=False),
        conv_bias=config.boolean("use_conv_bias", default=True),
    )
    return HybridLayer(MixerHalf("norm", "mixer.", checked(config, shape)), None)


def _read_attention(config: Config, hidden: int, eps: float) -> HybridLayer:
    config.only("attention_bias", False)  # noqa: FBT003 (a neutral value, not a switch)
    heads = config.integer("num_attention_heads", high=4096)
    kv_heads = config.integer("num_key_value_heads", heads, high=4096)
    if heads % kv_heads:
        raise Refused(f"{config.where}: {heads} query heads cannot share {kv_heads} key/value heads evenly")
    head_dim = config.integer("head_dim", config.integer("attention_head_dim", 128, high=4096), high=4096)
    return HybridLayer(MixerHalf("norm", "mixer.", GqaShape(hidden, heads, kv_heads, head_dim, eps=eps)), None)


def _read_mixture(config: Config, hidden: int, _eps: float) -> HybridLayer:
    config.only("n_shared_experts", 1)
    config.only("mlp_hidden_act", "relu2")
    config.only("mlp_bias", False)  # noqa: FBT003 (a neutral value, not a switch)
    mixture = MoeShape(
        read_sigmoid_routing(config),
        hidden,
        config.integer("moe_intermediate_size"),
        activation="relu2",
        shared_inner=config.integer("moe_shared_expert_intermediate_size"),
        shared_name="shared_experts",
        correction="e_score_correction_bias",
        latent=config.integer("moe_latent_size", 0),
    )
    return HybridLayer(None, FeedForwardHalf("norm", "mixer.", mixture))


def _read_mlp(config: Config, hidden: int, _eps: float) -> HybridLayer:
    config.only("mlp_hidden_act", "relu2")
    bias = config.boolean("mlp_bias", default=False)
    mlp = MlpShape(hidden, config.integer("intermediate_size"), activation="relu2", bias=bias)
    return HybridLayer(None, FeedForwardHalf("norm", "mixer.", mlp))


def _close(config: Config, eps: float) -> None:
    """Refuse what is left over, but for fields of other kinds of blocks and of training."""
    config.only("norm_eps", eps)
    config.only("rms_norm_eps", eps)
    config.only("tie_word_embeddings", False)  # noqa: FBT003 (a neutral value, not a switch)
    config.only("residual_in_fp32", False)  # noqa: FBT003 (a neutral value, not a switch)
    config.ignore("vocab_size", "max_position_embeddings", *_INERT.split())
    config.close()


# Fields of kinds that a checkpoint may have no block of, then of training and speed, then of the
# rotary positions that this family does not have.
_INERT: Final = """
mamba_num_heads mamba_head_dim n_groups ssm_state_size conv_kernel use_conv_bias time_step_limit time_step_min
mamba_hidden_act mamba_ssm_cache_dtype num_attention_heads num_key_value_heads head_dim attention_head_dim
mlp_hidden_act intermediate_size moe_intermediate_size moe_shared_expert_intermediate_size n_routed_experts
n_shared_experts num_experts_per_tok routed_scaling_factor norm_topk_prob n_group topk_group norm_eps rms_norm_eps
chunk_size expand time_step_max time_step_floor rescale_prenorm_residual num_logits_to_keep use_mamba_kernels
moe_shared_expert_overlap rope_theta partial_rotary_factor
"""
_READERS: Final[dict[str, Callable[[Config, int, float], HybridLayer]]] = {
    "linear_attention": _read_mamba,
    "full_attention": _read_attention,
    "moe": _read_mixture,
    "mlp": _read_mlp,
}
FAMILY: Final[Family] = NemotronH()
