"""Granite 4.0 against transformers, logit by logit, and its config as released."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.kernels.reference.ops import DENSE_EXPERTS
from truekv.models.families.granitemoehybrid import FAMILY

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "mamba_d_state": 16,
    "shared_intermediate_size": 48,
}
CASES: dict[str, Any] = {
    "many experts, no positions, two groups, all four multipliers, kv heads not shared": lambda: GraniteMoeHybridConfig(
        **SIZES,
        num_key_value_heads=4,
        layer_types=["mamba", "attention", "mamba"],
        mamba_n_heads=8,
        mamba_n_groups=2,
        num_local_experts=DENSE_EXPERTS + 4,
        num_experts_per_tok=3,
        attention_multiplier=0.2,
        embedding_multiplier=3.0,
        residual_multiplier=0.4,
        logits_scaling=0.5,
    ),
    "dense, rotary, one kv head, one group, clamped time steps, biases, no conv bias, tied": (
        lambda: GraniteMoeHybridConfig(
            **SIZES,
            num_key_value_heads=1,
            layer_types=["attention", "mamba", "attention"],
            position_embedding_type="rope",
            mamba_n_heads=4,
            mamba_n_groups=1,
            num_local_experts=0,
            num_experts_per_tok=0,
            attention_bias=True,
            attention_multiplier=0.2,
            mamba_conv_bias=False,
            mamba_proj_bias=True,
            time_step_limit=(0.1, 0.5),
            tie_word_embeddings=True,
        )
    ),
}
RELEASED = SIZES | {
    "model_type": "granitemoehybrid",
    "attention_bias": False,
    "attention_multiplier": 0.0078125,
    "embedding_multiplier": 12,
    "hidden_act": "silu",
    "init_method": "mup",
    "layer_types": ["mamba", "attention", "mamba"],
    "logits_scaling": 6,
    "mamba_chunk_size": 256,
    "mamba_conv_bias": True,
    "mamba_d_conv": 4,
    "mamba_d_head": 16,
    "mamba_expand": 2,
    "mamba_n_groups": 1,
    "mamba_n_heads": 8,
    "mamba_proj_bias": False,
    "normalization_function": "rmsnorm",
    "num_experts_per_tok": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "position_embedding_type": "nope",
    "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 10000,
    "router_aux_loss_coef": 0.01,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_any_chunking(case: str, save: Any, parity: Any) -> None:
    parity(save(GraniteMoeHybridForCausalLM, CASES[case]()))


def test_a_config_as_released_says_what_transformers_makes_of_it(tmp_path: Path) -> None:
    GraniteMoeHybridConfig.from_dict(RELEASED).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    ours, theirs = (FAMILY.read(Config(values)) for values in (RELEASED, rewritten))
    assert ours == theirs
    assert ours.tensors == theirs.tensors
    assert ours.spec.hybrid


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"position_embedding_type": "alibi"}, "'position_embedding_type' is 'alibi', but only 'rope' or 'nope'"),
        ({"layer_types": ["mamba", "mamba2", "mamba"]}, "'layer_types'[1] is 'mamba2'"),
        ({"mamba_d_head": 32}, "'mamba_d_head' is 32, but only 'auto' or 16 is implemented"),
        ({"mamba_n_heads": 3, "mamba_d_head": None}, "3 Mamba heads cannot share 128 channels evenly"),
        ({"mamba_n_groups": 3}, "8 Mamba heads cannot be shared out to 3 groups"),
        ({"time_step_limit": [0.1]}, "'time_step_limit' is [0.1], but must be two time steps"),
        ({"time_step_limit": [1.0, 0.1]}, "'time_step_limit' is [1.0, 0.1], but must be two time steps"),
        ({"logits_scaling": 0}, "'logits_scaling' is 0, but must be a positive finite number"),
        ({"embedding_multiplier": float("inf")}, "'embedding_multiplier' is inf, but must be a positive finite number"),
        ({"normalization_function": "layernorm"}, "'normalization_function' is 'layernorm', but only 'rmsnorm'"),
        ({"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9, but must be an integer from 1 to 8"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        FAMILY.read(Config(RELEASED | change))
    assert sentence in str(refusal.value)
