"""Fast differentiable forward passes over the modules of transformers.

The modules hold the parameters under their published names; the passes here compute the same function for whole rows
without padding or cache, in bfloat16 where rounding is harmless, and with a gated delta rule that has no Python loop
over positions.
"""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
from torch import Tensor, nn

if TYPE_CHECKING:
    from collections.abc import Callable

QUERY_BLOCK: Final = 256
DELTA_CHUNK: Final = 32


@dataclass(frozen=True, slots=True)
class Rotation:
    """Cosines and sines of shape [positions, rotary dimension], and how pairs are laid out."""

    cos: Tensor
    sin: Tensor
    interleaved: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        """Rotate the leading features of [batch, heads, positions, features]."""
        size = self.cos.shape[-1]
        rotary, rest = x[..., :size], x[..., size:]
        cos, sin = self.cos.to(x.dtype), self.sin.to(x.dtype)
        if self.interleaved:
            rotary = torch.cat((rotary[..., 0::2], rotary[..., 1::2]), -1)
        first, second = rotary.chunk(2, -1)
        rotated = rotary * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((rotated, rest), -1) if rest.shape[-1] else rotated


def linear(x: Tensor, layer: nn.Module) -> Tensor:
    """Apply a linear layer in the precision of its input."""
    return F.linear(x, layer.weight.to(x.dtype))


def rms_norm(x: Tensor, norm: nn.Module, dtype: torch.dtype) -> Tensor:
    """Normalise in float32, whatever the norm's convention for its weight."""
    centred = type(norm).__name__ == "Qwen3_5RMSNorm"
    eps = norm.eps if centred else norm.variance_epsilon
    weight = 1 + norm.weight if centred else norm.weight
    x = x.float()
    return (x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight).to(dtype)


def causal_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend in blocks of queries, each to the keys up to its end: [batch, heads, positions, features] throughout."""
    length, outputs = q.shape[2], []
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    v = v.repeat_interleave(q.shape[1] // v.shape[1], 1)
    q = q * q.shape[-1] ** -0.5
    size = min(QUERY_BLOCK, length)
    future = torch.full((size, size), -math.inf, dtype=q.dtype).triu(1)
    for start in range(0, length, size):
        end = min(start + size, length)
        scores = q[:, :, start:end] @ k[:, :, :end].transpose(2, 3)
        scores = scores + F.pad(future[: end - start, : end - start], (start, 0))
        outputs.append(scores.softmax(-1) @ v[:, :, :end])
    return torch.cat(outputs, 2)


def grouped_attention(attention: nn.Module, x: Tensor, rotation: Rotation) -> Tensor:
    """Qwen3's attention, gated where the query projection is twice as wide (Qwen3.5)."""
    batch, length, _ = x.shape
    size = attention.head_dim
    q = linear(x, attention.q_proj).view(batch, length, attention.config.num_attention_heads, -1)
    gate = q[..., size:]
    q = rms_norm(q[..., :size], attention.q_norm, x.dtype).transpose(1, 2)
    k = linear(x, attention.k_proj).view(batch, length, -1, size)
    k = rms_norm(k, attention.k_norm, x.dtype).transpose(1, 2)
    v = linear(x, attention.v_proj).view(batch, length, -1, size).transpose(1, 2)
    out = causal_attention(rotation(q), rotation(k), v).transpose(1, 2)
    if gate.shape[-1]:
        out = out * gate.sigmoid()
    return linear(out.reshape(batch, length, -1), attention.o_proj)


def latent_attention(attention: nn.Module, x: Tensor, rotation: Rotation) -> Tensor:
    """DeepSeek's latent attention, as Glm4MoeLite has it."""
    batch, length, _ = x.shape
    rank, rope, nope = attention.kv_lora_rank, attention.qk_rope_head_dim, attention.qk_nope_head_dim
    q = linear(rms_norm(linear(x, attention.q_a_proj), attention.q_a_layernorm, x.dtype), attention.q_b_proj)
    q = q.view(batch, length, attention.num_heads, -1).transpose(1, 2)
    q = torch.cat((q[..., :nope], rotation(q[..., nope:])), -1)
    latent, key = linear(x, attention.kv_a_proj_with_mqa).split([rank, rope], -1)
    expanded = linear(rms_norm(latent, attention.kv_a_layernorm, x.dtype), attention.kv_b_proj)
    expanded = expanded.view(batch, length, attention.num_heads, -1).transpose(1, 2)
    key = rotation(key.unsqueeze(1)).expand(-1, attention.num_heads, -1, -1)
    out = causal_attention(q, torch.cat((expanded[..., :nope], key), -1), expanded[..., nope:])
    return linear(out.transpose(1, 2).reshape(batch, length, -1), attention.o_proj)


