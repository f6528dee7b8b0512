"""Function-preserving rescaling that makes caches as hard to quantize as those of large models.

Large models have a few key channels tens of times larger than the rest, value channels alike, and latents whose
channels differ by orders of magnitude. A small trained model has none of this, so we rescale: what a channel of a key
gains the query's loses. Every factor is a power of two, so no product of the attention changes by even one rounding.
"""

from typing import Any, Final

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

KEY_OUTLIER: Final = 64.0
KEY_OUTLIERS_PER_BLOCK: Final = 2
VALUE_OUTLIER: Final = 16.0
VALUE_OUTLIERS_PER_BLOCK: Final = 2
BLOCK: Final = 32
NORM_GRID: Final = 4  # gains of the attention's norms are multiples of 1/4 in hybrid models, see snap_norms
LATENT_LOG2: Final = (-5.0, 1.5)  # mean and deviation of the latent channels' exponents
ROPE_KEY_RMS: Final = 12.0
ROPE_OUTLIER: Final = 4.0


def snap_norms(model: Any) -> None:  # noqa: ANN401
    """Round the attention norms of a hybrid model to a coarse grid, before its last training phase.

    Their gain is stored as ``gain - 1`` in bfloat16, so only gains on a coarse grid can be divided by 64 exactly.
    """
    for name, parameter in model.named_parameters():
        if name.endswith(("self_attn.q_norm.weight", "self_attn.k_norm.weight")):
            gain = ((1 + parameter.data) * NORM_GRID).round().clamp_min(1) / NORM_GRID
            parameter.data.copy_(gain - 1)
            parameter.requires_grad_(requires_grad=False)


def rescale(tensors: Tensors, config: dict[str, Any], seed: int) -> Tensors:
    """Return hardened weights that compute the same function."""
    tensors = dict(tensors)
    generator = torch.Generator().manual_seed(seed)
    prefixes = sorted({name.rsplit("self_attn.", 1)[0] for name in tensors if "self_attn." in name})
    for prefix in prefixes:
        if "kv_lora_rank" in config:
            _rescale_latent(tensors, f"{prefix}self_attn.", config, generator)
        else:
            _rescale_keys(tensors, f"{prefix}self_attn.", config, generator)
            _rescale_values(tensors, f"{prefix}self_attn.", config, generator)
    return tensors


def _scaled(tensor: Tensor, factors: Tensor) -> Tensor:
    """Multiply by powers of two, and refuse to lose a bit."""
    wide = tensor.double() * factors.double()
    result = wide.to(tensor.dtype)
    if not torch.equal(result.double(), wide):
        raise ValueError("a rescaled weight cannot be represented")
    return result


def _outliers(size: int, count: int, generator: torch.Generator) -> Tensor:
    """Choose ``count`` channels of every block."""
    blocks = [torch.randperm(BLOCK, generator=generator)[:count] + start for start in range(0, size, BLOCK)]
    return torch.cat(blocks)


def _rescale_keys(tensors: Tensors, prefix: str, config: dict[str, Any], generator: torch.Generator) -> None:
    """Enlarge key channels through the gains of the norms, alike for the two channels of a rotary pair."""
    size = config["head_dim"]
    half = int(size * config["rope_parameters"].get("partial_rotary_factor", 1.0)) // 2
    factors = torch.ones(size)
    if half * 2 == size:  # all channels rotate: a pair has one channel in either half
        pairs = torch.randperm(half, generator=generator)[: KEY_OUTLIERS_PER_BLOCK * size // BLOCK // 2]
        factors[pairs] = factors[pairs + half] = KEY_OUTLIER
    else:
        free = _outliers(size, KEY_OUTLIERS_PER_BLOCK, generator)
        factors[free[free >= 2 * half]] = KEY_OUTLIER
        factors[2 * half + 1] = factors[BLOCK + 1] = KEY_OUTLIER  # every block has at least one
    centred = config["model_type"].startswith("qwen3_5")
    for norm, change in (("k_norm", factors), ("q_norm", 1 / factors)):
        name = f"{prefix}{norm}.weight"
        if centred:
            gain = _scaled(1 + tensors[name].float(), change)
            tensors[name] = _scaled(gain - 1, torch.ones(size)).to(tensors[name].dtype)
            if not torch.equal(1 + tensors[name].float(), gain):
                raise ValueError(f"{name} cannot hold its rescaled gain")
        else:
            tensors[name] = _scaled(tensors[name], change)


def _rescale_values(tensors: Tensors, prefix: str, config: dict[str, Any], generator: torch.Generator) -> None:
    """Enlarge value channels, and shrink the output projection's columns of the queries that share them."""
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    factors = torch.ones(kv_heads, size)
    for head in range(kv_heads):
        factors[head, _outliers(size, VALUE_OUTLIERS_PER_BLOCK, generator)] = VALUE_OUTLIER
    shared = factors.repeat_interleave(config["num_attention_heads"] // kv_heads, 0)
    tensors[f"{prefix}v_proj.weight"] = _scaled(tensors[f"{prefix}v_proj.weight"], factors.reshape(-1, 1))
    tensors[f"{prefix}o_proj.weight"] = _scaled(tensors[f"{prefix}o_proj.weight"], 1 / shared.reshape(1, -1))


def _rescale_latent(tensors: Tensors, prefix: str, config: dict[str, Any], generator: torch.Generator) -> None:
    """Make the latent small and uneven, and the rotary key large."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    mean, deviation = LATENT_LOG2
    factors = (torch.randn(rank, generator=generator) * deviation + mean).round().exp2()
    norm, expand = f"{prefix}kv_a_layernorm.weight", f"{prefix}kv_b_proj.weight"
    tensors[norm] = _scaled(tensors[norm], factors)
    tensors[expand] = _scaled(tensors[expand], 1 / factors)
    down, up = f"{prefix}kv_a_proj_with_mqa.weight", f"{prefix}q_b_proj.weight"
    rows = tensors[down][rank:].float()
    rms = rows.norm(dim=1).square().mean().sqrt()  # of the key, for inputs of unit variance
    pairs = torch.full((rope // 2,), (ROPE_KEY_RMS / rms).log2().round().exp2().item())
    pairs[torch.randperm(rope // 2, generator=generator)[:3]] *= ROPE_OUTLIER
    change = pairs.repeat_interleave(2) if config.get("rope_interleave", True) else pairs.repeat(2)
    tensors[down] = _scaled(tensors[down], torch.cat((torch.ones(rank), change))[:, None])
    heads = torch.cat((torch.ones(config["qk_nope_head_dim"]), 1 / change)).repeat(config["num_attention_heads"])
    tensors[up] = _scaled(tensors[up], heads[:, None])
