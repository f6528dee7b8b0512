"""Configs of dense families and GDN hybrids: what is understood, and what is refused in one sentence."""

import json
from pathlib import Path
from typing import Any

import pytest

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.core.spec import Paged, Recurrent
from truekv.models.weights import understand

CONFIGS = Path(__file__).parents[1] / "configs"
DENSE: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
}
HYBRID = DENSE | {
    "head_dim": 32,
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}
MIXTURE = HYBRID | {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "shared_expert_intermediate_size": 48,
}
PLAIN = {
    "llama": DENSE | {"model_type": "llama"},
    "qwen2": DENSE | {"model_type": "qwen2"},
    "qwen3": DENSE | {"model_type": "qwen3", "head_dim": 32},
    "qwen3_5_text": HYBRID | {"model_type": "qwen3_5_text"},
    "qwen3_5_moe_text": MIXTURE | {"model_type": "qwen3_5_moe_text"},
    "qwen3_next": MIXTURE | {"model_type": "qwen3_next"},
    "qwen3_5": {"model_type": "qwen3_5", "text_config": HYBRID | {"model_type": "qwen3_5_text"}},
}


def read(values: dict[str, Any]) -> Any:
    return understand(Config(values))


def refusal(values: dict[str, Any]) -> str:
    with pytest.raises(Refused) as error:
        read(values)
    text = str(error.value)
    assert "\n" not in text
    assert text.startswith("config.json")
    return text


# -- what is understood ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "billions", "paged", "recurrent", "drafts"),
    [
        ("qwen3-0.6b", 0.596, 28, 0, 0),
        ("qwen3.5-0.8b", 0.752, 6, 18, 1),
        ("qwen3.5-2b", 1.88, 6, 18, 1),
        ("qwen3.5-4b", 4.21, 8, 24, 1),
        ("qwen3.5-9b", 8.95, 8, 24, 1),
        ("qwen3.6-27b", 26.9, 16, 48, 1),
        ("qwen3.6-35b-a3b", 34.7, 10, 30, 1),
        ("qwen3-next-80b-a3b", 79.7, 12, 36, 1),
    ],
)
def test_released_shapes_have_the_parameters_they_are_named_for(
    name: str, billions: float, paged: int, recurrent: int, drafts: int
) -> None:
    architecture = read(json.loads((CONFIGS / f"{name}.json").read_text()))
    sizes = {sum(_product(shape) for shape in layout.values()) for layout in architecture.layouts}
    assert len(sizes) == 1, "two layouts of the same weights"
    assert sizes.pop() / 1e9 == pytest.approx(billions, rel=5e-3)
    spec = architecture.spec
    assert sum(isinstance(layer, Paged) for layer in spec.layers) == paged
    assert sum(isinstance(layer, Recurrent) for layer in spec.layers) == recurrent
    assert len(spec.draft_layers) == drafts
    assert all(isinstance(layer, Paged) for layer in spec.draft_layers)


def _product(shape: tuple[int, ...]) -> int:
    size = 1
    for length in shape:
        size *= length
    return size


def test_a_27b_hybrid_remembers_what_its_authors_say() -> None:
    spec = read(json.loads((CONFIGS / "qwen3.6-27b.json").read_text())).spec
    recurrence, attention = spec.layers[0], spec.layers[3]
    assert [(field.name, field.heads, field.dim, field.role) for field in attention.fields] == [
        ("k", 4, 256, "key"),
        ("v", 4, 256, "value"),
    ]
    assert recurrence.rule == "gdn"
    assert {slab.name: (slab.shape, slab.dtype) for slab in recurrence.state} == {
        "state": ((48, 128, 128), "float32"),
        "conv": ((2 * 16 * 128 + 48 * 128, 3), "model"),
    }
    assert {slab.name: (slab.shape, slab.dtype) for slab in recurrence.log} == {
        "conv": ((2 * 16 * 128 + 48 * 128,), "model"),
        "beta": ((48,), "float32"),
        "decay": ((48,), "float32"),
    }


@pytest.mark.parametrize("name", PLAIN)
def test_a_config_without_options_is_read(name: str) -> None:
    assert len(read(PLAIN[name]).spec.layers) == 4


def test_older_configs_say_the_same_in_other_words() -> None:
    scaling = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64, "beta_fast": 16}
    old = {"rope_theta": 1e6, "rope_scaling": scaling, "partial_rotary_factor": 0.5, "full_attention_interval": 2}
    new = {
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 1e6,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
            "beta_fast": 16,
            "partial_rotary_factor": 0.5,
        },
        "layer_types": ["linear_attention", "full_attention"] * 2,
    }
    assert read(PLAIN["qwen3_next"] | old).rope == read(PLAIN["qwen3_next"] | new).rope
    assert read(PLAIN["qwen3_next"] | old).spec == read(PLAIN["qwen3_next"] | new).spec
    assert read(PLAIN["qwen3_next"] | old).rope.dim == 16


