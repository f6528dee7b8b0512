"""The exported files, held against the documented rules of the loaders (neither engine installs here)."""

from __future__ import annotations

import json
import math
import re
from typing import TYPE_CHECKING, Any

import pytest
from safetensors.torch import load_file

from truekv.core.errors import Refused
from truekv.core.spec import Field, ModelSpec, Paged, Recurrent, Slab
from truekv.trust.export import INDEX_FILE, LAYOUTS, SCALES_FILE, Scales, TensorScale, export, subnormal_share

if TYPE_CHECKING:
    from pathlib import Path

ATTENTION = Paged((Field("k", 2, 64, "key"), Field("v", 2, 64, "value")))
STATE = Recurrent("gdn", (("heads", 2),), (Slab("state", (2, 4, 4), "float32"),), (Slab("k", (4,), "model"),))
MLA = Paged((Field("latent", 1, 64, "both"), Field("rope", 1, 32, "key", floor_bits=8)))
HYBRID = (STATE, STATE, STATE, ATTENTION, STATE, STATE, STATE, ATTENTION)
CONFIG: dict[str, object] = {"model_type": "qwen3_5_text", "num_hidden_layers": 8}
SCALES: Scales = {
    3: {"k": TensorScale(0.5, 20.0), "v": TensorScale(0.03, 1.0)},
    7: {"k": TensorScale(0.25, 10.0), "v": TensorScale(0.04, 1.5)},
}


def spec_of(*layers: Any) -> ModelSpec:
    return ModelSpec("qwen3_5", 64, 256, 4096, "bfloat16", layers)


def placed_of(prefix: str = "model.") -> dict[str, str]:
    names = {
        f"{prefix}layers.{index}.self_attn.{part}_proj.weight": "model.safetensors"
        for index in (3, 7)
        for part in "qkvo"
    }
    names["mtp.layers.3.self_attn.k_proj.weight"] = "model.safetensors"
    return {f"{prefix}embed_tokens.weight": "model.safetensors", **names}


def write(layout: str, directory: Path, **changes: Any) -> list[Path]:
    given: dict[str, Any] = {
        "spec": spec_of(*HYBRID),
        "scales": SCALES,
        "config": CONFIG,
        "placed": placed_of(),
        **changes,
    }
    return export(layout, directory, **given)


# What the loaders do with a name, as their remapping functions document it: the attention module's own parameter.
def loaded_by_vllm(name: str) -> tuple[str, str] | None:
    """Return (attention module, "k" or "v") that a checkpoint tensor's scale ends up in, None if it is no scale."""
    for pattern in (r"(.*\.self_attn)\.([kv])_proj\.\2_scale", r"(.*\.self_attn)\.([kv])_scale"):
        if found := re.fullmatch(pattern, name):
            return found[1], found[2]
    return None


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
@pytest.mark.parametrize("prefix", ["model.", "model.language_model."])
def test_every_attention_layer_gets_its_scale_and_only_those(layout: str, prefix: str, tmp_path: Path) -> None:
    write(layout, tmp_path, placed=placed_of(prefix))
    tensors = load_file(tmp_path / SCALES_FILE)
    got = {loaded_by_vllm(name): value for name, value in tensors.items()}
    # A parameter that no tensor reaches stays at its initial 1.0 without a word.
    assert got.keys() == {(f"{prefix}layers.{index}.self_attn", name) for index in (3, 7) for name in "kv"}
    for index, fields in SCALES.items():
        for name, expected in fields.items():
            value = got[f"{prefix}layers.{index}.self_attn", name]
            assert value.shape == ((1,) if layout == "compressed-tensors" else ())
            assert value.item() == pytest.approx(expected.scale)


@pytest.mark.parametrize("layout", ["compressed-tensors", "modelopt"])
def test_the_index_names_the_weights_and_the_scales(layout: str, tmp_path: Path) -> None:
    # A loader that finds an index skips every file the index does not name.
    write(layout, tmp_path)
    placed = json.loads((tmp_path / INDEX_FILE).read_text())["weight_map"]
    assert {name: file for name, file in placed.items() if file != SCALES_FILE} == placed_of()
    assert {name for name, file in placed.items() if file == SCALES_FILE} == load_file(tmp_path / SCALES_FILE).keys()


