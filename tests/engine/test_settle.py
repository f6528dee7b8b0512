"""Draws from the best logits alone, or where the logits are, are those from whole rows, or these are asked for."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from truekv.core.sampling import Draw, Reading
from truekv.engine import settle
from truekv.engine.settle import drawn, masses, settled
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


def elsewhere(logits: torch.Tensor, temperature: float, points: list[float]) -> list[int]:
    """What is drawn where the logits are, from each row at its point."""
    temperatures = torch.full((len(logits),), temperature, dtype=torch.float64)
    return drawn(logits, temperatures, torch.tensor(points, dtype=torch.float64)).tolist()


def here(sampling: Any, logits: torch.Tensor, temperature: float, points: list[float]) -> list[int]:
    return sampling.draw(
        [Draw(row, temperature, 0, 1.0, 0.0, point) for row, point in zip(logits, points, strict=True)]
    )


def odd_rows(vocabulary: int) -> torch.Tensor:
    """Likely tokens, a flat row, one of equal numbers, one with gaps, one of few values, one with a single token."""
    make = torch.Generator().manual_seed(vocabulary)
    logits = torch.randn(6, vocabulary, generator=make)
    logits[0] *= 6
    logits[2] = 1.5
    logits[3, torch.rand(vocabulary, generator=make) < 0.7] = -math.inf
    logits[4] = logits[4].round()
    logits[5] = -math.inf
    logits[3:, vocabulary // 2] = 7.0
    return logits


@pytest.mark.parametrize("sampling", BACKENDS)
@pytest.mark.parametrize("temperature", [1e-300, 1e-3, 0.8, 1.0, 3.0, 100.0])
@pytest.mark.parametrize("vocabulary", [1, 2, 63, 511, 512, 513, VOCABULARY, 151_936])
def test_tokens_drawn_where_the_logits_are_are_those_of_whole_rows(
    vocabulary: int, temperature: float, sampling: Any
) -> None:
    logits = odd_rows(vocabulary)
    make = torch.Generator().manual_seed(7)
    for _ in range(5 if vocabulary > VOCABULARY else 40):
        points = torch.rand(6, dtype=torch.float64, generator=make).tolist()
        # None is near an edge.
        assert elsewhere(logits, temperature, points) == here(sampling, logits, temperature, points)


@pytest.mark.parametrize("sampling", BACKENDS)
def test_of_rows_whose_point_is_at_an_edge_more_is_asked_for(sampling: Any) -> None:
    logits = odd_rows(VOCABULARY)[1:2]
    (weights, tokens) = REFERENCE.candidates(Draw(logits[0], 0.8, 0, 1.0, 0.0, 0.0))
    ends = weights.cumsum(0)
    # Edges within the row and between spans of it.
    edges = [settle.SPAN - 1, settle.SPAN, 3 * settle.SPAN - 1, *range(17, VOCABULARY, 331)]
    for edge in edges:
        point = float(ends[edge] / ends[-1])
        # Nobody knows on which side of the edge the last bits put it.
        for off in (0.0, -2e-16, 2e-16, -1e-12, 1e-12, -9e-10, 9e-10):
            assert elsewhere(logits, 0.8, [point + off]) == [-1]
        for off in (-2e-9, 2e-9):
            (token,) = elsewhere(logits, 0.8, [point + off])
            assert token == int(tokens[edge + (off > 0)])
            assert [token] == here(sampling, logits, 0.8, [point + off])
    # A row's own ends are edges too.
    assert elsewhere(logits.expand(2, -1), 0.8, [0.0, 1 - 2**-53]) == [-1, -1]


def test_a_token_whose_share_is_no_wider_than_its_edges_is_never_certain() -> None:
    logits = torch.tensor([[0.0, math.log(1e-9), 0.0]])
    found = [elsewhere(logits, 1.0, [0.5 + step * 1e-10])[0] for step in range(-30, 31)]
    assert found == [0] * found.count(0) + [-1] * found.count(-1) + [2] * found.count(2)
    assert found.count(0) == found.count(2) > 10


def test_rows_without_a_distribution_have_no_token() -> None:
    logits = torch.randn(5, VOCABULARY, generator=torch.Generator().manual_seed(3))
    logits[0, 4000], logits[1, 17], logits[2] = math.nan, math.inf, -math.inf
    logits[3] = math.nan
    points = [0.5] * 5
    assert elsewhere(logits, 0.8, points)[:4] == here(REFERENCE, logits, 0.8, points)[:4] == [-1] * 4
    # Their neighbours do not suffer.
    assert elsewhere(logits, 0.8, points)[4:] == here(REFERENCE, logits, 0.8, points)[4:]


class Seen(TorchDispatchMode):
    """Every operation, and the bytes of its largest result of float64."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: list[str] = []
        self.most = 0

    def __torch_dispatch__(self, function: Any, types: Any, arguments: Any = (), options: Any = None) -> Any:
        made = function(*arguments, **(options or {}))
        self.operations.append(function.overloadpacket.__name__)
        for item in made if isinstance(made, (list, tuple)) else [made]:
            if isinstance(item, torch.Tensor) and item.dtype == torch.float64:
                self.most = max(self.most, item.untyped_storage().nbytes())
        return made


@pytest.mark.parametrize("rows_at_once", [0, 1, 3, 4])
def test_weights_have_room_whatever_the_number_of_rows(rows_at_once: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the host waits for nothing in between."""
    logits = odd_rows(VOCABULARY)[:4].repeat(2, 1)
    temperatures = torch.linspace(0.5, 2.0, 8, dtype=torch.float64)
    points = torch.linspace(0.1, 0.9, 8, dtype=torch.float64)
    best = logits.amax(1)
    expected = masses(logits, best, temperatures), drawn(logits, temperatures, points)
    row = 8 * settle.SPAN * math.ceil(VOCABULARY / settle.SPAN)
    monkeypatch.setattr(settle, "ROOM", rows_at_once * row + 5)
    with Seen() as seen:
        found = masses(logits, best, temperatures), drawn(logits, temperatures, points)
    assert all(map(torch.equal, found, expected))
    # A row has room in any case.
    assert seen.most == max(1, rows_at_once) * row
    assert seen.operations.count("exp_") == 2 * math.ceil(8 / max(1, rows_at_once))
    assert not {"_local_scalar_dense", "nonzero", "is_nonzero", "equal"} & {*seen.operations}
