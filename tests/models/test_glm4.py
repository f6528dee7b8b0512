"""GLM-4.7-Flash against transformers, logit by logit, and its config as released."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Glm4MoeLiteConfig, Glm4MoeLiteForCausalLM

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.models.families.glm4_moe_lite import FAMILY

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}
RELEASED = SIZES | {
    "model_type": "glm4_moe_lite",
    "dtype": "bfloat16",
    "eos_token_id": [120, 121],
    "first_k_dense_replace": 1,
    "hidden_act": "silu",
    "n_group": 1,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "partial_rotary_factor": 1.0,
    "q_lora_rank": 24,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 1000000,
    "routed_scaling_factor": 1.8,
    "topk_group": 1,
    "topk_method": "noaux_tc",
}


def _small_latents(model: Any) -> None:
    """Make latents about as small as the root of eps, so that the eps of their norms shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "kv_a_proj" in name or "q_a_proj" in name:
                weight.mul_(2e-3)


CASES: dict[str, tuple[Any, Any]] = {
    "low-rank queries, latents so small that the eps of their norms shows": (
        lambda: Glm4MoeLiteConfig(**SIZES, q_lora_rank=24),
        _small_latents,
    ),
    "one full query map, dense in the middle, groups, biases, tied": (
        lambda: Glm4MoeLiteConfig(
            **SIZES,
            q_lora_rank=None,
            mlp_layer_types=["sparse", "dense", "sparse"],
            n_group=2,
            topk_group=1,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
        None,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_any_chunking(case: str, save: Any, parity: Any) -> None:
    config, prepare = CASES[case]
    parity(save(Glm4MoeLiteForCausalLM, config(), prepare=prepare))


def test_a_config_as_released_says_what_transformers_makes_of_it(tmp_path: Path) -> None:
    Glm4MoeLiteConfig.from_dict(RELEASED).save_pretrained(tmp_path)
    rewritten = json.loads((tmp_path / "config.json").read_text())
    ours, theirs = (FAMILY.read(Config(values)) for values in (RELEASED, rewritten))
    assert ours.layers == theirs.layers  # type: ignore[attr-defined]
    assert ours.rope == theirs.rope  # type: ignore[attr-defined]
    assert ours.rope.rope_theta == 1e6  # type: ignore[attr-defined]
    assert ours.tensors == theirs.tensors
    assert ours.spec.draft_layers == (ours.spec.layers[0],)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"mlp_layer_types": ["dense", "sparse"]}, "'mlp_layer_types' must say 'dense' or 'sparse' for each of the 3"),
        ({"mlp_layer_types": ["dense", "sparse", "moe"]}, "'mlp_layer_types' must say 'dense' or 'sparse'"),
        ({"topk_method": "greedy"}, "'topk_method' is 'greedy', but only 'noaux_tc' is implemented"),
        ({"n_group": 8, "topk_group": 8}, "8 experts cannot be routed in 8 groups of which 8 are kept"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        FAMILY.read(Config(RELEASED | change))
    assert sentence in str(refusal.value)
