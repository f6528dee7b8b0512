"""Native sampling against the reference, on every instruction set of the machine: set, order, weights and token."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from truekv.core.errors import Refused
from truekv.core.sampling import Draw
from truekv.kernels.native.library import Library, library
from truekv.kernels.native.sampling import SAMPLING as NATIVE
from truekv.kernels.reference.sampling import SAMPLING as REFERENCE

ISAS = () if library() is None else library().isas  # type: ignore[union-attr]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native library is not built")
LENGTHS = (1, 2, 63, 64, 65, 129, 1000, 4096, 5003, 40_001)
POINTS = (0.0, 1e-12, 0.2, 0.5, 0.999, 1 - 2**-53)
# temperature, top_k, top_p, min_p
FILTERS = (
    (0.0, 0, 1.0, 0.0), (2.0, 1, 0.5, 0.1), (0.8, 0, 1.0, 0.0), (1e-300, 0, 0.9, 0.0), (5e-324, 0, 1.0, 0.0),
    (0.8, 20, 1.0, 0.0), (0.8, 20, 0.95, 0.0), (1.0, 700, 0.5, 0.01), (1.0, 2**24, 0.9, 0.0), (1.0, 2**24, 1.0, 0.0),
    (0.8, 0, 0.95, 0.0), (3.0, 0, 0.95, 0.0), (100.0, 0, 0.999999, 0.0), (1.0, 0, 1e-9, 0.0), (1.0, 0, 1 - 1e-12, 0.0),
    (0.8, 0, 1.0, 0.05), (1.0, 0, 0.7, 0.001), (3.0, 50, 1.0, 0.5), (1.0, 0, 0.3, 1.0), (1.0, 0, 1.0, 5e-324),
)  # fmt: skip


each_isa = pytest.mark.usefixtures("isa")


def native() -> Library:
    found = library()
    assert found is not None
    return found


def poisoned(row: torch.Tensor) -> torch.Tensor:
    """The same numbers between NaN, which no kernel may read as one of them."""
    wide = torch.full((len(row) + 130,), math.nan)
    inside = wide[65 : 65 + len(row)]
    inside.copy_(row)
    return inside


def rows(length: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(length)
    flat = torch.randn(length, generator=make)
    peaked = 0.1 * flat
    peaked[torch.randint(length, (5,), generator=make)] += 9
    masked = flat.masked_fill(torch.rand(length, generator=make) < 0.9, -math.inf)
    masked[-1] = 1.0
    only = torch.full((length,), -math.inf)
    only[length // 2] = -3e38
    zeros = torch.zeros(length)
    zeros[::3] = -0.0
    return [flat, 6 * flat, peaked, (4 * flat).round(), masked, only, zeros, flat.sort().values, 3e38 * flat.tanh()]


def agree(draw: Draw) -> None:
    """The same tokens in the same order, with weights of one proportion; top_p is reached to 1e-12 of the mass."""
    weights, tokens = NATIVE.candidates(draw)
    expected, theirs = REFERENCE.candidates(draw)
    # Where a weight is no normal number the kernel has none at all.
    weights, tokens = (item[weights > 1e-300 * weights.max()] for item in (weights, tokens))
    expected, theirs = (item[expected > 1e-300 * expected.max()] for item in (expected, theirs))
    shorter, longer = sorted((len(tokens), len(theirs)))
    assert shorter
    assert torch.equal(tokens[:shorter], theirs[:shorter])
    if shorter < longer:
        whole = REFERENCE.candidates(draw._replace(top_p=1.0))[0].sort(descending=True).values
        before = (whole.cumsum(0) / whole.sum())[shorter - 1 : longer - 1]
        assert float((before - draw.top_p).abs().max()) <= 1e-12
    weights, expected = weights[:shorter], expected[:shorter]
    torch.testing.assert_close(weights / weights.sum(), expected / expected.sum(), rtol=2e-12, atol=1e-300)


def right(draw: Draw, token: int) -> None:
    """The token is the one whose share of the candidates' mass holds the point, to 1e-12 of that mass."""
    weights, tokens = NATIVE.candidates(draw)
    cumulated = weights.cumsum(0) / weights.sum()
    (place,) = (tokens == token).nonzero().flatten().tolist()
    assert weights[place] > 0
    before = 0.0 if place == 0 else float(cumulated[place - 1])
    assert before - 1e-12 <= draw.point <= float(cumulated[place]) + 1e-12


@pytest.mark.parametrize("length", LENGTHS)
@each_isa
def test_candidates_and_tokens_are_the_references(length: int) -> None:
    for row, filters in itertools.product(rows(length), FILTERS):
        draws = [Draw(poisoned(row), *filters, point) for point in POINTS]
        agree(draws[0])
        ours, theirs = NATIVE.draw(draws), REFERENCE.draw(draws)
        for draw, token, expected in zip(draws, ours, theirs, strict=True):
            if token != expected:
                right(draw, token)
        assert sum(map(int.__ne__, ours, theirs)) <= 3


