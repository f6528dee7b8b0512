"""Random checkpoints with the shapes of released models, for every engine to read: `python -m bench.checkpoints`.

Vocabularies are cut to 32,768 tokens, so that the layers are what is measured. Weights keep the size of what
passes through them: a map of C numbers is drawn with standard deviation 1 / sqrt(C), the two that write into
the residual of L layers with another 1 / sqrt(2 L), so that nothing grows with depth or with context.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from typing import TYPE_CHECKING, Any, Final

from bench.machine import FOLDER
from truekv.core.folder import choose
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from pathlib import Path

    from tokenizers import Tokenizer

VOCABULARY: Final = 32768
SPECIAL: Final = ("[gMASK]", "<|endoftext|>", "<|user|>", "<|observation|>")
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 1024,
    "hidden_act": "silu",
    "max_position_embeddings": 131072,
    "attention_bias": False,
    "attention_dropout": 0.0,
    "dtype": "bfloat16",
    "bos_token_id": 0,
    "eos_token_id": 1,
}
_DENSE: Final = _COMMON | {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "intermediate_size": 3072,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}
_HYBRID: Final = _COMMON | {
    "architectures": ["Qwen3_5ForCausalLM"],
    "model_type": "qwen3_5_text",
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "intermediate_size": 3584,
    "rms_norm_eps": 1e-6,
    "rope_parameters": {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_section": [11, 11, 10],
        "mrope_interleaved": True,
    },
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_num_key_heads": 16,
    "linear_num_value_heads": 16,
    "full_attention_interval": 4,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 6,
    "attn_output_gate": True,
    "tie_word_embeddings": True,
}
_MLA: Final = _COMMON | {
    "architectures": ["Glm4MoeLiteForCausalLM"],
    "model_type": "glm4_moe_lite",
    "num_hidden_layers": 16,
    "num_attention_heads": 20,
    "num_key_value_heads": 20,
    "q_lora_rank": 768,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 192,
    "qk_rope_head_dim": 64,
    "v_head_dim": 256,
    "rope_interleave": True,
    "intermediate_size": 4096,
    "moe_intermediate_size": 768,
    "mlp_layer_types": ["dense"] + ["sparse"] * 15,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
    "routed_scaling_factor": 1.8,
    "norm_topk_prob": True,
    "scoring_func": "sigmoid",  # what it always is; llama.cpp's converter would take softmax for a model of this size
    "n_group": 1,
    "topk_group": 1,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": False,
}
CONFIGS: Final[dict[str, dict[str, Any]]] = {"dense": _DENSE, "hybrid": _HYBRID, "mla": _MLA}
DESCRIPTIONS: Final = {
    "dense": "Qwen3-0.6B: 28 layers, 16 query / 8 kv heads of 128",
    "hybrid": "Qwen3.5-0.8B: 18 GDN layers, 6 of attention with 8 query / 2 kv heads of 256",
    "mla": "GLM-4.7-Flash made small: 16 layers, 20 heads, latent 512 + 64, 2 of 8 experts",
}


def checkpoint(name: str) -> Path:
    """Return the directory of a shape's checkpoint, written on the first call: bf16 weights of about 1 GB."""
    directory = FOLDER / "checkpoints" / name
    config = choose("checkpoint", name, CONFIGS)
    written = directory / "config.json"
    if not written.is_file() or json.loads(written.read_text()) != config:
        shutil.rmtree(directory, ignore_errors=True)
        save(directory, config)
    return directory


def save(directory: Path, config: dict[str, Any], seed: int = 0) -> Path:
    """Write config.json, bf16 model.safetensors and a byte tokenizer; the directory appears whole or not at all."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (PathLike without its type)

    from truekv.core.config import Config
    from truekv.models.weights import understand
    from truekv.serve.progress import Bar

    shapes = understand(Config(json.loads(json.dumps(config)))).tensors
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    with Bar(f"drawing {directory.name}") as bar:
        for done, (name, shape) in enumerate(shapes.items()):
            tensors[name] = _draw(name, shape, config, generator)
            bar.update(done + 1, len(shapes))
    unfinished = directory.with_name(f"{directory.name}.{os.getpid()}")
    unfinished.mkdir(parents=True)
    save_file(tensors, unfinished / "model.safetensors", metadata={"format": "pt"})
    tokenizer().save(str(unfinished / "tokenizer.json"))
    written = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": SPECIAL[0], "eos_token": SPECIAL[1]}
    (unfinished / "tokenizer_config.json").write_text(json.dumps(written))
    (unfinished / "config.json").write_text(json.dumps(config, indent=1))
    unfinished.rename(directory)
    return directory


def tokenizer() -> Tokenizer:
    """Build a tokenizer of one token per byte, with the merge and special tokens that llama.cpp's converter wants."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "he"]
    vocabulary = {word: index for index, word in enumerate(words)}
    built = Tokenizer(models.BPE(vocab=vocabulary, merges=[("h", "e")]))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    built.add_special_tokens(list(SPECIAL))
    return built


def _draw(name: str, shape: tuple[int, ...], config: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Draw one tensor by what its name says it does."""
    if name.endswith("A_log"):
        # Decays from about 0.4 to 0.999 a token, as trained ones spread.
        return torch.linspace(-5.0, 0.0, shape[0])
    if name.endswith("dt_bias"):
        return torch.zeros(shape)
    if name.endswith("e_score_correction_bias"):
        return torch.zeros(shape)
    if len(shape) == 1:
        # Norms of Qwen3.5 add one to their weight, except the gated norm of a GDN.
        zero_centred = config["model_type"] == "qwen3_5_text" and "linear_attn" not in name
        return (torch.zeros if zero_centred else torch.ones)(shape).bfloat16()
    deviation = shape[-1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj", "down_proj.weight", "out_proj.weight")):
        deviation /= math.sqrt(2 * config["num_hidden_layers"])
    return (deviation * torch.randn(shape, generator=generator)).bfloat16()


if __name__ == "__main__":
    for one in CONFIGS:
        print(checkpoint(one))
