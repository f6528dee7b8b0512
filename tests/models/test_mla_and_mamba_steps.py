"""Companions in a step, and drafts that are rejected, change no logit of the real tokens."""

from typing import Any

import pytest
import torch
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    NemotronHConfig,
    NemotronHForCausalLM,
)

from truekv.core.batch import Chunk
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan

DRAFTS = 3
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
CASES: dict[str, tuple[Any, Any]] = {
    "deepseek_v3": (
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(
            **SIZES,
            num_hidden_layers=2,
            num_key_value_heads=4,
            first_k_dense_replace=1,
            kv_lora_rank=32,
            q_lora_rank=24,
            qk_nope_head_dim=16,
            qk_rope_head_dim=8,
            v_head_dim=24,
            moe_intermediate_size=32,
            n_routed_experts=8,
            num_experts_per_tok=2,
            n_group=2,
            topk_group=1,
        ),
    ),
    "nemotron_h": (
        NemotronHForCausalLM,
        lambda: NemotronHConfig(
            **SIZES,
            hybrid_override_pattern="M*ME",
            head_dim=16,
            num_key_value_heads=2,
            ssm_state_size=16,
            mamba_num_heads=8,
            mamba_head_dim=16,
            n_groups=2,
            n_routed_experts=8,
            num_experts_per_tok=2,
            moe_intermediate_size=32,
            moe_shared_expert_intermediate_size=48,
        ),
    ),
    "granitemoehybrid": (
        GraniteMoeHybridForCausalLM,
        lambda: GraniteMoeHybridConfig(
            **SIZES,
            num_hidden_layers=3,
            num_key_value_heads=2,
            layer_types=["mamba", "attention", "mamba"],
            mamba_n_heads=8,
            mamba_n_groups=2,
            mamba_d_state=16,
            shared_intermediate_size=48,
            num_local_experts=4,
            attention_multiplier=0.2,
            logits_scaling=0.5,
        ),
    ),
}
# Per step and sequence: (real tokens, drafts that follow them, drafts that are accepted).
SCHEDULE = [
    ((40, 0, 0), (1, 0, 0)),
    ((1, 3, 0), (25, 0, 0)),
    ((1, 3, 2), (1, 2, 1)),
    ((1, 0, 0), (1, 3, 3)),
    ((1, 1, 1), (7, 2, 0)),
    ((9, 3, 1), (1, 0, 0)),
]


@pytest.mark.parametrize("case", CASES)
def test_companions_and_rejected_drafts_change_nothing(case: str, save: Any) -> None:
    model_class, config = CASES[case]
    tiny = save(model_class, config())
    model = tiny.checkpoint.load("float32")
    formats = choose_formats(model.spec, "f32", "", "float32")
    kernels = select(model.spec, [chosen or () for chosen in formats])
    planned = plan(model.spec, formats, max_model_len=96, max_num_seqs=3, drafts=DRAFTS)
    arena = Arena(model.spec, planned, kernels, poison=True)
    arena.open()  # takes a slot, so that ours are not the first
    sequences = [arena.open(), arena.open()]
    texts = torch.randint(128, (2, 96), generator=torch.Generator().manual_seed(11)).tolist()
    expected = [tiny.expected(text) for text in texts]
    compared = 0
    with torch.inference_mode():
        for turn in SCHEDULE:
            chunks: list[Chunk] = []
            for sequence, text, (real, drafts, accepted) in zip(sequences, texts, turn, strict=True):
                start = sequence.position
                guess = text[start + real : start + real + accepted]
                # A rejected draft is any other token than the text's.
                guess += [(text[start + real + index] + 1) % 128 for index in range(accepted, drafts)]
                chunks.append(Chunk(sequence, text[start : start + real] + guess, drafts))
            logits = model.logits(model.forward(arena.reserve(chunks), arena.layers))
            place = 0
            for chunk, reference, (real, _drafts, accepted) in zip(chunks, expected, turn, strict=True):
                start, kept = chunk.sequence.position, real + accepted
                error = (logits[place : place + kept] - reference[start : start + kept]).abs().max().item()
                assert error <= 1e-4, f"tokens {start} to {start + kept}: {error:.2e}"
                arena.advance(chunk.sequence, kept)
                place += len(chunk.tokens)
                compared += kept
    arena.check()
    assert compared == sum(real + accepted for turn in SCHEDULE for real, _drafts, accepted in turn)
    assert sum(drafts - accepted for turn in SCHEDULE for _real, drafts, accepted in turn) > 0, "nothing was rejected"