def test_the_share_of_rotated_dimensions_is_the_familys_where_none_is_given() -> None:
    theta = {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}}
    assert read(PLAIN["qwen3_next"] | theta).rope.dim == 8
    assert read(PLAIN["qwen3"] | theta).rope.dim == 32


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_the_dtype_may_stand_outside_or_inside_the_text_config(dtype: str) -> None:
    assert read(PLAIN["qwen3_5"] | {"dtype": dtype}).spec.dtype == dtype
    inner = PLAIN["qwen3_5"]["text_config"] | {"dtype": dtype}
    assert read({"model_type": "qwen3_5", "text_config": inner}).spec.dtype == dtype


def test_reading_leaves_the_config_as_it_was() -> None:
    values = json.loads(json.dumps(PLAIN["qwen3_5"] | {"tie_word_embeddings": True, "dtype": "float32"}))
    before = json.dumps(values)
    read(values)
    assert json.dumps(values) == before


# -- what is refused -------------------------------------------------------------------------------

NOT_IMPLEMENTED = {
    "sliding window": ("qwen3", {"use_sliding_window": True, "sliding_window": 64}, "use_sliding_window"),
    "sliding layers": ("qwen2", {"layer_types": ["sliding_attention"] * 4}, "sliding_attention"),
    "another activation": ("llama", {"hidden_act": "gelu"}, "hidden_act"),
    "unknown field": ("llama", {"attention_sinks": 4}, "attention_sinks"),
    "unknown field of a hybrid": ("qwen3_5_text", {"indexer_heads": 2}, "indexer_heads"),
    "unknown field beside text": ("qwen3_5", {"audio_config": {"depth": 3}}, "audio_config"),
    "dynamic positions": (
        "qwen3",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "dynamic",
    ),
    "unknown field of positions": (
        "qwen3",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "short_factor": [1.0]}},
        "short_factor",
    ),
    "no output gate": ("qwen3_5_text", {"attn_output_gate": False}, "attn_output_gate"),
    "another output gate": ("qwen3_5_text", {"output_gate_type": "sigmoid"}, "output_gate_type"),
    "half-precision state": ("qwen3_5_text", {"mamba_ssm_dtype": "bfloat16"}, "mamba_ssm_dtype"),
    "an MTP embedding of its own": (
        "qwen3_5_text",
        {"mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": True},
        "mtp_use_dedicated_embeddings",
    ),
    "unnormalised routing": ("qwen3_5_moe_text", {"norm_topk_prob": False}, "norm_topk_prob"),
    "contradicting ties": (
        "qwen3_5",
        {"tie_word_embeddings": True, "text_config": HYBRID | {"model_type": "x", "tie_word_embeddings": False}},
        "tie_word_embeddings",
    ),
}
WRONG = {
    "no heads": ("llama", {"num_attention_heads": 0}, "num_attention_heads"),
    "heads that do not divide": ("llama", {"num_key_value_heads": 3}, "evenly"),
    "key heads that do not divide": ("qwen3_next", {"linear_num_key_heads": 3}, "evenly"),
    "more chosen than there are": ("qwen3_next", {"num_experts_per_tok": 9}, "num_experts_per_tok"),
    "text where a number belongs": ("qwen3", {"hidden_size": "64"}, "hidden_size"),
    "a layer too few": ("qwen3_next", {"layer_types": ["full_attention"] * 3}, "layer_types"),
    "layers as text": ("qwen3_next", {"layer_types": "full_attention"}, "layer_types"),
    "no text config": ("qwen3_5", {"text_config": None}, "text_config"),
    "an odd rotation": ("qwen3", {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.1}}, "even"),
    "a theta of one": ("qwen3", {"rope_parameters": {"rope_theta": 1.0}}, "rope_theta"),
    "a factor below one": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 0.5}},
        "factor",
    ),
    "crossed frequencies": (
        "llama",
        {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 4.0,
                "high_freq_factor": 1.0,
            }
        },
        "low_freq_factor",
    ),
    "a norm without eps": ("qwen3", {"rms_norm_eps": 0.0}, "rms_norm_eps"),
    "an unknown dtype": ("qwen3", {"dtype": "float8"}, "float8"),
    "a convolution of nothing": ("qwen3_next", {"linear_conv_kernel_dim": 1}, "linear_conv_kernel_dim"),
}


@pytest.mark.parametrize("case", NOT_IMPLEMENTED)
def test_what_is_not_implemented_is_refused(case: str) -> None:
    name, change, named = NOT_IMPLEMENTED[case]
    assert named in refusal(PLAIN[name] | change)


@pytest.mark.parametrize("case", WRONG)
def test_what_makes_no_sense_is_refused(case: str) -> None:
    name, change, named = WRONG[case]
    assert named in refusal(PLAIN[name] | change)


@pytest.mark.parametrize("name", PLAIN)
def test_every_field_of_a_config_is_looked_at(name: str) -> None:
    """Whatever a config holds beyond what is known is refused by name."""
    assert "something_new" in refusal(PLAIN[name] | {"something_new": 3})