@each_isa
def test_of_equal_numbers_the_first_are_kept() -> None:
    row = torch.zeros(10_000)
    row[5000] = 1.0
    for filters, expected in (
        ((1.0, 4, 1.0, 0.0), [5000, 0, 1, 2]),
        ((1.0, 0, 10.5 / (10_001.7), 0.0), [5000, *range(8)]),
        ((1e9, 0, 10.5 / 10_000, 0.0), [5000, *range(10)]),
    ):
        weights, tokens = NATIVE.candidates(Draw(row, *filters, 0.0))
        assert tokens.tolist() == expected
        assert torch.equal(tokens, REFERENCE.candidates(Draw(row, *filters, 0.0))[1])
        assert len(weights) == len(tokens)


@pytest.mark.parametrize("length", [1, 64, 65, 3000])
@each_isa
def test_a_row_without_a_distribution_has_no_token_and_harms_no_other(length: int) -> None:
    sound = torch.linspace(-1, 1, length)
    broken = [sound.clone() for _ in range(4)]
    broken[0][0], broken[1][-1], broken[2][length // 2] = math.nan, math.nan, math.inf
    broken[3][:] = -math.inf
    for filters in FILTERS:
        (alone,) = NATIVE.draw([Draw(sound, *filters, 0.3)])
        draws = [Draw(row, *filters, 0.3) for row in (broken[0], sound, *broken[1:], sound)]
        assert NATIVE.draw(draws) == [-1, alone, -1, -1, -1, alone]
        assert REFERENCE.draw(draws) == NATIVE.draw(draws)
        assert len(NATIVE.candidates(draws[0])[1]) == 0
    assert NATIVE.draw([]) == []
    logprobs, _, best = NATIVE.logprobs(torch.stack(broken), [0] * 4, 1)
    assert logprobs.isnan().all()
    assert best.isnan().all()


@each_isa
def test_a_row_knows_nothing_of_other_rows_nor_of_threads() -> None:
    make = torch.Generator().manual_seed(1)
    draws = [
        Draw(row, *filters, float(torch.rand((), generator=make)))
        for filters in FILTERS
        for row in (torch.randn(9001, generator=make), torch.zeros(9001), 5 * torch.randn(9001, generator=make))
    ]
    together = NATIVE.draw(draws)
    assert together == [token for draw in draws for token in NATIVE.draw([draw])]
    assert together[::-1] == NATIVE.draw(draws[::-1])
    logits = torch.stack([draw.logits for draw in draws])
    tokens = [draw.top_k % 9001 for draw in draws]
    reported = NATIVE.logprobs(logits, tokens, 7)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            assert NATIVE.draw(draws) == together
            for ours, before in zip(NATIVE.logprobs(logits, tokens, 7), reported, strict=True):
                assert torch.equal(ours, before)
    finally:
        torch.set_num_threads(threads)


@given(
    st.lists(
        st.floats(-(2.0**99), 2.0**99, width=32) | st.sampled_from([0.0, -0.0, 1.0, -math.inf]), min_size=1, max_size=80
    ),
    st.floats(1e-300, 100) | st.sampled_from([0.0, 1.0]),
    st.integers(0, 90),
    st.floats(1e-9, 1) | st.just(1.0),
    st.floats(0, 1) | st.just(0.0),
    st.floats(0, 1, exclude_max=True),
)
@settings(deadline=None)
def test_any_row_gives_what_the_reference_gives(
    row: list[float], temperature: float, top_k: int, top_p: float, min_p: float, point: float
) -> None:
    draw = Draw(poisoned(torch.tensor(row)), temperature, top_k, top_p, min_p, point)
    (token,) = NATIVE.draw([draw])
    if max(row) == -math.inf:
        assert token == REFERENCE.draw([draw])[0] == -1
        return
    if token != REFERENCE.draw([draw])[0]:
        right(draw, token)


@pytest.mark.parametrize("length", LENGTHS)
@each_isa
def test_logprobs_are_those_of_the_softmax(length: int) -> None:
    logits = torch.stack([row for row in rows(length) if bool(row.isfinite().all()) and float(row.abs().max()) < 1e30])
    tokens = [(7 * index) % length for index in range(len(logits))]
    for count in (0, 1, 5, length, 2 * length):
        ours, theirs = NATIVE.logprobs(logits, tokens, count), REFERENCE.logprobs(logits, tokens, count)
        assert ours[1].shape == (len(logits), min(count, length))
        assert torch.equal(ours[1], theirs[1])
        for index in (0, 2):
            torch.testing.assert_close(ours[index], theirs[index], rtol=1e-6, atol=1e-7)


def test_other_logits_are_refused_and_strided_ones_are_read() -> None:
    with pytest.raises(Refused, match=r"float32 logits, not torch\.bfloat16"):
        NATIVE.draw([Draw(torch.zeros(4).bfloat16(), 1.0, 0, 1.0, 0.0, 0.0)])
    every_other = torch.tensor([0.0, 9.0, 1.0, 9.0, 2.0, 9.0])[::2]
    assert NATIVE.draw([Draw(every_other, 0.0, 0, 1.0, 0.0, 0.0)]) == [2]
