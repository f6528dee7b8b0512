"""In bfloat16, every latent-attention family and Mamba-2 hybrid chooses transformers' tokens.

A head of random rows says little: its two best logits are often closer than bfloat16 can tell, and
transformers itself then agrees with its own float32 at 92 to 98% of positions. So the head is made
of the model's final hidden states: the best token at a position is the position itself, by a
margin, and a context that is read wrongly is another position.
"""

from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV2ForCausalLM,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeLiteConfig,
    Glm4MoeLiteForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from truekv import LLM

PROMPT, DECODED = 200, 32
TOKENS = torch.randperm(256, generator=torch.Generator().manual_seed(3))[: PROMPT + DECODED].tolist()
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
}
MLA = SIZES | {
    "num_hidden_layers": 3,
    "num_key_value_heads": 4,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
NEMOTRON = SIZES | {
    "head_dim": 16,
    "ssm_state_size": 16,
    "mamba_num_heads": 8,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "n_routed_experts": 8,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
}
GRANITE = SIZES | {
    "num_hidden_layers": 3,
    "mamba_n_heads": 8,
    "mamba_d_state": 16,
    "shared_intermediate_size": 48,
    "attention_multiplier": 0.2,
}
CASES: dict[str, tuple[Any, Any]] = {
    "deepseek_v2": (DeepseekV2ForCausalLM, lambda: DeepseekV2Config(**MLA, q_lora_rank=None, first_k_dense_replace=1)),
    "deepseek_v2, limited groups": (
        DeepseekV2ForCausalLM,
        lambda: DeepseekV2Config(
            **MLA, q_lora_rank=24, n_group=4, topk_group=2, topk_method="group_limited_greedy", first_k_dense_replace=2
        ),
    ),
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(**MLA, q_lora_rank=24, first_k_dense_replace=1, n_group=4, topk_group=2),
    ),
    "deepseek_v3, one full query map": (
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(**MLA, q_lora_rank=None, first_k_dense_replace=2, n_group=1, topk_group=1),
    ),
    "glm4_moe_lite": (Glm4MoeLiteForCausalLM, lambda: Glm4MoeLiteConfig(**MLA, q_lora_rank=24)),
    "glm4_moe_lite, one full query map": (
        Glm4MoeLiteForCausalLM,
        lambda: Glm4MoeLiteConfig(**MLA, q_lora_rank=None, mlp_layer_types=["sparse", "dense", "sparse"]),
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        lambda: NemotronHConfig(**NEMOTRON, hybrid_override_pattern="ME*-", num_key_value_heads=4),
    ),
    "nemotron_h, one kv head": (
        NemotronHForCausalLM,
        lambda: NemotronHConfig(
            **NEMOTRON,
            hybrid_override_pattern="M*ME",
            num_key_value_heads=1,
            moe_latent_size=24,
            n_group=4,
            topk_group=2,
        ),
    ),
    "granitemoehybrid": (
        GraniteMoeHybridForCausalLM,
        lambda: GraniteMoeHybridConfig(
            **GRANITE,
            num_key_value_heads=4,
            layer_types=["mamba", "attention", "mamba"],
            mamba_n_groups=2,
            embedding_multiplier=3.0,
            residual_multiplier=0.4,
            logits_scaling=2.0,
        ),
    ),
    "granitemoehybrid, dense, one kv head, rotary": (
        GraniteMoeHybridForCausalLM,
        lambda: GraniteMoeHybridConfig(
            **GRANITE,
            num_key_value_heads=1,
            layer_types=["attention", "mamba", "attention"],
            mamba_n_groups=1,
            num_local_experts=0,
            num_experts_per_tok=0,
            position_embedding_type="rope",
        ),
    ),
}


def _telling_positions_apart(model: Any) -> None:
    """Make the head of the final hidden states of TOKENS, and keep experts' choices clear of rounding."""
    with torch.no_grad():
        embedding = model.get_input_embeddings().weight
        embedding.copy_(torch.randn(embedding.shape, generator=torch.Generator().manual_seed(5)))
        for name, bias in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                bias.mul_(5.0)  # float32 parity has narrow ones
        model.to(torch.bfloat16).float()
        hidden_TC = model.model(torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0]
        model.lm_head.weight.zero_()
        model.lm_head.weight[: len(TOKENS)] = hidden_TC / hidden_TC.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_chooses_the_same_tokens(case: str, save: Any) -> None:
    model_class, config = CASES[case]
    tiny = save(model_class, config(), prepare=_telling_positions_apart, dtype=torch.bfloat16)
    expected = tiny.expected(TOKENS).argmax(-1)
    assert (expected == torch.arange(len(TOKENS))).float().mean() >= 0.99, "the reference itself loses its place"
    llm = LLM(str(tiny.directory))
    assert {name for layer in llm.kv_plan["layers"] for name in layer["formats"].values()} <= {"bf16"}
    for chunk in ([PROMPT, 1], [1]):
        chosen = llm.logits(TOKENS, chunk=chunk).argmax(-1)
        assert (chosen == expected).float().mean() >= 0.995
