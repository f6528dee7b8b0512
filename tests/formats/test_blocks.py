"""llama.cpp's block formats, byte for byte against the gguf package."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType
from gguf.quants import dequantize, quantize

from truekv.formats.choice import codecs

ENCODED_BY_GGUF = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
SIZES = {"q8_0": 34, "q5_1": 24, "q5_0": 22, "q4_1": 20, "q4_0": 18, "iq4_nl": 18}


def rows(scale: float, dim: int = 128) -> torch.Tensor:
    made = torch.randn(400, dim, generator=torch.Generator().manual_seed(11)) * scale
    made[:20, 5] *= 100
    made[20] = 0
    made[21] = -0.0
    made[22] = scale
    made[23, 20] = -made[23].abs().max()
    made[23, 25] = made[23].abs().max()  # two extremes: the first decides
    return made


@pytest.mark.parametrize("name", ENCODED_BY_GGUF)
@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1.0, 100.0])
@pytest.mark.parametrize("suffix", ["", "+hadamard"])
def test_bytes_equal_those_of_gguf(name: str, scale: float, suffix: str) -> None:
    made = rows(scale)
    ours = codecs()[name + suffix].encode(made).numpy()
    assert np.array_equal(ours, quantize(made.numpy(), GGMLQuantizationType[name.upper()]))


@pytest.mark.parametrize("name", SIZES)
def test_gguf_reads_our_bytes_as_we_do(name: str) -> None:
    codec = codecs()[name]
    data = codec.encode(rows(1.0))
    read = dequantize(data.numpy(), GGMLQuantizationType[name.upper()])
    assert np.array_equal(read, codec.decode(data, 128).numpy())


@pytest.mark.parametrize("name", ENCODED_BY_GGUF)
def test_we_read_the_bytes_of_gguf_as_it_does(name: str) -> None:
    kind = GGMLQuantizationType[name.upper()]
    data = quantize(rows(1.0).numpy(), kind)
    assert np.array_equal(codecs()[name].decode(torch.from_numpy(data), 128).numpy(), dequantize(data, kind))


def iq4_nl_block(block: np.ndarray) -> bytes:
    """Quantize one block as llama.cpp's CPU reference does, one number after the other in float32."""
    levels = np.array(codecs()["iq4_nl"].rule.levels, np.float32)  # type: ignore[attr-defined]
    extreme = block[np.abs(block).argmax()]
    if extreme == 0:
        return bytes(2) + bytes([0x88]) * 16
    inverse = np.float32(1) / np.float32(extreme / levels[0])
    codes, above, below = [], np.float32(0), np.float32(0)
    for number in block:
        value = np.float32(number * inverse)
        code = int(15 - np.abs(levels[::-1] - value).argmin())  # of two equally near, the upper one
        weight = np.float32(number * number)
        above += np.float32(weight * levels[code] * number)
        below += np.float32(weight * levels[code] * levels[code])
        codes.append(code)
    nibbles = bytes(codes[j] | codes[j + 16] << 4 for j in range(16))
    return np.float16(above / below).tobytes() + nibbles


def test_iq4_nl_follows_the_reference_of_llama_cpp() -> None:
    made = rows(1.0, 32)
    # An extreme of -127 makes the first scale 1: these are midpoints between levels, which go up.
    midpoints = [-115.5, -93.5, -74.0, -57.0, -42.0, -28.5, -16.0, -4.5, 7.0, 19.0, 31.5, 45.5, 61.0, 79.0, 101.0]
    made[24] = torch.tensor([-127.0, *midpoints, *midpoints, 0.0])
    ours = codecs()["iq4_nl"].encode(made).numpy()
    theirs = np.stack([np.frombuffer(iq4_nl_block(block), np.uint8) for block in made.numpy()])
    assert np.array_equal(ours[:, 2:], theirs[:, 2:])
    # The scale is a sum of 32 products, whose order decides its last bit.
    distance = ours[:, :2].copy().view(np.int16).astype(int) - theirs[:, :2].copy().view(np.int16).astype(int)
    assert np.abs(distance).max() <= 1
    assert (distance == 0).mean() > 0.95


@pytest.mark.parametrize(("name", "size"), SIZES.items())
def test_a_short_last_block_is_filled_with_zeros(name: str, size: int) -> None:
    codec = codecs()[name]
    assert codec.planes(80) == (3 * size,)
    made = rows(1.0, 80)
    filled = torch.nn.functional.pad(made, (0, 16))
    assert torch.equal(codec.encode(made), codec.encode(filled))
    assert torch.equal(codec.decode(codec.encode(made), 80), codec.decode(codec.encode(filled), 96)[:, :80])
