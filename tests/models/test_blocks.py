"""Norms, rotary positions, routers and mixtures against transformers' own, part by part."""

from typing import Any

import pytest
import torch
from memory.toys import make_arena
from transformers import DeepseekV2Config, DeepseekV3Config, LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2TopkRouter
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding, apply_rotary_pos_emb
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextRMSNorm

from truekv.core.batch import Chunk
from truekv.core.config import Config
from truekv.core.ops import Expert, Ops, Part, Routing
from truekv.core.weights import Weights
from truekv.kernels.native.ops import OPS as NATIVE
from truekv.kernels.reference.ops import DENSE_EXPERTS
from truekv.kernels.reference.ops import OPS as REFERENCE
from truekv.kernels.reference.paged import planes
from truekv.models.blocks import RMSNorm
from truekv.models.ffn import MlpShape, MoE, MoeShape, Router, fused_experts
from truekv.models.mixers.gqa import GqaShape
from truekv.models.rotary import Rotary, read_rope

both = pytest.mark.parametrize("ops", [REFERENCE, NATIVE], ids=["reference", "native"])

ROPES: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 256,
    },
    "yarn": {"factor": 16.0, "original_max_position_embeddings": 256},
    "yarn, untruncated": {
        "factor": 16.0,
        "original_max_position_embeddings": 256,
        "truncate": False,
        "beta_fast": 16.0,
        "beta_slow": 2.0,
    },
    "yarn, its own attention factor": {
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "attention_factor": 1.3,
    },
    "yarn, deepseek": {
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "mscale": 1.0,
        "mscale_all_dim": 0.707,
        "beta_fast": 32,
        "beta_slow": 1,
    },
    "yarn, a single plane of transition": {
        "factor": 4.0,
        "original_max_position_embeddings": 256,
        "beta_fast": 30.0,
        "beta_slow": 30.0,
        "truncate": False,
    },
}


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("partial", [1.0, 0.5])
def test_every_kind_of_frequencies_is_transformers(name: str, partial: float) -> None:
    kind = name.split(",", maxsplit=1)[0]
    parameters = {"rope_type": kind, "rope_theta": 5e5, "partial_rotary_factor": partial, **ROPES[name]}
    values = {"hidden_size": 64, "num_attention_heads": 1, "head_dim": 64, "max_position_embeddings": 8192}
    ours = Rotary(read_rope(Config({"rope_parameters": dict(parameters)}), 64, 8192), REFERENCE)
    config = LlamaConfig(**values, rope_parameters=dict(parameters))
    if kind == "default":
        theirs, amplitude = LlamaRotaryEmbedding.compute_default_rope_parameters(config)
        theirs = 1.0 / 5e5 ** (torch.arange(0, 64 * partial, 2).float() / (64 * partial))  # Llama's ignores partial
    else:
        theirs, amplitude = ROPE_INIT_FUNCTIONS[kind](config, "cpu")
    torch.testing.assert_close(ours.frequencies_P, theirs, rtol=2e-6, atol=0.0)
    assert ours.rope.amplitude == pytest.approx(amplitude, rel=1e-12)
    assert ours.angles(torch.tensor([0])).cos[0, 0].item() == pytest.approx(amplitude)


@both
def test_a_rotated_head_is_transformers(ops: Ops) -> None:
    config = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters={"rope_theta": 1e4})
    positions = torch.tensor([0, 1, 7, 4000])
    q_THD, k_THD = random(4, 2, 32), random(4, 1, 32, seed=1)
    cos, sin = LlamaRotaryEmbedding(config)(q_THD, positions[None])
    theirs = apply_rotary_pos_emb(q_THD.transpose(0, 1)[None], k_THD.transpose(0, 1)[None], cos, sin)
    angles = Rotary(read_rope(Config({"rope_theta": 1e4}), 32, 8192), ops).angles(positions)
    for ours, expected in zip(angles.rotate(q_THD, k_THD), theirs, strict=True):
        torch.testing.assert_close(ours, expected[0].transpose(0, 1), rtol=1e-6, atol=1e-6)


