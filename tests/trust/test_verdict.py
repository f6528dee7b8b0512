from __future__ import annotations

import pytest
import torch

from truekv.core.errors import Refused
from truekv.core.spec import Field, LayerSpec, ModelSpec, Paged, Recurrent, Slab, Stateless
from truekv.formats.choice import choose_formats
from truekv.formats.frame import Frame
from truekv.trust.verdict import judge

ATTENTION = Paged((Field("k", 2, 64, "key"), Field("v", 2, 64, "value")))
MLA = Paged((Field("latent", 1, 128, "both"), Field("rope", 1, 64, "key", floor_bits=8)))
STATE = Recurrent("gdn", (("heads", 2),), (Slab("state", (2, 4, 4), "float32"),), (Slab("k", (4,), "model"),))


def spec_of(*layers: LayerSpec) -> ModelSpec:
    return ModelSpec("test", 64, 256, 4096, "bfloat16", layers)


DENSE = spec_of(ATTENTION, Stateless(), ATTENTION)
HYBRID = spec_of(STATE, ATTENTION, STATE, ATTENTION)
EVERYTHING = {(index, name) for index in range(4) for name in ("k", "v", "latent", "rope")}


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "q8_0", "q4_0"])
def test_formats_that_carry_their_own_scales_run_unmeasured(name: str) -> None:
    verdict = judge(HYBRID, choose_formats(HYBRID, name, "", "float32"), model="m")
    assert verdict.answer == "run"
    assert name in verdict.reason


@pytest.mark.parametrize("name", ["fp8", "kv4", "kv3", "int8/kv4"])
def test_calibrated_formats_ask_for_calibration_until_every_field_is_measured(name: str) -> None:
    formats = choose_formats(DENSE, name, "", "float32")
    assert judge(DENSE, formats, EVERYTHING, model="m").answer == "run"
    missing = judge(DENSE, formats, EVERYTHING - {(2, "v")}, model="some/model")
    assert missing.answer == "calibrate"
    assert "layer 2 has none for its v rows:" in missing.reason
    assert "run 'truekv calibrate some/model' first, or use --kv-cache-dtype int8" in missing.reason


def test_only_the_fields_that_need_a_frame_are_asked_for() -> None:
    formats = choose_formats(DENSE, "int8/kv4", "", "float32")
    assert judge(DENSE, formats, {(0, "v"), (2, "v")}, model="m").answer == "run"
    missing = judge(DENSE, formats, model="m")
    assert missing.reason.startswith("kv4 needs frames measured on real prompts but layer 0 has none for its v rows")
    assert "(and 1 more)" in missing.reason


def test_a_recurrent_model_is_told_how_it_must_be_measured() -> None:
    verdict = judge(HYBRID, choose_formats(HYBRID, "fp8", "", "float32"), model="m")
    assert verdict.answer == "calibrate"
    assert (
        "on real prompts, with the recurrent state opened as in serving and never in a warm-up pass" in verdict.reason
    )
    assert "recurrent" not in judge(DENSE, choose_formats(DENSE, "fp8", "", "float32"), model="m").reason


@pytest.mark.parametrize("scale", [None, torch.ones(2, 64), torch.cat([torch.full((1, 64), 0.3), torch.ones(1, 64)])])
def test_a_scale_that_nobody_measured_is_refused(scale: torch.Tensor | None) -> None:
    frames = {(index, name): Frame(torch.zeros(2, 64), torch.full((2, 64), 0.3)) for index in (0, 2) for name in "kv"}
    formats = choose_formats(DENSE, "fp8", "", "float32")
    assert judge(DENSE, formats, frames, model="m").answer == "run"
    frames[2, "v"] = Frame(torch.zeros(2, 64), scale)
    verdict = judge(DENSE, formats, frames, model="m")
    assert verdict.answer == "refuse"
    assert verdict.reason.startswith("the frame of layer 2 field v has the default scale of 1 and not a measured one")
    assert judge(DENSE, choose_formats(DENSE, "int8", "", "float32"), frames, model="m").answer == "run"


def test_latent_and_rotary_key_are_measured_apart() -> None:
    spec = spec_of(MLA)
    formats = choose_formats(spec, "fp8", "", "float32")
    assert judge(spec, formats, {(0, "latent")}, model="m").answer == "calibrate"
    assert judge(spec, formats, {(0, "latent"), (0, "rope")}, model="m").answer == "run"


def test_a_choice_that_does_not_match_the_layers_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        judge(DENSE, [None], model="m")
    with pytest.raises(Refused):
        choose_formats(DENSE, "fp7", "", "float32")
