"""The forms in which one model's weights lie on disk: fused experts, a second head, drafts and eyes beside them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3_5 import Qwen3_5Config, Qwen3_5ForCausalLM, Qwen3_5ForConditionalGeneration
from transformers.models.qwen3_5_moe import Qwen3_5MoeForCausalLM, Qwen3_5MoeTextConfig

from truekv.core.errors import Refused
from truekv.core.spec import Paged
from truekv.models.weights import Checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "max_position_embeddings": 512,
    "layer_types": ["linear_attention", "full_attention"],
}
EYES = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "patch_size": 4,
    "out_hidden_size": 64,
    "num_position_embeddings": 16,
}
TOKENS = [(7 * index) % 128 for index in range(50)]


@pytest.fixture
def mixture(save: Any) -> Any:
    return save(
        Qwen3_5MoeForCausalLM,
        Qwen3_5MoeTextConfig(
            **SIZES, num_experts=6, num_experts_per_tok=2, moe_intermediate_size=32, shared_expert_intermediate_size=48
        ),
    )


@pytest.fixture
def wrapper(save: Any) -> Any:
    config = Qwen3_5Config(text_config={**SIZES, "intermediate_size": 96}, vision_config=EYES)
    return save(Qwen3_5ForConditionalGeneration, config)


def rewrite(directory: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    weights = change(load_file(directory / "model.safetensors"))
    save_file({name: item.contiguous() for name, item in weights.items()}, directory / "model.safetensors")


def fused(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Join the experts as the released Qwen3.5 mixtures do."""
    kept = {name: item for name, item in weights.items() if ".experts." not in name}
    for layer in range(SIZES["num_hidden_layers"]):
        prefix = f"model.layers.{layer}.mlp.experts."
        gate, up, down = (
            torch.stack([weights[f"{prefix}{index}.{part}_proj.weight"] for index in range(6)])
            for part in ("gate", "up", "down")
        )
        kept |= {f"{prefix}gate_up_proj": torch.cat((gate, up), 1), f"{prefix}down_proj": down}
    return kept


def test_fused_experts_give_the_same_logits(mixture: Any, replay: Any) -> None:
    apart, _ = replay(mixture.checkpoint.load("float32"), TOKENS, [20, 30])
    rewrite(mixture.directory, fused)
    checkpoint = mixture.checkpoint
    assert "model.layers.0.mlp.experts.gate_up_proj" in checkpoint.tensors
    together, _ = replay(checkpoint.load("float32"), TOKENS, [20, 30])
    assert torch.equal(apart, together)
    assert (together - mixture.expected(TOKENS)).abs().max() <= 1e-4


def test_half_fused_experts_are_refused(mixture: Any) -> None:
    def half(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        joined = fused(weights)
        joined.pop("model.layers.1.mlp.experts.down_proj")
        return joined

    rewrite(mixture.directory, half)
    with pytest.raises(Refused, match=r"model\.layers\.1\.mlp\.experts\.down_proj"):
        mixture.checkpoint.load("float32")


def test_drafts_and_eyes_are_known_and_left_alone(wrapper: Any, replay: Any) -> None:
    checkpoint = wrapper.checkpoint
    assert any(name.startswith("model.visual.") for name in checkpoint.headers)
    rewrite(wrapper.directory, lambda weights: weights | {"mtp.fc.weight": torch.zeros(64, 128)})
    config = json.loads((wrapper.directory / "config.json").read_text())
    config["text_config"]["mtp_num_hidden_layers"] = 1
    (wrapper.directory / "config.json").write_text(json.dumps(config))
    drafted = wrapper.checkpoint
    assert not checkpoint.architecture.spec.draft_layers
    (draft,) = drafted.architecture.spec.draft_layers
    assert isinstance(draft, Paged)
    assert draft == drafted.architecture.spec.layers[1]
    assert not any(name.startswith(("mtp", "model.visual")) for name in drafted.tensors)
    logits, _ = replay(drafted.load("float32"), TOKENS, [50])
    assert (logits - wrapper.expected(TOKENS)).abs().max() <= 1e-4


def test_a_tensor_that_nobody_knows_is_refused(wrapper: Any) -> None:
    rewrite(wrapper.directory, lambda weights: weights | {"model.audio.weight": torch.zeros(2)})
    with pytest.raises(Refused, match=r"model\.audio\.weight"):
        wrapper.checkpoint.load("float32")


def test_text_taken_out_of_its_wrapper_and_saved_again_is_the_same_model(
    wrapper: Any, replay: Any, tmp_path: Path
) -> None:
    Qwen3_5ForCausalLM.from_pretrained(wrapper.directory).save_pretrained(tmp_path)
    logits, _ = replay(Checkpoint.open(str(tmp_path)).load("float32"), TOKENS, [50])
    expected, _ = replay(wrapper.checkpoint.load("float32"), TOKENS, [50])
    assert torch.equal(logits, expected)


def test_a_tied_checkpoint_may_hold_its_head_twice(save: Any, replay: Any) -> None:
    config = Qwen3Config(
        **{name: SIZES[name] for name in ("vocab_size", "hidden_size", "num_hidden_layers", "head_dim")},
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
    )
    tiny = save(Qwen3ForCausalLM, config)
    assert "lm_head.weight" not in tiny.checkpoint.headers
    once, _ = replay(tiny.checkpoint.load("float32"), TOKENS, [50])
    rewrite(tiny.directory, lambda weights: weights | {"lm_head.weight": weights["model.embed_tokens.weight"].clone()})
    twice, _ = replay(tiny.checkpoint.load("float32"), TOKENS, [50])
    assert torch.equal(once, twice)


def test_decays_stay_exact_in_bfloat16(mixture: Any) -> None:
    weights = load_file(mixture.directory / "model.safetensors")
    recurrence = mixture.checkpoint.load("bfloat16").layers[0].mixer[1]
    assert recurrence.inputs.parts[0].weight.dtype == torch.bfloat16
    prefix = "model.layers.0.linear_attn."
    torch.testing.assert_close(recurrence.rate_H, -weights[f"{prefix}A_log"].exp())
    assert torch.equal(recurrence.dt_bias_H, weights[f"{prefix}dt_bias"])