@both
@pytest.mark.parametrize("interleaved", [False, True])
def test_scores_depend_on_the_distance_alone_and_the_rest_of_a_head_is_kept(interleaved: bool, ops: Ops) -> None:
    rope = read_rope(Config({"rope_theta": 100.0}), 32, 64, partial=0.5, interleaved=interleaved)
    rotary = Rotary(rope, ops)
    q_1HD, k_1HD = random(1, 1, 32), random(1, 1, 32, seed=1)

    def score(at: int, of: int) -> float:
        (q,) = rotary.angles(torch.tensor([at])).rotate(q_1HD)
        (k,) = rotary.angles(torch.tensor([of])).rotate(k_1HD)
        assert torch.equal(q[..., 16:], q_1HD[..., 16:])
        return float((q * k).sum())

    assert score(9, 4) == pytest.approx(score(45, 40), rel=1e-4)
    assert score(9, 4) != pytest.approx(score(9, 3), rel=1e-3)


@both
@pytest.mark.parametrize("gated", [False, True])
def test_heads_are_normed_with_positions_and_without(gated: bool, ops: Ops) -> None:
    """At angles of zero nothing is turned, so both ways are one."""
    shape = GqaShape(32, 4, 2, 16, head_norm=True, gated=gated)
    tensors = {name: random(*size, seed=seed) for seed, (name, size) in enumerate(shape.tensors("").items())}
    layer, arena = shape.build(Weights(tensors, ops), ""), make_arena((shape.spec(),))
    x_TC, memory = random(2, 32, seed=99), arena.layers[0]
    step = arena.reserve([Chunk(arena.open(), [1, 2])])
    angles = Rotary(read_rope(Config({"rope_theta": 1e4}), 16, 64), ops).angles(torch.zeros(2, dtype=torch.int64))
    (key,) = planes(memory.stored[0])  # type: ignore[union-attr]
    k_TKD = (x_TC @ tensors["k_proj.weight"].T).view(2, 2, 16)
    expected_TKD = k_TKD * k_TKD.square().mean(-1, keepdim=True).rsqrt() * tensors["k_norm.weight"]
    outs: list[torch.Tensor] = []
    for turned in (angles, None):
        outs.append(layer(x_TC, memory, step, turned))
        rows_TKD = key[step.page, :, step.line].view(torch.float32)
        torch.testing.assert_close(rows_TKD, expected_TKD, rtol=1e-5, atol=1e-5)
    # Of the second token, whose weights depend on its query.
    assert torch.equal(*outs)


@both
@pytest.mark.parametrize(("theirs", "zero_centred"), [(LlamaRMSNorm, False), (Qwen3NextRMSNorm, True)])
def test_norms_are_transformers(theirs: Any, zero_centred: bool, ops: Ops) -> None:
    norm = theirs(48, eps=1e-5)
    norm.weight.data.copy_(random(48) * 0.3 + (0.0 if zero_centred else 1.0))
    x = random(5, 48, seed=2) * torch.tensor([1e-4, 1e-2, 1.0, 1e2, 1e4])[:, None]
    ours = RMSNorm(ops, norm.weight.data, 1e-5, zero_centred=zero_centred)
    torch.testing.assert_close(ours(x), norm(x), rtol=1e-6, atol=1e-7)
    half = x.to(torch.bfloat16)
    assert ours(half).dtype == torch.bfloat16
    exact = norm.double()(half.double())
    # One rounding: half a unit in the last of eight bits.
    assert bool(((ours(half).double() - exact).abs() <= exact.abs() * 2**-8 + 1e-9).all())


def _by_expert(chosen: tuple[torch.Tensor, torch.Tensor], experts: int) -> torch.Tensor:
    weights, indices = chosen
    return torch.zeros(len(weights), experts).scatter(1, indices, weights)


