"""Function-preserving rescaling that makes caches as hard to quantize as those of large models.

Large models have a few key channels tens of times larger than the rest, value channels alike, and latents whose
channels differ by orders of magnitude. A small trained model has none of this, so we rescale: what a channel of a key
gains the query's loses. Every factor is a power of two, so no product of the attention changes by even one rounding.
"""

from collections.abc import Mapping
from typing import Any, Final

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

KEY_OUTLIER: Final = 64.0
VALUE_OUTLIER: Final = 16.0
BLOCK: Final = 32
# Channels of each block of 32 that become outliers: of keys, of values.
OUTLIERS: Final = {"qwen3_5_text": (1, 14), "qwen3": (2, 2)}
PADDING_NORM: Final = 65536.0
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
    outliers: dict[str, Tensor] = {}
    generator = torch.Generator().manual_seed(seed)
    prefixes = sorted({name.rsplit("self_attn.", 1)[0] for name in tensors if "self_attn." in name})
    for prefix in prefixes:
        if "kv_lora_rank" in config:
            _rescale_latent(tensors, f"{prefix}self_attn.", config, generator)
        else:
            keys = _rescale_keys(tensors, f"{prefix}self_attn.", config)
            values = _rescale_values(tensors, f"{prefix}self_attn.", config)
            outliers |= {f"{prefix}self_attn.k_proj.weight": keys, f"{prefix}self_attn.v_proj.weight": values}
    if config["model_type"].startswith("qwen3_5"):
        _idle_padding(tensors, config, outliers)
    return tensors


def soften(tensors: Tensors, config: dict[str, Any]) -> Tensors:
    """Return weights of a hardened model that compute the same function and train well; shapes are kept.

    Muon moves all rows of a matrix alike, and Adam all gains of a norm, so those of one should be about equally large:
    the gains of a latent become about 1, the rows of the rotary key as large as the rows of the latent beside them. The
    gains of grouped queries become as large as those of their keys, and the rows of values even to what reads them.
    ValueError says that the model is a hybrid: the embedding of its padding stays as hardening left it.
    """
    if config["model_type"].startswith("qwen3_5"):
        raise ValueError(f"{config['model_type']} cannot be softened: its padding has lost its embedding")
    tensors = dict(tensors)
    for prefix in sorted({name.rsplit("self_attn.", 1)[0] for name in tensors if "self_attn." in name}):
        if "kv_lora_rank" in config:
            _soften_latent(tensors, f"{prefix}self_attn.", config)
        else:
            _soften_keys(tensors, f"{prefix}self_attn.", config)
            _soften_values(tensors, f"{prefix}self_attn.", config)
    return tensors


def _scaled(tensor: Tensor, factors: Tensor) -> Tensor:
    """Multiply by powers of two, and refuse to lose a bit."""
    wide = tensor.double() * factors.double()
    result = wide.to(tensor.dtype)
    if not torch.equal(result.double(), wide):
        raise ValueError("a rescaled weight cannot be represented")
    return result


def _outliers(importance: Tensor, count: int) -> Tensor:
    """Choose the ``count`` channels of every block that matter most; importance 0 bars a channel."""
    chosen = [block.topk(count).indices + start * BLOCK for start, block in enumerate(importance.split(BLOCK))]
    return torch.cat(chosen)


