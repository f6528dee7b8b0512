"""Starting weights that already recall.

A small transformer spends most of a short training on a plateau before induction heads form: heads that find an
earlier occurrence of the present token and copy what followed it. The circuit is known, so we start from it: heads of
layer 0 attend one, two and three tokens back; heads of layer 1 compare what those wrote with the present token; the
delta rule's filters do the same within one layer. Training then has a gradient to follow from the first step.
"""

from typing import Any, Final

import torch
from torch import Tensor, nn

CONSTANT: Final = 0.15  # added to feature 0 of every embedding: the heads that look back need something constant
LOOKING_PAIRS: Final = 8  # fastest rotary pairs, which tell neighbours apart
OUTPUTS: Final = ("o_proj.weight", "out_proj.weight", "down_proj.weight", "down_proj")


@torch.no_grad()
def initialise(model: Any) -> None:  # noqa: ANN401
    """Draw all weights, small where they write to the residual stream, and wire the recall circuits."""
    quiet = 0.3 if hasattr(model.model.layers[0], "linear_attn") else 0.03
    for key, parameter in model.named_parameters():
        if parameter.ndim > 1:
            scale = parameter.shape[-1] ** -0.5 * (quiet if key.endswith(OUTPUTS) else 0.7)
            nn.init.normal_(parameter, std=0.02 if "embed" in key else scale)
    layers = model.model.layers
    for layer in layers:
        if hasattr(layer, "linear_attn"):
            _wire_delta_net(layer.linear_attn)
    if hasattr(model.config, "kv_lora_rank"):
        model.model.embed_tokens.weight[:, 0] += CONSTANT
        _wire_latent(layers[0].self_attn, layers[1].self_attn)
    elif not hasattr(layers[0], "linear_attn"):
        model.model.embed_tokens.weight[:, 0] += CONSTANT
        _wire_grouped(layers[0].self_attn, layers[1].self_attn)


