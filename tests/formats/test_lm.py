"""The Lloyd-Max codes: codebooks, layouts, the norm, and the distance from the rate-distortion bound."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from truekv.formats.choice import codecs
from truekv.formats.lm import FOUR_BITS, THREE_BITS, Codebook, LloydMax
from truekv.trust.measure import distortion

BOOKS = pytest.mark.parametrize("book", [FOUR_BITS, THREE_BITS], ids=["4 bits", "3 bits"])
# Lloyd-Max quantizers of N(0, 1) as tabulated by Max (1960): upper half and mean squared error.
PUBLISHED = {
    3: ((0.2451, 0.7560, 1.3439, 2.1520), 0.03454),
    4: ((0.1284, 0.3881, 0.6568, 0.9424, 1.2562, 1.6180, 2.0690, 2.7326), 0.009497),
}


def moments(levels: list[float]) -> tuple[float, float]:
    """Return E[x q(x)] and E[q(x)^2] for x ~ N(0, 1) and q the nearest of the levels, exactly."""
    edges = [-math.inf, *((low + high) / 2 for low, high in pairwise(levels)), math.inf]
    density = [0.0 if math.isinf(edge) else math.exp(-edge * edge / 2) / math.sqrt(2 * math.pi) for edge in edges]
    below = [0.5 * (1 + math.erf(edge / math.sqrt(2))) for edge in edges]
    product = sum(level * (density[i] - density[i + 1]) for i, level in enumerate(levels))
    square = sum(level * level * (below[i + 1] - below[i]) for i, level in enumerate(levels))
    return product, square


def corrected_error(levels: list[float]) -> float:
    """Mean squared error once the levels are scaled to the norm of the row."""
    product, square = moments(levels)
    return 2 - 2 * product / math.sqrt(square)


@BOOKS
def test_the_codebook_has_no_mean(book: Codebook) -> None:
    assert sum(book.levels) == 0
    assert [-level for level in reversed(book.levels)] == list(book.levels)
    assert all(isinstance(level, int) and abs(level) <= 127 for level in book.levels)
    assert sorted(set(book.levels)) == list(book.levels)
    assert len(book.levels) == 2**book.bits


@BOOKS
def test_the_decoded_mean_is_exactly_zero_over_both_signs(book: Codebook) -> None:
    codec = LloydMax("any", book)
    rows = torch.randn(64, 128, generator=torch.Generator().manual_seed(3))
    decoded = codec.decode(codec.encode(rows), 128)
    mirrored = codec.decode(codec.encode(-rows), 128)
    assert torch.equal(decoded, -mirrored)
    assert float((decoded.double() + mirrored.double()).sum()) == 0


@BOOKS
def test_rounding_to_integers_costs_less_than_a_thousandth(book: Codebook) -> None:
    levels, error = PUBLISHED[book.bits]
    ideal = [-level for level in reversed(levels)] + list(levels)
    product, square = moments(ideal)
    assert 1 - 2 * product + square == pytest.approx(error, rel=2e-3)
    assert corrected_error([level * book.step for level in book.levels]) <= 1.001 * corrected_error(ideal)


def test_a_hand_made_row_of_four_bits_decodes_as_drawn() -> None:
    codec = codecs()["kv4"]
    codes = [(7 * dim + 3) % 16 for dim in range(16)]
    data = [codes[j] | codes[j + 8] << 4 for j in range(8)]
    row = torch.tensor([*data, 0x00, 0x40], dtype=torch.uint8)  # fp16 2.0
    assert codec.decode(row, 16).tolist() == [2.0 * FOUR_BITS.levels[code] for code in codes]


def test_a_hand_made_row_of_three_bits_decodes_as_drawn() -> None:
    codec = codecs()["kv3"]
    dim = 32
    codes = [(5 * place + 2) % 8 for place in range(dim)]
    low = [sum((codes[j + part * dim // 4] & 3) << 2 * part for part in range(4)) for j in range(dim // 4)]
    high = [sum((codes[j + part * dim // 8] >> 2) << part for part in range(8)) for j in range(dim // 8)]
    row = torch.tensor([*low, *high, 0x00, 0x38], dtype=torch.uint8)  # fp16 0.5
    assert codec.decode(row, dim).tolist() == [0.5 * THREE_BITS.levels[code] for code in codes]


@BOOKS
@pytest.mark.parametrize("scale", [1e-2, 1.0, 1e4])
def test_the_decoded_row_has_the_norm_of_the_row(book: Codebook, scale: float) -> None:
    rows = torch.randn(256, 128, generator=torch.Generator().manual_seed(5)) * scale
    rows[:64, 9] *= 50
    rows[64:96] += 10 * scale
    codec = LloydMax("any", book)
    decoded = codec.decode(codec.encode(rows), 128)
    # What is left is the rounding of the fp16 scale.
    assert torch.allclose(decoded.norm(dim=-1), rows.norm(dim=-1), rtol=2**-11, atol=0)


@BOOKS
def test_numbers_take_their_nearest_level_and_midpoints_the_lower_one(book: Codebook) -> None:
    codec = LloydMax("any", book)
    edges = torch.tensor(book.edges)
    values = torch.cat((edges, edges - 1e-3, edges + 1e-3, torch.tensor([-1e9, -0.0, 0.0, 1e9])))
    expected = torch.bucketize(values, edges)
    assert torch.equal(codec._nearest(values).long(), expected)


@BOOKS
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_rows_close_to_gaussian_survive_sixteen_re_encodings_unchanged(book: Codebook, dim: int) -> None:
    codec = LloydMax("any", book)
    rows = torch.randn(4096, dim, generator=torch.Generator().manual_seed(7))
    first = codec.encode(rows)
    again = first
    for _ in range(16):
        again = codec.encode(codec.decode(again, dim))
    assert torch.equal(first, again)


@pytest.mark.parametrize(("name", "bits", "bar"), [("kv4", 4.125, 2.85), ("kv3", 3.125, 2.65)])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_distortion_stays_close_to_the_rate_distortion_bound(name: str, bits: float, bar: float, seed: int) -> None:
    found = distortion(codecs()[name], dim=128, rows=4096, seed=seed)
    assert found.bits == bits
    assert found.ratio <= bar