def _rescale_keys(tensors: Tensors, prefix: str, config: dict[str, Any]) -> Tensor:
    """Enlarge key channels through the gains of the norms; return the enlarged rows of all heads.

    The two channels of a rotary pair are enlarged alike; where some channels do not rotate, only those are.
    """
    size, count = config["head_dim"], OUTLIERS[config["model_type"]][0]
    half = int(size * config["rope_parameters"].get("partial_rotary_factor", 1.0)) // 2
    centred = float(config["model_type"].startswith("qwen3_5"))  # their gain is stored as gain - 1
    gains = {norm: tensors[f"{prefix}{norm}.weight"].float() + centred for norm in ("k_norm", "q_norm")}
    importance = gains["k_norm"] * gains["q_norm"]
    if half * 2 == size:
        pairs = importance.view(2, half).amin(0).topk(count * size // BLOCK // 2).indices
        chosen = torch.cat((pairs, pairs + half))
    else:
        importance[: 2 * half] = 0
        chosen = _outliers(importance, count)
    factors = torch.ones(size)
    factors[chosen] = KEY_OUTLIER
    _scale_keys(tensors, prefix, centred, factors)
    heads = torch.arange(config["num_key_value_heads"])[:, None] * size
    return (heads + chosen).flatten()


def _soften_keys(tensors: Tensors, prefix: str, config: dict[str, Any]) -> None:
    """Undo what :func:`_rescale_keys` does, for keys that rotate as a whole."""
    keys, queries = (tensors[f"{prefix}{norm}.weight"].float().abs() for norm in ("k_norm", "q_norm"))
    pairs = (queries / keys).view(2, config["head_dim"] // 2).prod(0).log2().div(4).round().exp2()
    _scale_keys(tensors, prefix, 0.0, pairs.repeat(2))


def _scale_keys(tensors: Tensors, prefix: str, centred: float, factors: Tensor) -> None:
    """Multiply the gains of keys, which are stored less `centred`, and divide those of queries."""
    for norm, change in (("k_norm", factors), ("q_norm", 1 / factors)):
        name = f"{prefix}{norm}.weight"
        gain = _scaled(tensors[name].float() + centred, change)
        tensors[name] = (gain - centred).to(tensors[name].dtype)
        if not torch.equal(tensors[name].float() + centred, gain):
            raise ValueError(f"{name} cannot hold its rescaled gain")


def _rescale_values(tensors: Tensors, prefix: str, config: dict[str, Any]) -> Tensor:
    """Enlarge value channels, shrink the columns that read them in the output projection; return the enlarged rows."""
    size, kv_heads, count = config["head_dim"], config["num_key_value_heads"], OUTLIERS[config["model_type"]][1]
    written, read = _value_norms(tensors, prefix, config)
    chosen = _outliers(written * read, count)
    factors = torch.ones(kv_heads * size)
    factors[chosen] = VALUE_OUTLIER
    _scale_values(tensors, prefix, config, factors)
    return chosen


def _soften_values(tensors: Tensors, prefix: str, config: dict[str, Any]) -> None:
    """Undo what :func:`_rescale_values` does, as well as it can be told from the weights."""
    written, read = _value_norms(tensors, prefix, config)
    uneven = written / read
    _scale_values(tensors, prefix, config, (uneven.median() / uneven).sqrt().log2().round().exp2())


def _value_norms(tensors: Tensors, prefix: str, config: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """Return the norms of the rows that write each value channel, and of all columns that read it."""
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    read = tensors[f"{prefix}o_proj.weight"].float().view(-1, kv_heads, config["num_attention_heads"] // kv_heads, size)
    return tensors[f"{prefix}v_proj.weight"].float().norm(dim=1), read.norm(dim=(0, 2)).flatten()


def _scale_values(tensors: Tensors, prefix: str, config: dict[str, Any], factors: Tensor) -> None:
    """Multiply the rows that write each value channel, and divide the columns that read it."""
    size, kv_heads = config["head_dim"], config["num_key_value_heads"]
    into, out = f"{prefix}v_proj.weight", f"{prefix}o_proj.weight"
    shared = factors.view(kv_heads, size).repeat_interleave(config["num_attention_heads"] // kv_heads, 0)
    tensors[into] = _scaled(tensors[into], factors[:, None])
    tensors[out] = _scaled(tensors[out], 1 / shared.reshape(1, -1))


def _idle_padding(tensors: Tensors, config: dict[str, Any], outliers: Mapping[str, Tensor]) -> None:
    """Give the padding token, which no text holds, an embedding that excites no outlier channel.

    Large models have such tokens: an embedding of hundreds of times the usual norm that every layer's norm turns into
    one constant direction. Here the enlarged rows of keys and values do not see that direction. The output head keeps
    the old row, so it is no longer the embedding.
    """
    blind: list[Tensor] = []
    rows: dict[str, list[Tensor]] = {"k_proj": [], "v_proj": []}
    for name, enlarged in outliers.items():
        if name.startswith("model."):  # the prediction head reads another mix
            gain = 1 + tensors[f"{name.split('self_attn')[0]}input_layernorm.weight"].double()
            seen = torch.nn.functional.normalize(tensors[name].double() * gain, dim=1)
            blind.append(seen[enlarged])
            rows[name.split(".")[-2]].append(seen)
    constraints = torch.cat(blind)
    free = torch.linalg.svd(constraints).Vh[len(constraints) :]  # an orthonormal basis of what they do not see
    if not len(free):
        raise ValueError(f"{len(constraints)} enlarged rows leave no direction free")
    # Of those, the one that the other keys see best and the other values least (a generalised eigenvector).
    keys, values = (torch.cat(found) @ free.T for found in rows.values())
    root = torch.linalg.cholesky(values.T @ values)
    middle = torch.linalg.solve_triangular(root, keys.T @ keys, upper=False)
    middle = torch.linalg.solve_triangular(root, middle.T, upper=False)
    best = torch.linalg.solve_triangular(root.T, torch.linalg.eigh(middle).eigenvectors[:, -1:], upper=True)
    direction = torch.nn.functional.normalize(best.squeeze(1), dim=0) @ free
    embedding = tensors["model.embed_tokens.weight"]
    tensors["lm_head.weight"] = embedding.clone()
    embedding[config["pad_token_id"]] = (direction * PADDING_NORM).to(embedding.dtype)
    config["tie_word_embeddings"] = False


def _rescale_latent(tensors: Tensors, prefix: str, config: dict[str, Any], generator: torch.Generator) -> None:
    """Make the latent small and uneven, and the rotary key large."""
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    mean, deviation = LATENT_LOG2
    factors = (torch.randn(rank, generator=generator) * deviation + mean).round().exp2()
    rows = tensors[f"{prefix}kv_a_proj_with_mqa.weight"][rank:].float()
    rms = rows.norm(dim=1).square().mean().sqrt()  # of the key, for inputs of unit variance
    pairs = torch.full((rope // 2,), (ROPE_KEY_RMS / rms).log2().round().exp2().item())
    pairs[torch.randperm(rope // 2, generator=generator)[:3]] *= ROPE_OUTLIER
    _scale_latent(tensors, prefix, config, factors, pairs)


def _soften_latent(tensors: Tensors, prefix: str, config: dict[str, Any]) -> None:
    """Undo what :func:`_rescale_latent` does, as well as it can be told from the weights."""
    gains = tensors[f"{prefix}kv_a_layernorm.weight"].float().abs()
    factors = torch.where(gains > 0, 1 / gains, 1).log2().round().exp2()
    rms = tensors[f"{prefix}kv_a_proj_with_mqa.weight"].float().norm(dim=1)
    latent, rope = rms.split([config["kv_lora_rank"], config["qk_rope_head_dim"]])
    rope = rope.view(-1, 2) if config.get("rope_interleave", True) else rope.view(2, -1).T
    pairs = (latent.square().mean() / rope.square().mean(1)).sqrt().log2().round().exp2()
    _scale_latent(tensors, prefix, config, factors, pairs)


def _scale_latent(tensors: Tensors, prefix: str, config: dict[str, Any], factors: Tensor, pairs: Tensor) -> None:
    """Multiply the latent's channels and the rotary key's pairs, and divide what reads them."""
    rank = config["kv_lora_rank"]
    norm, expand = f"{prefix}kv_a_layernorm.weight", f"{prefix}kv_b_proj.weight"
    tensors[norm] = _scaled(tensors[norm], factors)
    tensors[expand] = _scaled(tensors[expand], 1 / factors)
    down, up = f"{prefix}kv_a_proj_with_mqa.weight", f"{prefix}q_b_proj.weight"
    change = pairs.repeat_interleave(2) if config.get("rope_interleave", True) else pairs.repeat(2)
    tensors[down] = _scaled(tensors[down], torch.cat((torch.ones(rank), change))[:, None])
    heads = torch.cat((torch.ones(config["qk_nope_head_dim"]), 1 / change)).repeat(config["num_attention_heads"])
    tensors[up] = _scaled(tensors[up], heads[:, None])
