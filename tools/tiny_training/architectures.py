"""The three configurations, one per cache layout."""

from typing import Final

import torch
import transformers
from torch import nn

from tiny_training.tokenizer import VOCABULARY_SIZE

SHARED: Final = {
    "vocab_size": VOCABULARY_SIZE,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "bos_token_id": None,
    "use_cache": True,
    "rms_norm_eps": 1e-6,
}


def hybrid_config() -> transformers.PreTrainedConfig:
    """Three gated delta-rule layers to one gated attention layer, and a multi-token-prediction head."""
    config = transformers.Qwen3_5TextConfig(
        **SHARED,
        hidden_size=128,
        intermediate_size=320,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        linear_num_key_heads=2,
        linear_num_value_heads=4,
        linear_key_head_dim=32,
        linear_value_head_dim=32,
        full_attention_interval=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    )
    config.mtp_num_hidden_layers = 1
    return config


def mla_config() -> transformers.PreTrainedConfig:
    """Latent attention; one of the four MLPs is a mixture of experts."""
    return transformers.Glm4MoeLiteConfig(
        **SHARED,
        hidden_size=192,
        intermediate_size=384,
        moe_intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_shared_experts=1,
        routed_scaling_factor=1.0,
        kv_lora_rank=128,
        q_lora_rank=128,
        qk_rope_head_dim=64,
        qk_nope_head_dim=32,
        v_head_dim=48,
        mlp_layer_types=["dense", "dense", "sparse", "dense"],
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


def dense_config() -> transformers.PreTrainedConfig:
    """Grouped-query attention in every layer."""
    return transformers.Qwen3Config(
        **SHARED,
        hidden_size=192,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )


CONFIGS: Final = {"hybrid": hybrid_config, "mla": mla_config, "dense": dense_config}


def build(name: str, seed: int) -> transformers.PreTrainedModel:
    """Build a model with weights drawn for training: small output projections, unit-variance inputs."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim > 1:
                is_output = key.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj"))
                scale = 0.02 if "embed" in key else parameter.shape[-1] ** -0.5 * (0.3 if is_output else 0.7)
                nn.init.normal_(parameter, std=scale)
        for module in model.modules():
            if hasattr(module, "in_proj_qkv"):
                _initialise_delta_net(module)
    return model


def _initialise_delta_net(mixer: nn.Module) -> None:
    """Start as an induction head: a key is the token before its value, and queries are read as keys are.

    Filters stay small, where SiLU is almost linear and the keys keep their signs. Recall within a row is thus there
    from the first step, and training has a gradient to follow instead of a plateau to wait on.
    """
    size, heads = mixer.key_dim, mixer.num_k_heads
    mixer.in_proj_qkv.weight[:size] = mixer.in_proj_qkv.weight[size : 2 * size]
    taps = mixer.conv1d.weight.normal_(std=0.03).squeeze(1)  # [channels, taps], the present token last
    query, key, value = taps.split([size, size, mixer.value_dim])
    query[:, -1] += 0.3
    key[:, -2] += 0.3
    value[:, -1] += 0.3
    pairs = slice(size // heads, None)  # later heads match two tokens
    query[pairs, -2] += 0.3
    key[pairs, -3] += 0.3
    mixer.A_log.uniform_(1, 4).log_()
    mixer.dt_bias.copy_(torch.linspace(-7, -2, len(mixer.dt_bias)))  # memories of ten to a thousand tokens
