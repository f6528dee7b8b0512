"""Names, pairs and maps: what is chosen for every layer, and the sentence when nothing can be."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import pytest

from truekv.core.errors import Refused
from truekv.core.spec import Field, ModelSpec, Paged, Recurrent, Slab, Stateless
from truekv.formats.choice import choose_formats

STATE = Recurrent("gdn", (("heads", 2),), (Slab("state", (2, 4, 4), "float32"),), (Slab("k", (4,), "model"),))
GQA = Paged((Field("k", 2, 128, "key"), Field("v", 2, 128, "value")))
LATENT = Paged((Field("latent", 1, 512, "both"), Field("rope", 1, 64, "key", floor_bits=8)))
HYBRID = ModelSpec("any", 64, 100, 512, "bfloat16", (STATE, Stateless(), STATE, GQA, STATE, STATE, STATE, GQA), (GQA,))
MLA = ModelSpec("any", 64, 100, 512, "bfloat16", (LATENT, LATENT), (LATENT,))


def chosen(spec: ModelSpec, name: str = "auto", per_layer: str = "", dtype: Any = "bfloat16", **more: Any) -> list[str]:
    """Write the formats of every layer with rows as K/V."""
    layers = choose_formats(spec, name, per_layer, dtype, **more)
    return ["/".join(codec.name for codec in layer) for layer in layers if layer is not None]


@pytest.mark.parametrize(
    ("asked", "formats"),
    [
        ("auto", "bf16/bf16"),
        ("int8", "int8/int8"),
        ("fp8", "fp8_e4m3/fp8_e4m3"),
        ("int8/kv4", "int8/kv4"),
        ("fp8/auto", "fp8_e4m3/bf16"),
        ("k8v4", "int8/kv4"),
        ("k4v3", "kv4/kv3"),
        ("turboquant_k8v4", "turboquant_fp8/turboquant_4bit"),
        ("turboquant_3bit_nc", "turboquant_3bit/turboquant_3bit"),
        ("q8_0/q4_0+hadamard", "q8_0/q4_0+hadamard"),
    ],
)
def test_keys_and_values(asked: str, formats: str) -> None:
    assert chosen(HYBRID, asked) == [formats, formats]
    assert chosen(HYBRID, asked, draft=True) == [formats]


@pytest.mark.parametrize(
    ("asked", "formats"),
    [
        ("auto", "bf16/bf16"),
        ("int8", "int8/int8"),
        ("fp8", "fp8_e4m3/fp8_e4m3"),
        ("kv4", "kv4/int8"),
        ("kv3", "kv3/int8"),
        ("q4_0", "q4_0/q8_0"),
        ("iq4_nl+hadamard", "iq4_nl+hadamard/q8_0+hadamard"),
        ("turboquant_4bit_nc", "turboquant_4bit/int8"),
        ("turboquant_3bit_nc", "turboquant_3bit/int8"),
        ("kv4/bf16", "kv4/bf16"),
        ("kv3/fp8_e5m2", "kv3/fp8_e5m2"),
    ],
)
def test_latent_and_rotary_key(asked: str, formats: str) -> None:
    assert chosen(MLA, asked) == [formats, formats]
    assert chosen(MLA, asked, draft=True) == [formats]


def test_layers_without_rows_have_no_formats() -> None:
    formats = choose_formats(HYBRID, "int8", "", "bfloat16")
    assert [index for index, layer in enumerate(formats) if layer is None] == [0, 1, 2, 4, 5, 6]


def test_auto_is_what_the_checkpoint_declares_else_the_compute_dtype() -> None:
    assert chosen(HYBRID, dtype="float32") == ["f32/f32"] * 2
    assert chosen(replace(HYBRID, kv_format="fp8")) == ["fp8_e4m3/fp8_e4m3"] * 2
    assert chosen(replace(HYBRID, kv_format="int8/kv4")) == ["int8/kv4"] * 2
    assert chosen(replace(HYBRID, kv_format="fp8"), "bf16") == ["bf16/bf16"] * 2
    unknown = replace(HYBRID, kv_format="nvfp4")
    assert chosen(unknown, "int8") == ["int8/int8"] * 2
    with pytest.raises(Refused, match="the checkpoint declares the KV cache format 'nvfp4'"):
        chosen(unknown)


def test_a_map_makes_exceptions_by_layer_index() -> None:
    assert chosen(HYBRID, "kv4", "3=bf16") == ["bf16/bf16", "kv4/kv4"]
    assert chosen(HYBRID, "kv4", " 3=k8v4 , 7-8=int8/kv4 ") == ["int8/kv4", "int8/kv4"]
    # The draft's layers come after the model's own.
    assert chosen(HYBRID, "kv4", "7-8=int8", draft=True) == ["int8/int8"]
    assert chosen(HYBRID, "kv4", "3=int8", draft=True) == ["kv4/kv4"]
    assert chosen(MLA, "bf16", "1=kv4") == ["bf16/bf16", "kv4/int8"]
    assert chosen(HYBRID, "kv4", "3=auto") == ["bf16/bf16", "kv4/kv4"]


@pytest.mark.parametrize(
    ("asked", "per_layer", "sentence"),
    [
        ("kv44", "", "unknown KV cache format 'kv44': did you mean 'kv4'"),
        ("turboquant_4bit_nx", "", "did you mean 'turboquant_4bit_nc'"),
        ("f16", "", "did you mean 'bf16'"),
        ("xyz", "", "unknown KV cache format 'xyz': use one of auto, "),
        ("int8/", "", "unknown KV cache format ''"),
        ("", "", "unknown KV cache format ''"),
        ("INT8", "", "unknown KV cache format 'INT8'"),
        ("int8/kv4/kv3", "", "names 3 formats, but layer 3 stores K/V"),
        ("k8v4/int8", "", "'k8v4' already names a key and a value format; write 'int8/kv4'"),
        ("int8", "0=bf16", "layer 0 stores no rows; the layers with a KV cache are 3, 7-8"),
        ("int8", "1=bf16", "layer 1 stores no rows"),
        ("int8", "3-7=bf16", "layer 4 stores no rows"),
        ("int8", "9=bf16", "layer 9 does not exist; the layers with a KV cache are 3, 7-8"),
        ("int8", "0-999999=bf16", "layer 0 stores no rows"),
        ("int8", "3=bf16,3=kv4", "layer 3 is given twice, as 'bf16' and 'kv4'"),
        ("int8", "7=bf16,7-8=bf16", "layer 7 is given twice"),
        ("int8", "8-7=bf16", "the range 8-7 ends before it begins"),
        ("int8", "3", "'3' is not LAYER=FORMAT or FIRST-LAST=FORMAT"),
        ("int8", "3=", "'3=' is not LAYER=FORMAT"),
        ("int8", "k=bf16", "'k=bf16' is not LAYER=FORMAT"),
        ("int8", "3=bf16,", "'' is not LAYER=FORMAT"),
        ("int8", "-3=bf16", "'-3=bf16' is not LAYER=FORMAT"),
        ("int8", "99999999999999999999=bf16", "is not LAYER=FORMAT"),
        ("int8", "3=kv9", "unknown KV cache format 'kv9': did you mean 'kv4'"),
    ],
)
def test_what_cannot_be_meant_is_refused(asked: str, per_layer: str, sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        chosen(HYBRID, asked, per_layer)
    assert sentence in str(refusal.value)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("k8v4", "use LATENT/ROPE, for example 'kv4/int8'"),
        ("k4v3", "use LATENT/ROPE, for example 'kv3/int8'"),
        ("turboquant_k8v4", "use LATENT/ROPE, for example 'turboquant_4bit/int8'"),
        ("turboquant_k3v4_nc", "use LATENT/ROPE, for example 'turboquant_4bit/int8'"),
        ("kv4/kv4", "'kv4' gives the rope 4 bits, but below 8 bits its error reaches every score: use 'kv4/int8'"),
        ("int8/q5_1+hadamard", "use 'int8/q8_0+hadamard'"),
    ],
)
def test_mla_never_gets_a_low_bit_rotary_key_or_a_preset_for_values(asked: str, sentence: str) -> None:
    with pytest.raises(Refused) as refusal:
        chosen(MLA, asked)
    assert sentence in str(refusal.value)
    # The sentence can be followed.
    assert chosen(MLA, str(refusal.value).rpartition("use ")[2].rpartition(" ")[2].strip("'"))


def test_a_field_that_a_layout_cannot_hold_is_refused_with_its_layer() -> None:
    odd = ModelSpec("any", 64, 100, 512, "bfloat16", (Paged((Field("k", 1, 20, "key"), Field("v", 1, 20, "value"))),))
    assert chosen(odd, "bf16") == ["bf16/bf16"]
    with pytest.raises(Refused, match="layer 0, k: format 'kv4' stores rows of at least 16 numbers, a multiple of 8"):
        chosen(odd, "kv4")
    rare = replace(odd, layers=(Paged((Field("k", 1, 184, "key"), Field("v", 1, 184, "value"))),))
    assert chosen(rare, "fp8") == ["fp8_e4m3/fp8_e4m3"]
    with pytest.raises(Refused, match="layer 0, k: no Hadamard rotation is known here for rows of 184"):
        chosen(rare, "int8")


def test_choosing_does_not_load_torch() -> None:
    code = (
        "import sys; from truekv.core.spec import *; from truekv.formats.choice import choose_formats;"
        "layer = Paged((Field('k', 1, 128, 'key'), Field('v', 1, 128, 'value')));"
        "spec = ModelSpec('any', 1, 1, 1, 'bfloat16', (layer,));"
        "formats = choose_formats(spec, 'int8/kv4', '', 'bfloat16')[0];"
        "assert [codec.planes(128) for codec in formats] == [(128, 2), (64, 2)];"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
