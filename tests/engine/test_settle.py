"""Draws from the best logits alone are those from whole rows, or the whole row is asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from truekv.core.sampling import Draw, Reading
from truekv.engine.settle import masses, settled
from truekv.kernels.native.library import library
from truekv.kernels.native.sampling import SAMPLING as NATIVE
from truekv.kernels.reference.sampling import SAMPLING as REFERENCE

VOCABULARY, MOST = 5003, 64
BACKENDS = [pytest.param(REFERENCE, id="reference")]
if library() is not None:
    BACKENDS.append(pytest.param(NATIVE, id="native"))
FILTERS = [
    Reading(MOST, 0.8, 0.95),
    Reading(MOST, 0.8, 0.5),
    Reading(MOST, 1.3, 0.9),
    Reading(MOST, 1e-3, 0.9),
    Reading(MOST, 0.8, 1.0, 0.05),
    Reading(MOST, 2.0, 1.0, 0.3),
    Reading(MOST, 0.8, 0.9, 0.02),
]


def rows(spread: float, seed: int = 0) -> torch.Tensor:
    """Some likely tokens, with equal ones among them, above others that are flat."""
    make = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, VOCABULARY, generator=make)
    for row in logits:
        likely = torch.randperm(VOCABULARY, generator=make)[:12]
        row[likely] = 12 + spread * torch.randn(12, generator=make)
        row[likely[5:7]] = float(row[likely[0]])
    return logits


def best(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    values, places = logits.sort(dim=1, descending=True, stable=True)
    return values[:, :MOST], places[:, :MOST]


def kept(logits: torch.Tensor, reading: Reading, off: float = 0.0) -> tuple[torch.Tensor, torch.Tensor] | None:
    values, places = best(logits)
    temperature = torch.full((len(logits),), reading.temperature, dtype=torch.float64)
    return settled(values, places, reading, masses(logits, values[:, 0], temperature) * (1 + off))


@pytest.mark.parametrize("sampling", BACKENDS)
@pytest.mark.parametrize("reading", FILTERS)
@pytest.mark.parametrize("spread", [0.5, 3.0])
def test_candidates_and_tokens_are_those_of_whole_rows(spread: float, reading: Reading, sampling: Any) -> None:
    logits = rows(spread)
    found = kept(logits, reading)
    assert found is not None
    for row, values, places in zip(logits, *found, strict=True):
        left = reading.top_p if reading.min_p else 1.0
        weights, order = sampling.candidates(Draw(values, reading.temperature, 0, left, 0.0, 0.0))
        order, weights = order[weights > 0], weights[weights > 0]
        wanted = sampling.candidates(Draw(row, reading.temperature, 0, reading.top_p, reading.min_p, 0.0))
        wanted = [side[wanted[0] > 0] for side in wanted]
        assert places[order].tolist() == wanted[1].tolist()
        torch.testing.assert_close(weights / weights.sum(), wanted[0] / wanted[0].sum(), rtol=1e-12, atol=0)
        for point in (0.0, 0.1, 0.35, 0.5, 0.77, 0.999, 1 - 2**-53):
            (short,) = sampling.draw([Draw(values, reading.temperature, 0, left, 0.0, point)])
            whole = sampling.draw([Draw(row, reading.temperature, 0, reading.top_p, reading.min_p, point)])
            assert [int(places[short])] == whole


@pytest.mark.parametrize("reading", [Reading(MOST, 3.0, 0.99), Reading(MOST, 5.0, 1.0, 0.01)])
def test_of_flat_rows_more_is_asked_for(reading: Reading) -> None:
    logits = rows(3.0)
    assert kept(logits, reading) is None
    # One of them is enough.
    logits[:5] = logits[:5] * 1000
    assert kept(logits[:5], reading) is not None
    assert kept(logits, reading) is None


def test_of_two_equally_likely_tokens_at_the_edge_more_is_asked_for() -> None:
    """A share of exactly half: the last bits of a mass decide, so those of the whole row do."""
    logits = torch.full((1, VOCABULARY), -1000.0)
    logits[0, [7, 11]] = 3.0
    assert kept(logits, Reading(MOST, 1.0, 0.5)) is None
    (values, places) = kept(logits, Reading(MOST, 1.0, 0.4)) or ()
    assert places[0, values[0] > -math.inf].tolist() == [7]
    (values, places) = kept(logits, Reading(MOST, 1.0, 0.6)) or ()
    assert places[0, values[0] > -math.inf].tolist() == [7, 11]
    # A mass that is off by more than a device's may be changes what stays.
    (values, places) = kept(logits, Reading(MOST, 1.0, 0.5), off=1e-6) or ()
    assert places[0, values[0] > -math.inf].tolist() == [7, 11]


def test_without_filters_all_stays() -> None:
    values, places = best(rows(1.0))
    assert settled(values, places, Reading(MOST), torch.zeros(6)) == (values, places)