@both
@pytest.mark.parametrize("groups", [1, 4])
@pytest.mark.parametrize("normalised", [False, True])
def test_sigmoid_routing_with_a_correction_is_transformers(groups: int, normalised: bool, ops: Ops) -> None:
    config = DeepseekV3Config(
        hidden_size=32,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_group=groups,
        topk_group=max(1, groups // 2),
        norm_topk_prob=normalised,
        routed_scaling_factor=2.5,
    )
    router = DeepseekV3TopkRouter(config)
    router.weight.data.copy_(random(16, 32) * 0.3)
    router.e_score_correction_bias.data.copy_(random(16, seed=1) * 0.5)
    routing = Routing(16, 3, "sigmoid", normalised, 2.5, groups, max(1, groups // 2))
    x = random(200, 32, seed=2)
    _, weights, indices = router(x)
    ours = Router(ops, routing, router.weight.data, router.e_score_correction_bias)(x)
    torch.testing.assert_close(_by_expert(ours, 16), _by_expert((weights, indices), 16).detach())


@both
@pytest.mark.parametrize("groups", [1, 4])
def test_softmax_routing_within_groups_is_transformers(groups: int, ops: Ops) -> None:
    config = DeepseekV2Config(
        hidden_size=32,
        n_routed_experts=16,
        num_experts_per_tok=3,
        n_group=groups,
        topk_group=max(1, groups // 2),
        topk_method="group_limited_greedy" if groups > 1 else "greedy",
        routed_scaling_factor=1.5,
    )
    router = DeepseekV2TopkRouter(config)
    router.weight.data.copy_(random(16, 32) * 0.3)
    x = random(200, 32, seed=2)
    _, weights, indices = router(x)
    routing = Routing(16, 3, "softmax", normalised=False, scale=1.5, groups=groups, kept_groups=max(1, groups // 2))
    ours = Router(ops, routing, router.weight.data)(x)
    torch.testing.assert_close(_by_expert(ours, 16), _by_expert((weights, indices), 16).detach())


@both
@pytest.mark.parametrize("experts", [DENSE_EXPERTS, DENSE_EXPERTS + 1])
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
def test_a_mixture_is_the_weighted_sum_of_the_chosen_experts(experts: int, activation: Any, ops: Ops) -> None:
    up = random(experts, 24 if activation == "swiglu" else 12, 16)
    down = random(experts, 16, 12, seed=1)
    router = Router(ops, Routing(experts, 2), random(experts, 16, seed=2))
    shape, gate = MlpShape(16, 8), random(1, 16, seed=3)
    weights = {name: random(*size, seed=4) for name, size in shape.tensors("s.").items()}
    shared = shape.build(Weights(weights, ops), "s.")
    x = random(9, 16, seed=5)
    mixed = ops.experts(experts, fused_experts(up, down), activation)
    out = MoE(router, mixed, shared, ops.matrix([Part(gate)]))(x)
    chosen_weights, chosen = router(x)
    for token in range(9):
        expected = torch.sigmoid(gate @ x[token]) * shared(x[token : token + 1])[0]
        for weight, index in zip(chosen_weights[token], chosen[token].tolist(), strict=True):
            expected = expected + weight * _expert(up[index], down[index], x[token], activation)
        torch.testing.assert_close(out[token], expected, rtol=1e-4, atol=1e-4)


def _expert(up: torch.Tensor, down: torch.Tensor, x: torch.Tensor, activation: str) -> torch.Tensor:
    if activation == "relu2":
        return down @ (up @ x).clamp(min=0.0) ** 2
    a, b = (up @ x).chunk(2)
    return down @ (a / (1.0 + (-a).exp()) * b)


@both
def test_an_expert_that_overflows_for_others_tokens_changes_nothing(ops: Ops) -> None:
    """The dense path runs every expert on every token: what it was not asked must not leak, not even as NaN."""
    quiet = Expert((random(8, 16),), random(16, 8))
    loud = Expert((torch.full((8, 16), 1e30),), torch.full((16, 8), 1e30))
    weight = torch.stack((torch.ones(16), -torch.ones(16)))
    x = random(3, 16).abs()
    out = MoE(Router(ops, Routing(2, 1), weight), ops.experts(2, [quiet, loud], "relu2"))(x)
    everything, first = torch.ones(3, 1), torch.zeros(3, 1, dtype=torch.int64)
    assert not torch.isfinite(ops.experts(1, [loud], "relu2")(x, everything, first)).any()
    torch.testing.assert_close(out, ops.experts(1, [quiet], "relu2")(x, everything, first))


@both
def test_both_layouts_of_experts_have_the_same_numbers(ops: Ops) -> None:
    shape = MoeShape(Routing(4, 2), 16, 12, shared_inner=8, shared_gate=True)
    apart = {name: random(*size, seed=index) for index, (name, size) in enumerate(shape.tensors("m.").items())}
    fused = {name: tensor for name, tensor in apart.items() if ".experts." not in name}
    parts = {
        part: torch.stack([apart[f"m.experts.{index}.{part}.weight"] for index in range(4)])
        for part in ("gate_proj", "up_proj", "down_proj")
    }
    fused["m.experts.gate_up_proj"] = torch.cat((parts["gate_proj"], parts["up_proj"]), 1)
    fused["m.experts.down_proj"] = parts["down_proj"]
    assert {name: tuple(item.shape) for name, item in fused.items()} == shape.tensors("m.", fused=True)
    x = random(5, 16, seed=99)
    results: list[torch.Tensor] = []
    for tensors in (apart, fused):
        weights = Weights(tensors, ops)
        results.append(shape.build(weights, "m.")(x))
        assert not weights, "every tensor was taken"
    assert torch.equal(*results)
