"""Llama, Qwen2 and Qwen3 against transformers, logit by logit, through the cache in any chunking."""

from typing import Any

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
LINEAR = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0}
CASES: dict[str, tuple[Any, Any]] = {
    "llama, one kv head, biases everywhere": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**SIZES, num_key_value_heads=1, attention_bias=True, mlp_bias=True),
    ),
    "llama, tied, heads not shared, llama3 positions": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**SIZES, num_key_value_heads=4, tie_word_embeddings=True, rope_parameters=LLAMA3),
    ),
    "llama, wide heads, linear positions": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**SIZES, num_key_value_heads=2, head_dim=48, rope_parameters=LINEAR),
    ),
    "qwen2, tied": (
        Qwen2ForCausalLM,
        lambda: Qwen2Config(**SIZES, num_key_value_heads=2, tie_word_embeddings=True),
    ),
    "qwen2, one kv head": (Qwen2ForCausalLM, lambda: Qwen2Config(**SIZES, num_key_value_heads=1)),
    "qwen3, wide heads, tied": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**SIZES, num_key_value_heads=2, head_dim=32, tie_word_embeddings=True),
    ),
    "qwen3, biases, one kv head, YaRN positions": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**SIZES, num_key_value_heads=1, head_dim=32, attention_bias=True, rope_parameters=YARN),
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_any_chunking(case: str, save: Any, parity: Any) -> None:
    model_class, config = CASES[case]
    parity(save(model_class, config()))
