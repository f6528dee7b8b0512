"""With native operations, a token's logits do not depend on how its prompt was cut nor on who shares its steps."""

import random
from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from truekv.core.batch import Chunk
from truekv.core.protocols import Model
from truekv.formats.choice import choose_formats
from truekv.kernels.native.library import library
from truekv.kernels.native.ops import OPS as NATIVE
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
LENGTH = 70
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 72,
    "intermediate_size": 100,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
}
CASES: dict[str, tuple[Any, Any]] = {
    "dense": (Qwen3ForCausalLM, lambda: Qwen3Config(**SIZES, head_dim=24)),
    "gdn, experts": (
        Qwen3_5MoeForCausalLM,
        lambda: Qwen3_5MoeTextConfig(
            **SIZES,
            head_dim=32,
            linear_key_head_dim=16,
            linear_value_head_dim=24,
            linear_num_key_heads=2,
            linear_num_value_heads=6,
            num_experts=20,
            num_experts_per_tok=3,
            moe_intermediate_size=40,
            shared_expert_intermediate_size=48,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        ),
    ),
    "mla, experts in groups": (
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(
            **SIZES | {"num_key_value_heads": 4},
            first_k_dense_replace=1,
            kv_lora_rank=40,
            q_lora_rank=24,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=24,
            moe_intermediate_size=32,
            n_routed_experts=12,
            num_experts_per_tok=3,
            n_group=4,
            topk_group=2,
        ),
    ),
    "mamba2": (
        GraniteMoeHybridForCausalLM,
        lambda: GraniteMoeHybridConfig(
            **SIZES,
            layer_types=["mamba", "attention", "mamba"],
            mamba_n_heads=8,
            mamba_n_groups=2,
            mamba_d_state=16,
            shared_intermediate_size=48,
            num_local_experts=6,
            num_experts_per_tok=2,
            residual_multiplier=0.4,
        ),
    ),
}


def tokens_of(seed: int) -> list[int]:
    return torch.randint(128, (LENGTH,), generator=torch.Generator().manual_seed(seed)).tolist()


def run(model: Model, dtype: str, prompts: list[list[int]], seed: int | None) -> list[torch.Tensor]:
    """Logits [LENGTH, V] of each prompt: in one step each, or in shared steps of random chunks in random order."""
    formats = choose_formats(model.spec, "f32" if dtype == "float32" else "bf16", "", dtype)
    kernels = select(model.spec, [chosen or () for chosen in formats])
    planned = plan(model.spec, formats, max_model_len=LENGTH, max_num_seqs=len(prompts), dtype=dtype)
    arena = Arena(model.spec, planned, kernels, poison=True)
    held = [arena.open() for _ in prompts]
    logits: list[list[torch.Tensor]] = [[] for _ in prompts]
    source = random.Random(seed)
    with torch.inference_mode():
        while left := [index for index, sequence in enumerate(held) if sequence.position < LENGTH]:
            chosen = left[:1] if seed is None else source.sample(left, source.randint(1, len(left)))
            sizes = [LENGTH if seed is None else source.choice((1, 1, 2, 5, 40)) for _ in chosen]
            starts = [held[index].position for index in chosen]
            chunks = [
                Chunk(held[index], prompts[index][start : start + size])
                for index, start, size in zip(chosen, starts, sizes, strict=True)
            ]
            rows = model.logits(model.forward(arena.reserve(chunks), arena.layers))
            lengths = [len(chunk.tokens) for chunk in chunks]
            for index, part, length in zip(chosen, torch.split(rows, lengths), lengths, strict=True):
                logits[index].append(part)
                arena.advance(held[index], length)
    return [torch.cat(parts) for parts in logits]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("case", CASES)
def test_chunks_and_companions_change_no_bit(case: str, dtype: str, save: Any) -> None:
    model_class, config = CASES[case]
    tiny = save(model_class, config())
    model = tiny.checkpoint.load(dtype, NATIVE)
    prompts = [tokens_of(seed) for seed in range(4)]
    alone = run(model, dtype, prompts, None)
    assert not torch.equal(alone[0], alone[1])
    for seed in (1, 2):
        for ours, expected in zip(run(model, dtype, prompts, seed), alone, strict=True):
            assert torch.equal(ours, expected)
