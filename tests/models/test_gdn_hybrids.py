"""Qwen3-Next and Qwen3.5 against transformers, logit by logit, through the cache in any chunking."""

from typing import Any

import pytest
from transformers.models.qwen3_5 import (
    Qwen3_5Config,
    Qwen3_5ForCausalLM,
    Qwen3_5ForConditionalGeneration,
    Qwen3_5TextConfig,
)
from transformers.models.qwen3_5_moe import (
    Qwen3_5MoeConfig,
    Qwen3_5MoeForCausalLM,
    Qwen3_5MoeForConditionalGeneration,
    Qwen3_5MoeTextConfig,
)
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

from truekv.kernels.reference.ops import DENSE_EXPERTS

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 2,
    "max_position_embeddings": 512,
}
MIXTURE: dict[str, Any] = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
MANY = {**MIXTURE, "num_experts": DENSE_EXPERTS + 4, "num_experts_per_tok": 3}
# Three value heads to each key head, and values wider than keys.
WIDE = {"linear_num_value_heads": 6, "linear_value_head_dim": 24}
HALF = {"rope_theta": 10000.0, "rope_type": "default", "partial_rotary_factor": 0.5}
MROPE = {"mrope_section": [2, 1, 1], "mrope_interleaved": True, "rope_theta": 1e7, "partial_rotary_factor": 0.25}
EYES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
MIXED = ["linear_attention", "full_attention", "full_attention", "linear_attention"]

CASES: dict[str, tuple[Any, Any]] = {
    "qwen3_5": (Qwen3_5ForCausalLM, lambda: Qwen3_5TextConfig(**SIZES, intermediate_size=96)),
    "qwen3_5, tied, more value heads, one kv head, half rotary": (
        Qwen3_5ForCausalLM,
        lambda: Qwen3_5TextConfig(
            **{**SIZES, **WIDE, "num_key_value_heads": 1},
            intermediate_size=96,
            tie_word_embeddings=True,
            rope_parameters=HALF,
            linear_conv_kernel_dim=3,
        ),
    ),
    "qwen3_5 inside its multimodal wrapper": (
        Qwen3_5ForConditionalGeneration,
        lambda: Qwen3_5Config(
            text_config={**SIZES, **WIDE, "intermediate_size": 96, "layer_types": MIXED, "rope_parameters": MROPE},
            vision_config=EYES,
        ),
    ),
    "qwen3_5 inside its multimodal wrapper, tied": (
        Qwen3_5ForConditionalGeneration,
        lambda: Qwen3_5Config(
            text_config={**SIZES, "intermediate_size": 96, "tie_word_embeddings": True},
            vision_config=EYES,
            tie_word_embeddings=True,
        ),
    ),
    "qwen3_5_moe": (Qwen3_5MoeForCausalLM, lambda: Qwen3_5MoeTextConfig(**SIZES, **MIXTURE)),
    "qwen3_5_moe, more value heads, many experts": (
        Qwen3_5MoeForCausalLM,
        lambda: Qwen3_5MoeTextConfig(**{**SIZES, **WIDE}, **MANY),
    ),
    "qwen3_5_moe inside its multimodal wrapper": (
        Qwen3_5MoeForConditionalGeneration,
        lambda: Qwen3_5MoeConfig(text_config={**SIZES, **MIXTURE, **WIDE}, vision_config=EYES),
    ),
    "qwen3_next": (Qwen3NextForCausalLM, lambda: Qwen3NextConfig(**SIZES, **MIXTURE, intermediate_size=96)),
    "qwen3_next, more value heads, some dense layers, attention bias, plain top-k weights": (
        Qwen3NextForCausalLM,
        lambda: Qwen3NextConfig(
            **{**SIZES, **WIDE},
            **MANY,
            intermediate_size=96,
            mlp_only_layers=[1],
            decoder_sparse_step=2,
            attention_bias=True,
            norm_topk_prob=False,
        ),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_any_chunking(case: str, save: Any, parity: Any) -> None:
    model_class, config = CASES[case]
    parity(save(model_class, config()))
