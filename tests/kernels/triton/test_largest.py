"""Which numbers of a row are the largest, in the interpreter, and that the same is drawn from them as from the row."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from truekv.core.sampling import Draw
from truekv.kernels.reference import sampling
from truekv.kernels.reference.ops import OPS as REFERENCE
from truekv.kernels.table import fastest_sampling
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.largest import BLOCK, SPAN
from truekv.kernels.triton.ops import OPS as TRITON

if TYPE_CHECKING:
    from truekv.core.sampling import Sampling

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels run on a GPU only: make gpu tests them there")
DTYPES = [torch.float32, torch.bfloat16]
# Of a row that one program takes, and of one that several do.
DIMS = [1, 2, 127, BLOCK - 1, BLOCK, BLOCK + 1, SPAN, SPAN + 1, 3 * SPAN - 5, 18 * SPAN + 77]


def random(rows: int, dim: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Rows below zero, with NaN between them."""
    wide = torch.full((rows, dim + 3), torch.nan, dtype=dtype)
    wide[:, :dim] = torch.randn(rows, dim, generator=torch.Generator().manual_seed(dim)).to(dtype) - 10
    return wide[:, :dim]


def places(x: torch.Tensor) -> list[int]:
    """Ours, which the reference agrees with, and where there is one both ways of drawing a greedy token."""
    found = TRITON.largest(x)
    assert found.dtype == torch.int64
    assert torch.equal(found, REFERENCE.largest(x))
    for place, row in zip(found.tolist(), x.float(), strict=True):
        if place >= 0:
            draw = Draw(row.contiguous(), 0.0, 0, 1.0, 0.0, 0.0)
            assert sampling.SAMPLING.draw([draw]) == fastest_sampling().draw([draw]) == [place]
    return found.tolist()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_it_is_the_first_of_equal_ones(dim: int, dtype: torch.dtype) -> None:
    x = random(3, dim, dtype)
    assert places(x) == x.argmax(-1).tolist()
    for place in {0, dim // 3, dim - 1}:
        for again in {place, (place + dim) // 2, dim - 1}:
            tied = x.clone()
            tied[:, place] = tied[:, again] = 1.5
            assert places(tied) == [place] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS[1:])
def test_zeros_of_either_sign_are_one_zero(dim: int, dtype: torch.dtype) -> None:
    x = random(2, dim, dtype)
    place = dim // 3
    x[0, place], x[0, -1] = -0.0, 0.0
    x[1, place], x[1, -1] = 0.0, -0.0
    assert places(x) == [place, place]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_a_row_with_a_number_that_is_not_finite_has_none(dim: int, dtype: torch.dtype) -> None:
    x = random(3, dim, dtype)
    expected = x.argmax(-1).tolist()
    for place in {0, dim // 2, dim - 1}:
        for value in (torch.nan, -torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[1, place] = value
            assert places(spoilt) == [expected[0], -1, expected[2]]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [5, SPAN + 9])
def test_numbers_of_any_size(dim: int, dtype: torch.dtype) -> None:
    """The greatest and the least finite numbers, denormal ones, and neighbours that differ in their last bit."""
    most = torch.finfo(dtype).max
    assert places(torch.full((2, dim), -most, dtype=dtype)) == [0, 0]
    # The interpreter widens denormal numbers of half the bits to zeros.
    denormal = [(-1e-40, 0.0), (0.0, 1e-40), (-2e-40, -1e-40)] if dtype == torch.float32 else []
    for less, more in ((-most, -most * 0.5), (most * 0.5, most), *denormal):
        x = torch.full((1, dim), less, dtype=dtype)
        x[0, -2] = more
        assert places(x) == [dim - 2]
    bits = torch.tensor([1.0, -1.0], dtype=dtype).view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    for step, row in ((1, 0), (-1, 1)):
        x = torch.full((1, dim), 1.0 if row == 0 else -1.0, dtype=dtype)
        x[0, -1] = (bits + step).view(dtype)[row]
        assert places(x) == [dim - 1]


@pytest.mark.parametrize("dim", [96, SPAN + 100])
def test_any_number_of_rows(dim: int) -> None:
    whole = random(40, dim)
    found = places(whole)
    assert len(set(found)) > 10
    for rows in (0, 1, 2, 7, 33, 40):
        assert places(whole[:rows]) == found[:rows]
    assert places(whole[::3]) == found[::3]
    assert places(whole.t().contiguous().t()) == found


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [3, 127, SPAN + 9])
def test_the_best_are_those_of_a_stable_sort(dim: int, dtype: torch.dtype) -> None:
    x = random(4, dim, dtype)
    # Ties in and at the edge of what is wanted, and zeros of both signs.
    x[1] = x[1].round()
    x[2, ::2], x[2, 1::2] = 0.0, -0.0
    x[3] = -torch.finfo(dtype).max
    for count in {1, 2, min(dim, 21), dim}:
        values, places = TRITON.best(x, count)
        expected, wanted = REFERENCE.best(x, count)
        assert torch.equal(places, wanted)
        assert torch.equal(values, expected)
        assert values.dtype == dtype
    assert TRITON.best(x[:0], 2)[1].shape == (0, 2)
    spoilt = x.clone()
    spoilt[1, dim // 2] = torch.nan
    assert torch.equal(TRITON.best(spoilt, 2)[1][2:], REFERENCE.best(x, 2)[1][2:])


@pytest.mark.parametrize("kernels", [sampling.SAMPLING, fastest_sampling()], ids=["reference", "fastest"])
@pytest.mark.parametrize(
    "asked", [(0.7, 1.0, 0.0), (0.7, 0.9, 0.0), (1.5, 1.0, 0.1), (1.0, 0.8, 0.05), (1e-30, 1.0, 0.0)]
)
def test_of_the_best_the_same_is_drawn_as_of_the_whole_row(
    kernels: Sampling, asked: tuple[float, float, float]
) -> None:
    """What top_k leaves and one more: the weights are the same bits, so every number draws the same token."""
    temperature, top_p, min_p = asked
    x = random(6, 3001) * 0.3
    x[1] = x[1].round()
    x[2] = 0.0
    for top_k in (2, 20, 300):
        values, places = TRITON.best(x, top_k + 1)
        for row, best, place in zip(x, values, places, strict=True):
            whole, few = (Draw(item.contiguous(), temperature, top_k, top_p, min_p, 0.0) for item in (row, best))
            weights, tokens = kernels.candidates(whole)
            found, among = kernels.candidates(few)
            assert torch.equal(found, weights)
            assert torch.equal(place[among], tokens)
            points = torch.rand(20, dtype=torch.float64, generator=torch.Generator().manual_seed(top_k)).tolist()
            drawn = kernels.draw([few._replace(point=point) for point in points])
            assert place[drawn].tolist() == kernels.draw([whole._replace(point=point) for point in points])
