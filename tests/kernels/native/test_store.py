"""Native encoding writes the very bytes of the reference, and nothing else."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from formats.test_conformance import hard_rows
from kernels.native.cache import PAGE, make_step
from memory.toys import gqa

from truekv.core.errors import Corrupted
from truekv.core.protocols import Stored
from truekv.core.recording import recording
from truekv.core.spec import Field
from truekv.formats.choice import codecs
from truekv.formats.frame import Frame, frame_for
from truekv.kernels.native import paged as native
from truekv.kernels.native.library import library
from truekv.kernels.reference import paged as reference

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native library was built")


every_isa = pytest.mark.usefixtures("isa")


def place(name: str, dim: int, heads: int, tokens: int, *, measured: bool = False) -> tuple[Stored, Stored]:
    """Two equal fields in memory full of poison, behind another field of the same page."""
    make = torch.Generator().manual_seed(dim)
    item, chosen = Field("k", heads, dim, "key"), codecs()[name]
    frame = Frame(torch.randn(heads, dim, generator=make), 0.5 + torch.rand(heads, dim, generator=make))
    pages = -(-tokens // PAGE) + 2
    size = PAGE * heads * sum(chosen.planes(dim))
    return tuple(
        Stored(
            item,
            chosen,
            frame_for(chosen, frame if measured else None),
            torch.full((pages, 48 + size), 0xFF, dtype=torch.uint8),
            48,
            PAGE,
        )
        for _ in range(2)
    )


def store_both(fields: tuple[Stored, Stored], rows: torch.Tensor) -> None:
    tokens = len(rows)
    order = torch.randperm(fields[0].data.shape[0], generator=torch.Generator().manual_seed(5))
    step = make_step([tokens], [tokens], order[None])
    reference.store((fields[0],), (rows,), step)
    native.store((fields[1],), (rows,), step)


@every_isa
@pytest.mark.parametrize("name", sorted(codecs()))
def test_bytes_equal_those_of_the_reference(name: str) -> None:
    for dim in (16, 64, 80, 96, 128, 192, 256, 512):
        heads = 2
        rows = torch.cat([rows[:4] for _, rows in hard_rows(dim)])
        rows = rows[: len(rows) // heads * heads].reshape(-1, heads, dim)
        for kind in (rows, rows.bfloat16()):
            if not torch.isfinite(kind.float()).all():
                continue
            for measured in (False, True):
                fields = place(name, dim, heads, len(rows), measured=measured)
                usable = kind
                if measured or fields[0].frame.rotated:
                    # A frame takes numbers at the end of float32 beyond it, which is refused.
                    usable = kind[kind.abs().amax((1, 2)) < 1e36]
                store_both(fields, usable)
                assert torch.equal(fields[0].data, fields[1].data), (dim, kind.dtype, measured)


def test_rows_may_be_strided_as_models_make_them() -> None:
    fields = place("int8", 64, 2, 40)
    fused = torch.randn(40, 5, 128)
    store_both(fields, fused[:, 1:3, 64:])
    assert torch.equal(fields[0].data, fields[1].data)
    store_both(fields, fused.transpose(0, 2)[:40, :2, :].expand(40, 2, 40)[:, :, :32].repeat(1, 1, 2))
    assert torch.equal(fields[0].data, fields[1].data)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_row_that_is_not_finite_is_refused_or_recorded_as_nan_and_spoils_no_other(bad: float) -> None:
    for name in ("f32", "bf16", "fp8_e5m2", "int8", "kv4", "turboquant_3bit", "q4_0", "q5_1"):
        fields = place(name, 64, 2, 20)
        rows = torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(17))
        step = make_step([20], [20], torch.tensor([[1]]))
        native.store((fields[0],), (rows,), step)
        rows[17, 1, 63] = bad
        with pytest.raises(Corrupted, match="1 of 40 cache rows hold NaN or infinity"):
            native.store((fields[1],), (rows,), step)
        with recording():
            native.store((fields[1],), (rows,), step)
            reference.store((fields[0],), (rows,), step)
        assert torch.equal(fields[0].data, fields[1].data)
        stored = torch.cat([plane[1, 1, 17] for plane in reference.planes(fields[1])])
        assert fields[1].format.decode(stored, 64).isnan().all()


@pytest.mark.parametrize("seed", [655, 1539, 2127])
def test_scales_halfway_between_two_codes_are_rounded_alike(seed: int) -> None:
    """torch's square roots in float32 are off by a unit at times: these rows got another scale of the reference."""
    fields = place("kv4", 64, 2, 20)
    rows = torch.randn(20, 2, 64, generator=torch.Generator().manual_seed(seed))
    step = make_step([20], [20], torch.tensor([[1]]))
    native.store((fields[0],), (rows,), step)
    reference.store((fields[1],), (rows,), step)
    assert torch.equal(fields[0].data, fields[1].data)


def test_a_token_of_no_line_is_stored_nowhere() -> None:
    _, field = place("int8", 64, 2, 40)
    before = field.data.clone()
    step = make_step([3], [3], torch.tensor([[1]]))
    nowhere = dataclasses.replace(step, line=torch.tensor([-1, -1, -1]))
    native.store((field,), (torch.full((3, 2, 64), math.nan),), nowhere)
    assert torch.equal(field.data, before)


def test_a_frame_that_overflows_is_refused() -> None:
    _, field = place("q8_0", 64, 1, 4)
    narrow = dataclasses.replace(field, frame=Frame(None, torch.full((1, 64), 1e-3)))
    with pytest.raises(Corrupted, match="4 of 4 cache rows"):
        native.store((narrow,), (torch.full((4, 1, 64), 3e38),), make_step([4], [4], torch.tensor([[0]])))


def test_no_rows_are_stored_without_a_word() -> None:
    _, field = place("kv4", 64, 2, 4)
    step = make_step([1], [1], torch.tensor([[0]]))
    empty = dataclasses.replace(step, page=step.page[:0], line=step.line[:0])
    before = field.data.clone()
    native.store((field,), (torch.zeros(0, 2, 64),), empty)
    assert torch.equal(field.data, before)


def test_the_layer_of_these_tests_is_one_that_runs_natively() -> None:
    layer = gqa(2, 64)
    for codec in codecs().values():
        assert native.refusal(layer, (codec, codec)) is None
