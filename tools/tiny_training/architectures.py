"""The three configurations, one per cache layout."""

from typing import Final

import torch
import transformers

from tiny_training.initialisation import initialise
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
        qk_nope_head_dim=48,
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
        rope_parameters={"rope_type": "default", "rope_theta": 1000000.0},
    )


CONFIGS: Final = {"hybrid": hybrid_config, "mla": mla_config, "dense": dense_config}


def build(name: str, seed: int) -> transformers.PreTrainedModel:
    """Build a model with starting weights in float32."""
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), dtype=torch.float32)
    initialise(model)
    return model
