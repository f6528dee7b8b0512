"""The TurboQuant presets: never more bytes than vLLM's rows."""

from __future__ import annotations

import pytest

from truekv.formats.choice import codecs, pairs

# Bytes of one token and kv head, key and value together, of vLLM 0.33's slots.
VLLM = {
    "turboquant_k8v4": {64: 100, 128: 196, 256: 388},
    "turboquant_4bit_nc": {64: 70, 128: 134, 256: 262},
    "turboquant_k3v4_nc": {64: 62, 128: 118, 256: 230},
    "turboquant_3bit_nc": {64: 54, 128: 102, 256: 198},
}


@pytest.mark.parametrize("preset", VLLM)
def test_a_row_takes_no_more_bytes_than_vllms(preset: str) -> None:
    for dim, theirs in VLLM[preset].items():
        ours = sum(sum(codecs()[name].planes(dim)) for name in pairs()[preset])
        assert ours <= theirs


@pytest.mark.parametrize("preset", VLLM)
def test_bits_are_those_of_the_name(preset: str) -> None:
    bits = {"k8v4": [8, 4], "4bit_nc": [4, 4], "k3v4_nc": [3, 4], "3bit_nc": [3, 3]}[preset.removeprefix("turboquant_")]
    assert [codecs()[name].code_bits for name in pairs()[preset]] == bits
