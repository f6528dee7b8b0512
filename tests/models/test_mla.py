"""Latent attention: what memory holds, and that the fold changes nothing but that."""

import itertools
from typing import Any

import pytest
import torch
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from truekv import LLM
from truekv.core.spec import Field, Paged
from truekv.kernels.reference.paged import planes

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "first_k_dense_replace": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
}


def _uneven_norms(model: Any) -> None:
    """Give the latent norm weights from 0.02 to 20, as trained ones have, and large latents before them."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("kv_a_layernorm.weight"):
                weight.copy_(torch.logspace(-1.7, 1.3, len(weight))[torch.randperm(len(weight))])
            if "kv_a_proj" in name:
                weight.mul_(5.0)
            if "kv_b_proj" in name:
                weight.mul_(0.1)


def _stored(llm: LLM, tokens: list[int], field: int) -> torch.Tensor:
    """Run tokens and return what each layer stores in one field, float32 [layers, T, dim]."""
    runner = llm._engine.runner
    held = runner.arena.open()
    list(runner.teacher_force(held, tokens, itertools.repeat(7)))
    rows: list[torch.Tensor] = []
    for layer in runner.arena.layers:
        stored = layer.stored[field]
        (plane,) = planes(stored)
        data_PD = plane[held.pages, 0].flatten(0, 1)[: len(tokens)].contiguous()
        rows.append(stored.format.decode(data_PD, stored.field.dim))
    runner.arena.close(held)
    return torch.stack(rows)


@pytest.mark.parametrize("interleaved", [True, False])
def test_memory_holds_the_latent_before_its_norm_weight(interleaved: bool, save: Any) -> None:
    config = DeepseekV3Config(**SIZES, rope_interleave=interleaved, n_group=1, topk_group=1)
    tiny = save(DeepseekV3ForCausalLM, config, prepare=_uneven_norms)
    llm = LLM(str(tiny.directory), dtype="float32", debug_poison=True)
    tokens = list(range(100))
    assert (llm.logits(tokens, chunk=9) - tiny.expected(tokens)).abs().max() <= 1e-4

    latent_LTD, rope_LTR = _stored(llm, tokens, 0), _stored(llm, tokens, 1)
    assert latent_LTD.shape == (2, 100, 32)
    assert rope_LTR.shape == (2, 100, 8)
    torch.testing.assert_close(latent_LTD.square().mean(-1).sqrt(), torch.ones(2, 100), atol=1e-4, rtol=0)
    # The same rows from the reference's own first layer: normalised, not weighed.
    layer = tiny.reference.model.layers[0]
    with torch.inference_mode():
        hidden = layer.input_layernorm(tiny.reference.model.embed_tokens(torch.tensor(tokens)))
        normed = layer.self_attn.kv_a_layernorm(layer.self_attn.kv_a_proj_with_mqa(hidden)[:, :32])
    weight = layer.self_attn.kv_a_layernorm.weight.detach()
    torch.testing.assert_close(latent_LTD[0] * weight, normed, atol=1e-4, rtol=1e-4)


def test_position_zero_stores_an_unturned_rotary_key(save: Any) -> None:
    tiny = save(DeepseekV2ForCausalLM, DeepseekV2Config(**SIZES))
    layer = tiny.reference.model.layers[0]
    with torch.inference_mode():
        hidden = layer.input_layernorm(tiny.reference.model.embed_tokens(torch.tensor([5, 5])))
        raw = layer.self_attn.kv_a_proj_with_mqa(hidden)[:, 32:]
    first, second = _stored(LLM(str(tiny.directory), dtype="float32"), [5, 5], 1)[0]
    # Interleaved planes are stored as halves; turning a plane keeps its length.
    torch.testing.assert_close(first, torch.cat((raw[0, ::2], raw[0, 1::2])), atol=1e-5, rtol=1e-5)
    assert (first - second).abs().max() > 1e-3
    torch.testing.assert_close(first.view(2, 4).norm(dim=0), second.view(2, 4).norm(dim=0), atol=1e-5, rtol=1e-5)


def test_latent_and_rotary_key_are_two_fields_with_two_formats(save: Any) -> None:
    tiny = save(DeepseekV2ForCausalLM, DeepseekV2Config(**SIZES))
    fields = (Field("latent", 1, 32, "both"), Field("rope", 1, 8, "key", floor_bits=8))
    assert tiny.checkpoint.architecture.spec.layers == (Paged(fields), Paged(fields))


def test_no_weight_is_needed_twice(save: Any) -> None:
    """The up-projection lives on only in its two folded halves, as large together as the original."""
    tiny = save(DeepseekV2ForCausalLM, DeepseekV2Config(**SIZES))
    mla = tiny.checkpoint.load("float32").layers[0].mixer[1]
    key, value = mla.key.weight_HIO, mla.value.weight_HIO
    assert key.numel() + value.numel() == 4 * (16 + 24) * 32
    assert key.untyped_storage().nbytes() == key.nbytes
    assert value.untyped_storage().nbytes() == value.nbytes
