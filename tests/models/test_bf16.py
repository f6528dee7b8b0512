"""In bfloat16, dense families and GDN hybrids choose transformers' tokens, and are no less accurate.

The head is made of the model's own final hidden states (see test_mla_and_mamba_bf16.py): the best
token at a position is that position, by a margin that bfloat16 can tell, and a context that is read
wrongly is another position. So no position needs to be excused as a tie.
"""

from typing import Any

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3_5 import Qwen3_5ForCausalLM, Qwen3_5TextConfig
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig
from transformers.models.qwen3_next import Qwen3NextConfig, Qwen3NextForCausalLM

from truekv.kernels.native.library import library
from truekv.kernels.native.ops import OPS as NATIVE

PROMPT, DECODED = 200, 32
TOKENS = torch.randperm(256, generator=torch.Generator().manual_seed(3))[: PROMPT + DECODED].tolist()
SIZES: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
DENSE = SIZES | {"intermediate_size": 96}
HYBRID = SIZES | {
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 24,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 6,
}
MIXTURE = HYBRID | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
CASES: dict[str, tuple[Any, Any]] = {
    "llama": (LlamaForCausalLM, lambda: LlamaConfig(**DENSE)),
    "llama, biases, one kv head": (
        LlamaForCausalLM,
        lambda: LlamaConfig(**DENSE | {"num_key_value_heads": 1, "attention_bias": True, "mlp_bias": True}),
    ),
    "qwen2": (Qwen2ForCausalLM, lambda: Qwen2Config(**DENSE)),
    "qwen2, one kv head": (Qwen2ForCausalLM, lambda: Qwen2Config(**DENSE | {"num_key_value_heads": 1})),
    "qwen3": (Qwen3ForCausalLM, lambda: Qwen3Config(**DENSE, head_dim=32)),
    "qwen3, biases, heads not shared": (
        Qwen3ForCausalLM,
        lambda: Qwen3Config(**DENSE | {"num_key_value_heads": 4, "head_dim": 16, "attention_bias": True}),
    ),
    "qwen3_5": (Qwen3_5ForCausalLM, lambda: Qwen3_5TextConfig(**HYBRID, intermediate_size=96)),
    "qwen3_5, as many value as key heads, one kv head": (
        Qwen3_5ForCausalLM,
        lambda: Qwen3_5TextConfig(
            **HYBRID | {"linear_num_value_heads": 2, "num_key_value_heads": 1}, intermediate_size=96
        ),
    ),
    "qwen3_5_moe": (Qwen3_5MoeForCausalLM, lambda: Qwen3_5MoeTextConfig(**MIXTURE)),
    "qwen3_5_moe, many experts": (
        Qwen3_5MoeForCausalLM,
        lambda: Qwen3_5MoeTextConfig(**MIXTURE | {"num_experts": 20, "num_experts_per_tok": 3}),
    ),
    "qwen3_next": (Qwen3NextForCausalLM, lambda: Qwen3NextConfig(**MIXTURE, intermediate_size=96)),
    "qwen3_next, some dense layers, plain top-k weights": (
        Qwen3NextForCausalLM,
        lambda: Qwen3NextConfig(**MIXTURE, intermediate_size=96, mlp_only_layers=[1], norm_topk_prob=False),
    ),
}


def telling_positions_apart(model: Any) -> None:
    """Make the head of the final hidden states of TOKENS, in weights that bfloat16 holds exactly."""
    with torch.no_grad():
        model.to(torch.bfloat16).float()
        hidden_TC = model.model(torch.tensor([TOKENS]), use_cache=False).last_hidden_state[0]
        model.lm_head.weight.zero_()
        model.lm_head.weight[: len(TOKENS)] = hidden_TC / hidden_TC.norm(dim=-1, keepdim=True)


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_chooses_the_same_tokens(case: str, save: Any, replay: Any) -> None:
    model_class, config = CASES[case]
    tiny = save(model_class, config(), prepare=telling_positions_apart, dtype=torch.bfloat16)
    expected = tiny.expected(TOKENS)
    chosen = expected.argmax(-1)
    assert (chosen == torch.arange(len(TOKENS))).float().mean() >= 0.99, "the reference itself loses its place"
    exact, _ = replay(tiny.checkpoint.load("float32"), TOKENS, [len(TOKENS)])
    reference = tiny.checkpoint.load()
    native = tiny.checkpoint.load(ops=NATIVE) if library() is not None else reference
    for model, cuts in ((reference, [PROMPT] + [1] * DECODED), (native, [1] * (PROMPT + DECODED))):
        logits, calls = replay(model, TOKENS, cuts, dtype="bfloat16")
        assert {kernel for kernel in calls if kernel.startswith("attend")} == {"attend[bf16/bf16]"}
        assert (logits.argmax(-1) == chosen).float().mean() >= 0.995
        # Norms, rotation, routing and sums of experts round once: bfloat16 costs us no more than it costs them.
        assert (logits - exact).abs().mean() <= (expected - exact).abs().mean()
