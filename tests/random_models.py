"""Small random checkpoints with a byte tokenizer and a chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import truekv

if TYPE_CHECKING:
    from tokenizers import Tokenizer

VOCABULARY = 320
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 512,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "dtype": "float32",
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def save_dense(directory: Path, **changes: Any) -> Path:
    """Save a two-layer qwen3 in float32."""
    return _save({"model_type": "qwen3", "num_hidden_layers": 2, **_SHAPE, **changes}, directory)


def save_hybrid(directory: Path) -> Path:
    """Save a four-layer qwen3_5: three GDN layers and one of gated attention."""
    config = {
        "model_type": "qwen3_5_text",
        **_SHAPE,
        "num_hidden_layers": 4,
        "layer_types": ["linear_attention"] * 3 + ["full_attention"],
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
    }
    return _save(config, directory)


def save_mamba(directory: Path) -> Path:
    """Save a three-layer granitemoehybrid: Mamba-2, attention and Mamba-2, each with a few experts."""
    config = {
        "model_type": "granitemoehybrid",
        **_SHAPE,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_expand": 2,
        "mamba_d_conv": 4,
        "shared_intermediate_size": 48,
        "num_local_experts": 6,
        "num_experts_per_tok": 2,
        "residual_multiplier": 0.4,
    }
    return _save(config, directory)


def save_latent(directory: Path, **changes: Any) -> Path:
    """Save a two-layer deepseek_v3: latent attention, the second layer with experts."""
    config = {
        "model_type": "deepseek_v3",
        **_SHAPE,
        "num_hidden_layers": 2,
        "num_key_value_heads": 4,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 48,
        "q_lora_rank": 32,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 16,
        "v_head_dim": 32,
        "moe_intermediate_size": 32,
        "n_routed_experts": 12,
        "num_experts_per_tok": 3,
        "n_shared_experts": 1,
        "n_group": 4,
        "topk_group": 2,
    }
    del config["head_dim"]
    return _save({**config, **changes}, directory)


def _save(config: dict[str, Any], directory: Path) -> Path:
    """Write a config and random weights of the names and shapes that its family reads."""
    import torch
    from safetensors.torch import save_file

    from truekv.core.config import Config
    from truekv.models.weights import understand

    generator = torch.Generator().manual_seed(0)
    (directory / "config.json").write_text(json.dumps(config))
    shapes = understand(Config(config)).tensors
    tensors = {name: 0.2 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    # Norm weights, decays and biases of steps lie around 1.
    save_file(
        {name: 1 + one if one.ndim == 1 else one for name, one in tensors.items()}, directory / "model.safetensors"
    )
    return directory


def byte_tokenizer() -> Tokenizer:
    """Build a tokenizer of one token per byte and a few merges that cross words."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("h", "e"), ("l", "l"), ("he", "ll"), ("hell", "o"), ("o", "r")]
    vocabulary = {letter: index for index, letter in enumerate(letters)}
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL))
    return tokenizer


def add_tokenizer(directory: Path, template: str | None = None) -> Path:
    """Put the byte tokenizer, its config and a chat template (Qwen's form by default) into a checkpoint."""
    byte_tokenizer().save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    if template is None:
        template = (Path(truekv.__file__).parent / "tiny" / "chat_template.jinja").read_text()
    (directory / "chat_template.jinja").write_text(template)
    return directory