def test_compressed_tensors_declares_a_cache_scheme_and_leaves_the_weights_alone(tmp_path: Path) -> None:
    write("compressed-tensors", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    scheme = config.pop("quantization_config")
    assert config == CONFIG
    assert scheme["quant_method"] == "compressed-tensors"
    assert scheme["config_groups"] == {}
    # The loader refuses any other type, width or strategy, and dynamic scales.
    expected = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    assert scheme["kv_cache_scheme"] == expected


def test_modelopt_declares_fp8_for_the_cache_and_excludes_every_linear_layer(tmp_path: Path) -> None:
    write("modelopt", tmp_path)
    declared = json.loads((tmp_path / "hf_quant_config.json").read_text())
    assert declared["producer"]["name"] == "modelopt"
    assert declared["quantization"]["kv_cache_quant_algo"] == "FP8"
    assert declared["quantization"]["quant_algo"] == "FP8"
    excluded = declared["quantization"]["exclude_modules"]
    for module in ("model.layers.0.linear_attn.in_proj_qkv", "model.layers.3.self_attn.qkv_proj", "lm_head"):
        assert "*" in excluded  # wildcards (vLLM)
        assert any(part in module for part in excluded)  # parts of the name (SGLang)


def test_sglang_lists_every_hidden_layer_of_rank_0(tmp_path: Path) -> None:
    scales: Scales = {index: {"k": TensorScale(0.5, 20.0), "v": TensorScale(0.1, 3.0)} for index in (3, 7)}
    (path,) = write("sglang", tmp_path, scales=scales)
    held = json.loads(path.read_text())
    assert held["model_type"] == CONFIG["model_type"]
    assert held["kv_cache"]["dtype"] == "float8_e4m3fn"
    assert held["kv_cache"]["scaling_factor"].keys() == {"0"}
    layers = held["kv_cache"]["scaling_factor"]["0"]
    assert [int(index) for index in layers] == list(range(8))
    assert [layers[str(index)] for index in (3, 7)] == [0.5, 0.5]


def test_a_scale_shared_by_keys_and_values_is_refused_where_values_would_vanish(tmp_path: Path) -> None:
    scales: Scales = {index: {"k": TensorScale(4.0, 150.0), "v": TensorScale(0.02, 1.0)} for index in (3, 7)}
    write("modelopt", tmp_path / "separate", scales=scales)
    with pytest.raises(
        Refused, match=r"one fp8 scale for keys and values alike would store \d+\.\d% .* layer 3 field v"
    ):
        write("sglang", tmp_path / "shared", scales=scales)
    assert not (tmp_path / "shared").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mla_cannot_be_expressed_with_one_scale_for_latent_and_rope(layout: str, tmp_path: Path) -> None:
    scales: Scales = {0: {"latent": TensorScale(0.02, 1.0), "rope": TensorScale(0.3, 10.0)}}
    with pytest.raises(Refused, match="layer 0 caches latent and rope, for which the other engines have one shared"):
        write(layout, tmp_path / "out", spec=spec_of(MLA), scales=scales)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("wrong", [1.0, 0.0, -1.0, math.nan, math.inf])
def test_a_scale_that_no_measurement_gives_is_refused(layout: str, wrong: float, tmp_path: Path) -> None:
    scales: Scales = {**SCALES, 7: {**SCALES[7], "v": TensorScale(wrong, 1.0)}}
    with pytest.raises(Refused, match="layer 7 field v"):
        write(layout, tmp_path / "out", scales=scales)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_missing_scale_is_refused(layout: str, tmp_path: Path) -> None:
    with pytest.raises(Refused, match="layer 7 has no measured scale for k"):
        write(layout, tmp_path / "out", scales={3: SCALES[3]})
    assert not (tmp_path / "out").exists()


def test_layouts_files_and_names_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(Refused, match="did you mean 'compressed-tensors'"):
        write("compressed_tensors", tmp_path)
    with pytest.raises(Refused, match="already has a quantization_config"):
        write("modelopt", tmp_path, config={**CONFIG, "quantization_config": {}})
    with pytest.raises(Refused, match=r"layer 3 has no k_proj\.weight"):
        write("modelopt", tmp_path / "out", placed={"model.layers.7.self_attn.k_proj.weight": "model.safetensors"})
    assert not (tmp_path / "out").exists()


def test_the_predicted_subnormal_share_is_what_e4m3_does_to_gaussian_rows() -> None:
    import torch

    rows = torch.randn(1 << 16, generator=torch.Generator().manual_seed(3))
    for scale in (1.0, 4.0, 16.0):
        counted = ((rows / scale).abs() < 2.0**-6).float().mean().item()
        assert subnormal_share(1.0, scale) == pytest.approx(counted, rel=0.05)
