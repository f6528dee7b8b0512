"""Nemotron-H against transformers, logit by logit, and its config as released."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.core.spec import Paged, Recurrent, Stateless
from truekv.models.families.nemotron_h import FAMILY

SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "ssm_state_size": 16,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 48,
}
CASES: dict[str, Any] = {
    "one block of each kind, two groups, kv heads not shared": lambda: NemotronHConfig(
        **SIZES,
        hybrid_override_pattern="ME*-",
        num_key_value_heads=4,
        mamba_num_heads=8,
        mamba_head_dim=16,
        n_groups=2,
    ),
    "one kv head, latent experts in groups, biases, no conv bias, one group": lambda: NemotronHConfig(
        **SIZES,
        hybrid_override_pattern="M*ME",
        num_key_value_heads=1,
        mamba_num_heads=4,
        mamba_head_dim=32,
        n_groups=1,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
        moe_latent_size=24,
        use_conv_bias=False,
        use_bias=True,
    ),
    "no experts": lambda: NemotronHConfig(
        **SIZES,
        layers_block_type=["linear_attention", "mlp", "full_attention", "mlp"],
        num_key_value_heads=2,
        mamba_num_heads=8,
        mamba_head_dim=8,
        n_groups=4,
        mlp_bias=True,
    ),
}
RELEASED = SIZES | {
    "model_type": "nemotron_h",
    "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_nemotron_h.NemotronHConfig"},
    "chunk_size": 128,
    "conv_kernel": 4,
    "expand": 2,
    "hidden_dropout": 0.0,
    "hybrid_override_pattern": "MEM*EME",
    "layer_norm_epsilon": 1e-05,
    "mamba_head_dim": 16,
    "mamba_hidden_act": "silu",
    "mamba_num_heads": 8,
    "mamba_proj_bias": False,
    "mamba_ssm_cache_dtype": "float32",
    "mlp_bias": False,
    "mlp_hidden_act": "relu2",
    "n_group": 1,
    "n_groups": 2,
    "n_shared_experts": 1,
    "norm_eps": 1e-05,
    "norm_topk_prob": True,
    "num_hidden_layers": 7,
    "num_key_value_heads": 2,
    "num_logits_to_keep": 1,
    "partial_rotary_factor": 1.0,
    "rescale_prenorm_residual": True,
    "residual_in_fp32": False,
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "time_step_floor": 0.0001,
    "time_step_limit": [0.0, float("inf")],
    "time_step_max": 0.1,
    "time_step_min": 0.001,
    "topk_group": 1,
    "torch_dtype": "bfloat16",
    "use_bias": False,
    "use_conv_bias": True,
    "use_mamba_kernels": True,
}


def _slow_heads(model: Any) -> None:
    """Give half of the Mamba heads time steps below time_step_min, so that the clamp shows."""
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith("dt_bias"):
                weight[::2] = -9.0


@pytest.mark.parametrize("case", CASES)
def test_logits_equal_transformers_in_any_chunking(case: str, save: Any, parity: Any) -> None:
    parity(save(NemotronHForCausalLM, CASES[case](), prepare=_slow_heads))


def test_each_kind_of_block_remembers_what_it_should() -> None:
    shape = FAMILY.read(Config(RELEASED))
    kinds = {"M": Recurrent, "E": Stateless, "*": Paged}
    assert [type(layer) for layer in shape.spec.layers] == [kinds[letter] for letter in "MEM*EME"]
    recurrent = shape.spec.layers[0]
    assert isinstance(recurrent, Recurrent)
    assert dict(recurrent.sizes) == {"heads": 8, "head_dim": 16, "groups": 2, "state": 16, "kernel": 4}
    assert [(slab.name, slab.shape) for slab in recurrent.state] == [("state", (8, 16, 16)), ("conv", (192, 3))]
    assert [(slab.name, slab.shape) for slab in recurrent.log] == [("conv", (192,)), ("dt", (8,))]


def test_a_config_as_released_says_what_transformers_makes_of_it(tmp_path: Path) -> None:
    NemotronHConfig.from_dict({key: value for key, value in RELEASED.items() if key != "auto_map"}).save_pretrained(
        tmp_path
    )
    rewritten = json.loads((tmp_path / "config.json").read_text())
    assert "hybrid_override_pattern" not in rewritten, "transformers writes names now; this test compares two forms"
    ours, theirs = (FAMILY.read(Config(values)) for values in (RELEASED, rewritten))
    assert ours == theirs
    assert ours.tensors == theirs.tensors


def test_draft_layers_are_declared_and_their_tensors_ignored() -> None:
    drafting = RELEASED | {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": "*E"}
    shape = FAMILY.read(Config(drafting))
    assert [type(layer) for layer in shape.spec.draft_layers] == [Paged, Stateless]
    assert shape.ignored == (r"mtp\..*",)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"hybrid_override_pattern": "MEXE"}, "'hybrid_override_pattern' is 'MEXE', but must say for every block"),
        ({"hybrid_override_pattern": None}, "'layers_block_type' is [], but must say for every block"),
        ({"num_hidden_layers": 8}, "'num_hidden_layers' is 8, but only 7 is implemented"),
        ({"mlp_hidden_act": "silu"}, "'mlp_hidden_act' is 'silu', but only 'relu2' is implemented"),
        ({"time_step_limit": [0.0, 0.5]}, "'time_step_limit' is [0.0, 0.5], but only [0.0, Infinity]"),
        ({"residual_in_fp32": True}, "'residual_in_fp32' is True, but only False is implemented"),
        ({"tie_word_embeddings": True}, "'tie_word_embeddings' is True, but only False is implemented"),
        ({"n_groups": 3}, "8 Mamba heads cannot be shared out to 3 groups"),
        ({"num_key_value_heads": 3}, "4 query heads cannot share 3 key/value heads evenly"),
        ({"sliding_window": 128}, "'sliding_window' is 128, a field that truekv does not implement"),
        ({"layer_norm_epsilon": 0}, "'layer_norm_epsilon' is 0, but must be between 0 and 1"),
        ({"time_step_min": -1.0}, "'time_step_min' is -1, but must be a finite time step"),
        ({"rms_norm_eps": 1e-6}, "'rms_norm_eps' is 1e-06, but only 1e-05 is implemented"),
        ({"conv_kernel": 1}, "a Mamba convolution of 1 tap is not implemented"),
    ],
)
def test_what_is_not_implemented_is_refused(change: dict[str, Any], sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        FAMILY.read(Config(RELEASED | change))
    assert sentence in str(refusal.value)