def _wire_delta_net(mixer: Any) -> None:  # noqa: ANN401
    """Make a key the token before its value, and read queries as keys are.

    Filters stay small, where SiLU is almost linear and the keys keep their signs.
    """
    size, heads = mixer.key_dim, mixer.num_k_heads
    mixer.in_proj_qkv.weight[:size] = mixer.in_proj_qkv.weight[size : 2 * size]
    taps = mixer.conv1d.weight.normal_(std=0.03).squeeze(1)  # [channels, taps], the present token last
    query, key, value = taps.split([size, size, mixer.value_dim])
    query[:, -1] += 0.3
    key[:, -2] += 0.3
    value[:, -1] += 0.3
    pairs = slice(size // heads, None)  # later heads match two tokens
    query[pairs, -2] += 0.3
    key[pairs, -3] += 0.3
    mixer.A_log.uniform_(1, 4).log_()
    mixer.dt_bias.copy_(torch.linspace(-7, -2, len(mixer.dt_bias)))  # memories of ten to a thousand tokens


def _phases(pairs: int, theta: float, offset: int) -> tuple[Tensor, Tensor]:
    """First and second features of a query that meets the key (1, 0) ``offset`` tokens back."""
    angle = offset * theta ** (-torch.arange(pairs) / pairs)
    near = torch.arange(pairs) < LOOKING_PAIRS
    return angle.cos() * near, -angle.sin() * near


def _wire_grouped(look: Any, match: Any) -> None:  # noqa: ANN401
    """Wire key-value head 0 of two layers, and the query heads that share it."""
    size, theta = look.head_dim, look.config.rope_parameters["rope_theta"]
    near = (torch.arange(size // 2) < LOOKING_PAIRS).float()
    look.k_proj.weight[:size] *= 0.02
    look.k_proj.weight[: size // 2, 0] = near
    for head in range(2):
        rows = look.q_proj.weight[head * size : (head + 1) * size]
        rows *= 0.02
        rows[:, 0] = torch.cat(_phases(size // 2, theta, head + 1))
    for norm in (look.q_norm, look.k_norm, match.q_norm, match.k_norm):
        norm.weight.fill_(1.5)
    for layer in (look.v_proj, match.v_proj):
        layer.weight[:, 0] = 0  # the constant is no content
    look.o_proj.weight[0] = 0
    look.o_proj.weight[:, : 2 * size] *= 3
    written = look.o_proj.weight[:, :size]  # what the first head writes, times the value it reads
    slow = (torch.arange(size) % (size // 2) >= size // 4).float()[:, None]
    mix = nn.init.orthogonal_(torch.empty(size, size)) * slow  # compared where rotation is slow
    match.k_proj.weight[:size] = mix @ written.T
    match.q_proj.weight[:size] = mix @ look.v_proj.weight[:size]
    match.o_proj.weight[:, :size] = match.v_proj.weight[:size].T


def _wire_latent(look: Any, match: Any) -> None:  # noqa: ANN401
    """Wire the shared rotary key of one layer and head 0 of the next."""
    nope, rope, value = look.qk_nope_head_dim, look.qk_rope_head_dim, look.v_head_dim
    rank, amplitude = look.kv_lora_rank, 0.75
    near = (torch.arange(rope // 2) < LOOKING_PAIRS).float()
    down = look.kv_a_proj_with_mqa.weight
    down[rank:] *= 0.05
    down[rank::2, 0] = near * amplitude  # pairs are interleaved
    look.q_a_proj.weight[0] = 0
    look.q_a_proj.weight[0, 0] = 1
    for head in range(look.num_heads - 1):
        start = head * (nope + rope)
        rows = look.q_b_proj.weight[start : start + nope + rope]
        rows *= 0.05
        first, second = _phases(rope // 2, look.config.rope_parameters["rope_theta"], head + 1)
        rows[nope::2, 0], rows[nope + 1 :: 2, 0] = first * amplitude, second * amplitude
    down[:rank, 0] = match.kv_a_proj_with_mqa.weight[:rank, 0] = 0  # the constant is no content
    look.o_proj.weight[0] = 0
    look.o_proj.weight *= 3
    written = look.o_proj.weight[:, :value]
    read = look.kv_b_proj.weight[nope : nope + value] @ down[:rank]  # value of the first head, from the residual stream
    mix = nn.init.orthogonal_(torch.empty(nope, value))
    latent, expand = match.kv_a_proj_with_mqa.weight, match.kv_b_proj.weight
    latent[:value] = 0.7 * nn.functional.normalize(written.T, dim=1)
    expand[: nope + value] = 0
    expand[:nope, :value] = mix * 2
    expand[nope : nope + value, value : 2 * value] = torch.eye(value)
    match.q_a_proj.weight[:nope] = mix @ read
    match.q_b_proj.weight[: nope + rope] *= 0.05
    match.q_b_proj.weight[:nope, :nope] = torch.eye(nope) * 2
    match.o_proj.weight[:, :value] = latent[value : 2 * value].T


@torch.no_grad()
def forget_soon(model: nn.Module) -> None:
    """Keep the memory of every recurrent head within a few tokens, after each optimizer step.

    A trunk this small recalls facts over thousands of tokens in its recurrent state alone, and then its attention
    layers learn nothing: damage to their cache would be invisible. Large hybrids need their attention, so must this.
    """
    for module in model.modules():
        if hasattr(module, "in_proj_qkv"):
            module.A_log.zero_()
            # Decay rates softplus(dt_bias) from 1 down to 1/8 per token; the input moves them by a factor of two.
            rates = torch.logspace(0, -3, len(module.dt_bias), base=2)
            module.dt_bias.copy_(rates.expm1().log())
            module.in_proj_a.weight.clamp_(-0.005, 0.005)


@torch.no_grad()
def cool(model: nn.Module, factor: float) -> None:
    """Divide the logits of latent attention, before training goes on.

    They have no norm that bounds them. Where they have grown until each head looks at exactly one token, no gradient
    says where else to look; an eighth of them says almost the same, and learns again.
    """
    for name, parameter in model.named_parameters():
        if name.endswith("q_b_proj.weight"):
            parameter.div_(factor)
