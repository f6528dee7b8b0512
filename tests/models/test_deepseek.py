"""DeepSeek V2 and V3 against transformers, logit by logit, and their configs as released."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import DeepseekV2Config, DeepseekV2ForCausalLM, DeepseekV3Config, DeepseekV3ForCausalLM

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.kernels.reference.ops import DENSE_EXPERTS
from truekv.models.families.deepseek import FAMILY

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 24,
    "moe_intermediate_size": 32,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "n_shared_experts": 1,
}
YARN = {
    "type": "yarn",
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 0.707,
}
MANY = DENSE_EXPERTS + 4  # so many that each runs on its own tokens only
CASES: dict[str, tuple[Any, Any]] = {
    "v2, one full query map": (DeepseekV2ForCausalLM, lambda: DeepseekV2Config(**SIZES, q_lora_rank=None)),
    "v2, low-rank queries, limited groups, YaRN, biases, tied, two shared experts": (
        DeepseekV2ForCausalLM,
        lambda: DeepseekV2Config(
            **(SIZES | {"n_shared_experts": 2}),
            q_lora_rank=24,
            topk_method="group_limited_greedy",
            n_group=4,
            topk_group=2,
            routed_scaling_factor=1.5,
            attention_bias=True,
            tie_word_embeddings=True,
            rope_scaling=dict(YARN),
        ),
    ),
    "v3, low-rank queries, many experts in limited groups, YaRN": (
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(
            **(SIZES | {"n_routed_experts": MANY, "num_experts_per_tok": 3}),
            q_lora_rank=24,
            n_group=4,
            topk_group=2,
            rope_scaling=dict(YARN),
        ),
    ),
    "v3, one full query map, rotary halves, no groups, weights not normalised, tied, biases": (
        DeepseekV3ForCausalLM,
        lambda: DeepseekV3Config(
            **(SIZES | {"first_k_dense_replace": 0}),
            q_lora_rank=None,
            n_group=1,
            topk_group=1,
            norm_topk_prob=False,
            rope_interleave=False,
            attention_bias=True,
            tie_word_embeddings=True,
        ),
    ),
}
# As released; the fields that every config has are in SIZES.
LITE = SIZES | {
    "model_type": "deepseek_v2",
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV2Config"},
    "aux_loss_alpha": 0.001,
    "moe_layer_freq": 1,
    "n_group": 1,
    "norm_topk_prob": False,
    "q_lora_rank": None,
    "rms_norm_eps": 1e-06,
    "rope_scaling": YARN | {"mscale": 0.707},
    "rope_theta": 10000,
    "routed_scaling_factor": 1.0,
    "scoring_func": "softmax",
    "seq_aux": True,
    "topk_group": 1,
    "topk_method": "greedy",
    "torch_dtype": "bfloat16",
    "hidden_act": "silu",
}
R1 = LITE | {
    "model_type": "deepseek_v3",
    "ep_size": 1,
    "n_group": 4,
    "topk_group": 2,
    "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 24,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "topk_method": "noaux_tc",
}


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_any_chunking(case: str, save: Any, parity: Any) -> None:
    model_class, config = CASES[case]
    parity(save(model_class, config()))


@pytest.mark.parametrize("released", [LITE, R1], ids=["V2-Lite", "R1"])
def test_a_config_as_released_says_what_transformers_makes_of_it(released: dict[str, Any], tmp_path: Path) -> None:
    config_class = {"deepseek_v2": DeepseekV2Config, "deepseek_v3": DeepseekV3Config}[released["model_type"]]
    config_class.from_dict({key: value for key, value in released.items() if key != "auto_map"}).save_pretrained(
        tmp_path
    )
    rewritten = json.loads((tmp_path / "config.json").read_text())
    ours, theirs = (FAMILY.read(Config(values)) for values in (released, rewritten))
    assert ours.layers == theirs.layers  # type: ignore[attr-defined]
    assert ours.rope == theirs.rope  # type: ignore[attr-defined]
    assert ours.tensors == theirs.tensors


def test_the_layer_of_drafts_is_known_and_left_alone(save: Any) -> None:
    tiny = save(DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES, q_lora_rank=24, n_group=1, topk_group=1))
    weights = load_file(tiny.directory / "model.safetensors")
    last = {name: value.clone() for name, value in weights.items() if name.startswith("model.layers.2.")}
    drafts = {name.replace("layers.2.", "layers.3."): value for name, value in last.items()}
    drafts |= {f"model.layers.3.{name}.weight": torch.ones(64) for name in ("enorm", "hnorm", "shared_head.norm")}
    drafts |= {"model.layers.3.eh_proj.weight": torch.ones(64, 128)}
    save_file(weights | drafts, tiny.directory / "model.safetensors", {"format": "pt"})
    spec = tiny.checkpoint.architecture.spec
    assert spec.draft_layers == (spec.layers[0],)
    tiny.checkpoint.check()
    # A layer beyond the announced ones belongs to another model.
    save_file(
        weights | {name.replace("layers.2.", "layers.4."): value for name, value in last.items()},
        tiny.directory / "model.safetensors",
        {"format": "pt"},
    )
    with pytest.raises(Refused, match=r"layers\.4.*unexpected"):
        tiny.checkpoint.check()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"scoring_func": "sigmoid"}, "'scoring_func' is 'sigmoid', but only 'softmax' is implemented"),
        ({"topk_method": "noaux_tc"}, "'topk_method' is 'noaux_tc', but only 'greedy' or 'group_limited_greedy'"),
        ({"norm_topk_prob": True}, "'norm_topk_prob' is True, but only False is implemented"),
        ({"num_key_value_heads": 1}, "'num_key_value_heads' is 1, but only 4 is implemented"),
        ({"moe_layer_freq": 2}, "'moe_layer_freq' is 2, but only 1 is implemented"),
        ({"topk_method": "group_limited_greedy", "n_group": 3}, "8 experts cannot be routed in 3 groups"),
        ({"routed_scaling_factor": float("inf")}, "'routed_scaling_factor' is inf, but must be positive and finite"),
        ({"num_experts_per_tok": 9}, "'num_experts_per_tok' is 9, but the kept groups hold 8 experts"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor turns 4 of 8 rotary dimensions"),
        ({"index_topk": 2048}, "'index_topk' is 2048, a field that truekv does not implement"),
        ({"hidden_act": "gelu"}, "'hidden_act' is 'gelu', but only 'silu' is implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        FAMILY.read(Config(LITE | change))
    assert sentence in str(refusal.value)


def test_the_bias_that_chooses_experts_is_never_rounded(save: Any) -> None:
    tiny = save(DeepseekV3ForCausalLM, DeepseekV3Config(**SIZES, q_lora_rank=24, n_group=1, topk_group=1))
    model = tiny.checkpoint.load("bfloat16")
    stored = tiny.reference.model.layers[1].mlp.gate.e_score_correction_bias
    assert not torch.equal(stored.bfloat16().float(), stored), "this bias could not tell"
    assert torch.equal(model.layers[1].ffn[1].router.bias, stored)
    assert model.layers[1].ffn[1].experts.experts[0][0].dtype == torch.bfloat16
