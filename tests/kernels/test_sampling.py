"""The reference: the tokens that can be drawn are those that a sort of the whole vocabulary finds."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import torch

from truekv.kernels.reference import sampling

if TYPE_CHECKING:
    from collections.abc import Callable

LENGTHS = (1, 63, 64, 65, 1000, 4096, 5003)


def rows(length: int) -> list[torch.Tensor]:
    make = torch.Generator().manual_seed(length)
    flat = torch.randn(length, generator=make)
    peaked = 0.1 * flat
    peaked[torch.randint(length, (5,), generator=make)] += 9
    steps = (4 * flat).round()
    masked = flat.masked_fill(torch.rand(length, generator=make) < 0.9, -math.inf)
    masked[-1] = 1.0
    return [flat, 6 * flat, peaked, steps, masked, torch.zeros(length)]


@pytest.mark.parametrize("length", LENGTHS)
def test_largest_is_the_first_of_the_largest(length: int) -> None:
    for row in rows(length):
        assert sampling.largest(row) == int(row.argmax())
        for place in {0, length // 2, length - 1}:
            peak = row.clone()
            peak[place] = peak[-1] = 50.0
            assert sampling.largest(peak) == place


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("count", [1, 2, 20, 64, 300, 10_000])
def test_best_is_the_beginning_of_a_sort(length: int, count: int) -> None:
    for row in rows(length):
        values, places = sampling.best(row, count)
        ordered = row.sort(descending=True, stable=True)
        assert torch.equal(values, ordered.values[:count])
        assert torch.equal(places, ordered.indices[:count])


@pytest.mark.parametrize("length", LENGTHS)
def test_at_least_finds_every_place(length: int) -> None:
    for row in rows(length):
        for bound in (-1.0, 0.0, 0.5, 3.0, float(row.max())):
            assert torch.equal(sampling.at_least(row, bound), (row >= bound).nonzero().flatten())


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("mass", [1e-9, 0.3, 0.95, 0.999999, 1 - 1e-12])
def test_nucleus_is_that_of_a_sort(length: int, mass: float) -> None:
    for row in rows(length):
        weights = torch.softmax(row.double(), 0)
        ordered = weights.sort(descending=True, stable=True)
        kept = (ordered.values.cumsum(0) - ordered.values) < mass
        values, places = sampling.nucleus(weights, mass)
        assert torch.equal(values, ordered.values[kept])
        assert torch.equal(places, ordered.indices[kept])


def test_wide_rows_are_not_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither search sees more than a few blocks of a row with a few likely tokens."""
    row = torch.zeros(150_000)
    row[[7, 70_000, 149_999]] = 30.0
    seen: list[int] = []
    topk, sort = torch.Tensor.topk, torch.Tensor.sort

    def counted(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(row: torch.Tensor, *arguments: Any, **named: Any) -> Any:
            seen.append(len(row))
            return function(row, *arguments, **named)

        return run

    monkeypatch.setattr(torch.Tensor, "topk", counted(topk))
    monkeypatch.setattr(torch.Tensor, "sort", counted(sort))
    assert sorted(sampling.best(row, 3)[1].tolist()) == [7, 70_000, 149_999]
    assert sorted(sampling.nucleus(torch.softmax(row.double(), 0), 0.9)[1].tolist()) == [7, 70_000, 149_999]
    assert seen
    assert max(seen) < 3000
