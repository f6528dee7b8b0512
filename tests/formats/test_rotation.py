"""The random-sign Hadamard rotation: orthonormal, mixing, exact, and the same for ever."""

from __future__ import annotations

import hashlib
import math

import pytest
import torch

from truekv.core.errors import Refused
from truekv.formats.planes import on_grid, row_sum
from truekv.formats.rotation import check_rotation, matrix, rotate, signs, unrotate

DIMS = (16, 24, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 320, 384, 512, 576)


@pytest.mark.parametrize("dim", DIMS)
def test_it_is_orthonormal_and_every_channel_reaches_every_other(dim: int) -> None:
    rotation = matrix(dim).double()
    assert torch.allclose(rotation @ rotation.T, torch.eye(dim, dtype=torch.float64), atol=1e-6)
    # All entries have one size: an outlier is spread over the whole row, whatever its channel.
    assert torch.allclose(rotation.abs(), torch.full_like(rotation, 1 / math.sqrt(dim)), rtol=1e-6)


@pytest.mark.parametrize("dim", DIMS)
def test_rotating_back_gives_the_row(dim: int) -> None:
    rows = torch.randn(7, 3, dim, generator=torch.Generator().manual_seed(dim))
    assert torch.allclose(unrotate(rotate(rows)), rows, atol=2e-6)
    assert torch.allclose(rotate(rows).double(), rows.double() @ matrix(dim).double().T, atol=1e-6)
    assert torch.allclose(rotate(rows).norm(dim=-1), rows.norm(dim=-1), rtol=1e-6)


@pytest.mark.parametrize("dim", [64, 80, 512])
def test_a_row_does_not_depend_on_its_batch(dim: int) -> None:
    rows = torch.randn(257, dim, generator=torch.Generator().manual_seed(1))
    rows[::3, 2] *= 1e6
    rows[::5] *= 1e-20
    for turn in (rotate, unrotate):
        together = turn(rows)
        for index in (0, 3, 100, 256):
            assert torch.equal(turn(rows[index]), together[index])
            assert torch.equal(turn(rows[index : index + 1])[0], together[index])
        assert torch.equal(turn(rows.flip(0)).flip(0), together)


def test_sums_do_not_depend_on_their_order() -> None:
    values = torch.randn(50, 512, generator=torch.Generator().manual_seed(2))
    values[:, ::7] *= 1e-6
    values[:, 5] = 1e5
    order = torch.randperm(512, generator=torch.Generator().manual_seed(3))
    assert torch.equal(row_sum(values), row_sum(values[:, order]))
    assert not torch.equal(values.sum(-1), values[:, order].sum(-1))  # which a plain sum does not achieve
    assert torch.allclose(row_sum(values)[:, 0].double(), values.double().sum(-1), rtol=1e-7)
    # Not only after rounding: the float64 sums themselves are exact, which those of the raw numbers are not.
    assert on_grid(values).sum(-1).tolist() == [math.fsum(row) for row in on_grid(values).tolist()]
    assert values.double().sum(-1).tolist() != [math.fsum(row) for row in values.tolist()]
    assert float((on_grid(values) - values.double()).abs().max()) <= 1e5 * 2.0**-40


def test_the_signs_are_fixed_for_ever() -> None:
    # Rows stored by one version must be readable by the next: never change these, raise frame.VERSION.
    text = "".join("+" if sign > 0 else "-" for dim in (64, 80, 128, 192, 256, 512) for sign in signs(dim))
    assert text[:64] == "--+++++---++-+++++--+-++----+++-+++-+-+++++-++-+--+-+-+--++-+-++"
    assert (
        hashlib.sha256(text.encode()).hexdigest() == "f76a44121744bf9b756086f61f0af9d1e5fb51ab261d1343482fe93add367e57"
    )
    for dim in (64, 128, 256, 512):
        assert abs(sum(signs(dim))) < 4 * math.sqrt(dim)


def test_the_matrix_is_fixed_for_ever() -> None:
    entries = torch.cat([(matrix(dim) > 0).flatten() for dim in (64, 80, 96, 128, 192)])
    assert (
        hashlib.sha256(entries.numpy().tobytes()).hexdigest()
        == "18076221961788780fd893c03422ec5c10d0c18e2b66748aa56a5e67c7c49578"
    )


@pytest.mark.parametrize("dim", [0, 4 * 23 * 2, 34, 520])
def test_a_length_without_a_matrix_is_refused(dim: int) -> None:
    with pytest.raises(Refused, match=f"rows of {dim} numbers"):
        check_rotation(dim)
