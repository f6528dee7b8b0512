"""Four small random checkpoints, one per kind of memory, and frames that are far from neutral."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Final

import torch
from safetensors.torch import save_file

from truekv.core.config import Config
from truekv.core.spec import Paged
from truekv.formats.frame import Frame, Provenance, model_digest, save_frames
from truekv.models.weights import understand

if TYPE_CHECKING:
    from pathlib import Path

VOCABULARY: Final = 64
_SHAPE: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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
MODELS: Final[dict[str, dict[str, Any]]] = {
    "dense": {"model_type": "qwen3", **_SHAPE, "num_hidden_layers": 2, "head_dim": 32},
    "gdn": {
        "model_type": "qwen3_5_text",
        **_SHAPE,
        "head_dim": 32,
        "num_hidden_layers": 3,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "attn_output_gate": True,
        "linear_conv_kernel_dim": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25},
        "mtp_num_hidden_layers": 1,
    },
    "mamba2": {
        "model_type": "granitemoehybrid",
        **_SHAPE,
        "hidden_size": 64,
        "num_attention_heads": 2,
        "num_hidden_layers": 3,
        "layer_types": ["mamba", "attention", "mamba"],
        "position_embedding_type": None,
        "num_local_experts": 0,
        "num_experts_per_tok": 0,
        "shared_intermediate_size": 64,
        "mamba_n_heads": 8,
        "mamba_n_groups": 2,
        "mamba_d_state": 16,
        "mamba_d_head": 16,
        "mamba_d_conv": 4,
        "mamba_expand": 2,
        "embedding_multiplier": 1.0,
        "logits_scaling": 1.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "mla": {
        "model_type": "deepseek_v3",
        **_SHAPE,
        "num_key_value_heads": 4,
        "num_hidden_layers": 2,
        "first_k_dense_replace": 1,
        "q_lora_rank": 24,
        "kv_lora_rank": 64,
        "qk_nope_head_dim": 16,
        "qk_rope_head_dim": 32,
        "v_head_dim": 24,
        "moe_intermediate_size": 32,
        "n_routed_experts": 8,
        "n_shared_experts": 1,
        "num_experts_per_tok": 3,
        "n_group": 4,
        "topk_group": 2,
        "norm_topk_prob": True,
        "routed_scaling_factor": 1.5,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "num_nextn_predict_layers": 1,
    },
}


# The maps that write to the residual are small, so that answers fall into cycles that drafts can guess.
_BRANCHES: Final = ("o_proj", "out_proj", "down_proj", "output_linear", "experts")
_GAINS: Final = {"dense": 0.25, "gdn": 0.03, "mamba2": 0.3, "mla": 0.25}


def save_model(name: str, directory: Path) -> Path:
    """Write one of `MODELS` with random weights and frames whose centres and scales differ in every channel."""
    config = MODELS[name]
    architecture = understand(Config(config))
    if architecture.spec.draft_layers:
        architecture = architecture.with_draft_head()
    make = torch.Generator().manual_seed(0)
    tensors = {
        key: _weight(key, torch.randn(shape, generator=make), _GAINS[name])
        for key, shape in architecture.tensors.items()
    }
    (directory / "config.json").write_text(json.dumps(config))
    save_file(tensors, directory / "model.safetensors")
    spec = architecture.spec
    frames = {
        (index, field.name): Frame(
            torch.randn(field.heads, field.dim, generator=make),
            0.5 + torch.rand(field.heads, field.dim, generator=make),
        )
        for index, layer in enumerate((*spec.layers, *spec.draft_layers))
        if isinstance(layer, Paged)
        for field in layer.fields
    }
    (directory / "truekv").mkdir()
    provenance = Provenance(model_digest(spec), name, "drawn at random", 1, 1)
    save_frames(directory / "truekv" / "kv_cache_frames.safetensors", frames, provenance)
    return directory


def _weight(name: str, normal: torch.Tensor, branch: float) -> torch.Tensor:
    """Turn standard normal numbers into a weight of a plausible size."""
    if normal.ndim == 1:  # norms, decays and biases of steps lie around 1
        return 1 + 0.2 * normal
    if "embed_tokens" in name:
        return normal
    if name.endswith(("mtp.fc.weight", "eh_proj.weight")):
        # Mostly the embedding of the newest token, which is what the model's own answer depends on most.
        return torch.cat([torch.eye(len(normal)), 0.3 * normal[:, len(normal) :] * len(normal) ** -0.5], 1)
    gain = branch if any(part in name for part in _BRANCHES) else 1.4
    return gain * normal * normal.shape[-1] ** -0.5