def gated_delta_rule(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, beta: Tensor) -> Tensor:
    """Compute the chunked rule; [batch, heads, positions, features] and [batch, heads, positions], all float32.

    Within a chunk the corrections that each position makes to the later ones solve a unit lower triangular system;
    the state of shape [key features, value features] passes from chunk to chunk.
    """
    length = q.shape[2]
    padding = -length % DELTA_CHUNK
    q, k, v = (F.pad(x, (0, 0, 0, padding)).unflatten(2, (-1, DELTA_CHUNK)) for x in (q, k, v))
    log_decay, beta = (F.pad(x, (0, padding)).unflatten(2, (-1, DELTA_CHUNK)) for x in (log_decay, beta))
    total = log_decay.cumsum(-1)
    lower = torch.ones(DELTA_CHUNK, DELTA_CHUNK, dtype=torch.bool).tril()
    decay = (total.unsqueeze(-1) - total.unsqueeze(-2)).masked_fill(~lower, -math.inf).exp()
    k_beta = k * beta.unsqueeze(-1)
    system = (k_beta @ k.transpose(-1, -2)) * decay
    right = torch.cat((v * beta.unsqueeze(-1), k_beta * total.exp().unsqueeze(-1)), -1)
    solved = torch.linalg.solve_triangular(system.tril(-1), right, upper=False, unitriangular=True)
    values, keys = solved.split([v.shape[-1], k.shape[-1]], -1)
    local = (q @ k.transpose(-1, -2)) * decay
    q = q * total.exp().unsqueeze(-1)
    k = k * (total[..., -1:] - total).exp().unsqueeze(-1)
    state, outputs = q.new_zeros(*q.shape[:2], k.shape[-1], v.shape[-1]), []
    for chunk in range(q.shape[2]):
        new = values[:, :, chunk] - keys[:, :, chunk] @ state
        outputs.append(q[:, :, chunk] @ state + local[:, :, chunk] @ new)
        state = state * total[:, :, chunk, -1:, None].exp() + k[:, :, chunk].transpose(-1, -2) @ new
    return torch.cat(outputs, 2)[:, :, :length]


def unit(x: Tensor) -> Tensor:
    """Scale the last dimension to length one."""
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + 1e-6)


def delta_net(mixer: nn.Module, x: Tensor) -> Tensor:
    """Qwen3.5's linear attention."""
    batch, length, _ = x.shape
    mixed = linear(x, mixer.in_proj_qkv).transpose(1, 2)
    kernel = mixer.conv1d.weight.to(x.dtype)
    mixed = F.conv1d(F.pad(mixed, (kernel.shape[-1] - 1, 0)), kernel, groups=mixed.shape[1])
    q, k, v = F.silu(mixed).float().split([mixer.key_dim, mixer.key_dim, mixer.value_dim], 1)
    q, k = (unit(y.unflatten(1, (mixer.num_k_heads, -1)).transpose(2, 3)) for y in (q, k))
    repeats = mixer.num_v_heads // mixer.num_k_heads
    q = q.repeat_interleave(repeats, 1) * q.shape[-1] ** -0.5
    k = k.repeat_interleave(repeats, 1)
    v = v.unflatten(1, (mixer.num_v_heads, -1)).transpose(2, 3)
    beta = linear(x, mixer.in_proj_b).float().sigmoid().transpose(1, 2)
    rate = F.softplus(linear(x, mixer.in_proj_a).float() + mixer.dt_bias)
    log_decay = (-mixer.A_log.exp() * rate).transpose(1, 2)
    out = gated_delta_rule(q, k, v, log_decay, beta).transpose(1, 2)
    gate = linear(x, mixer.in_proj_z).view(batch, length, mixer.num_v_heads, -1)
    out = rms_norm(out, mixer.norm, x.dtype) * F.silu(gate)
    return linear(out.reshape(batch, length, -1), mixer.out_proj)


def mlp(layer: nn.Module, x: Tensor) -> Tensor:
    """SwiGLU, or a mixture computed for every expert (they are few and small) and weighed by the router."""
    if not hasattr(layer, "experts"):
        return linear(F.silu(linear(x, layer.gate_proj)) * linear(x, layer.up_proj), layer.down_proj)
    router = layer.gate
    scores = F.linear(x.float(), router.weight).sigmoid()
    best = scores.topk(router.top_k, -1)
    weights = torch.zeros_like(scores).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    out = mlp(layer.shared_experts, x)
    for expert, weight in enumerate(weights.to(x.dtype).unbind(-1)):
        gate, up = F.linear(x, layer.experts.gate_up_proj[expert].to(x.dtype)).chunk(2, -1)
        hidden = F.silu(gate) * up * weight.unsqueeze(-1)
        out = out + F.linear(hidden, layer.experts.down_proj[expert].to(x.dtype))
    return out * router.routed_scaling_factor if router.routed_scaling_factor != 1 else out


def rotation(model: Any, length: int) -> Rotation:  # noqa: ANN401 (any of three model classes)
    """Tabulate the model's rotary embedding."""
    inverse = model.rotary_emb.inv_freq
    angles = torch.arange(length, device=inverse.device)[:, None] * inverse
    angles = torch.cat((angles, angles), -1)
    return Rotation(angles.cos(), angles.sin(), getattr(model.config, "rope_interleave", False))


def decoder_layer(layer: nn.Module, x: Tensor, rotate: Rotation, dtype: torch.dtype) -> Tensor:
    """Apply one layer to the float32 residual stream."""
    normed = rms_norm(x, layer.input_layernorm, dtype)
    if hasattr(layer, "linear_attn"):
        x = x + delta_net(layer.linear_attn, normed)
    else:
        attend: Callable[[nn.Module, Tensor, Rotation], Tensor]
        attend = latent_attention if hasattr(layer.self_attn, "kv_lora_rank") else grouped_attention
        x = x + attend(layer.self_attn, normed, rotate)
    return x + mlp(layer.mlp, rms_norm(x, layer.post_attention_layernorm, dtype))


def hidden_states(model: Any, ids: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    """Return the residual stream before the final norm."""
    trunk = model.model
    x = trunk.embed_tokens(ids)
    rotate = rotation(trunk, ids.shape[1])
    for layer in trunk.layers:
        x = decoder_layer(layer, x, rotate, dtype)
    return x


def logits(model: Any, hidden: Tensor, dtype: torch.dtype) -> Tensor:  # noqa: ANN401
    """Apply the final norm and the output embedding."""
    return linear(rms_norm(hidden, model.model.norm, dtype), model.lm_head).float()
