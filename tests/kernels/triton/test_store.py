"""Triton's encoding writes the very bytes of the reference, and nothing else; and decodes them to the last bit."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import triton as compiler
import triton.language as tl
from formats.test_conformance import hard_rows
from kernels.native.cache import PAGE, make_step
from kernels.native.test_store import place
from kernels.triton.watched import Watched

from truekv.core.errors import Corrupted
from truekv.core.recording import recording
from truekv.formats.choice import codecs
from truekv.formats.frame import Frame
from truekv.kernels.reference import paged as reference
from truekv.kernels.triton import paged as triton
from truekv.kernels.triton.codes import dims, read_rows
from truekv.kernels.triton.layout import Row, layout

NAMES = sorted(codecs())


def bytes_agree(name: str, dim: int, rows: torch.Tensor, *, measured: bool) -> None:
    fields = place(name, dim, 2, len(rows), measured=measured)
    if measured or fields[0].frame.rotated:
        # A frame takes numbers at the end of float32 beyond it, which is refused.
        rows = rows[rows.abs().amax((1, 2)) < 1e36]
    order = torch.randperm(fields[0].data.shape[0], generator=torch.Generator().manual_seed(5))
    step = make_step([len(rows)], [len(rows)], order[None])
    reference.store((fields[0],), (rows,), step)
    triton.store((fields[1],), (rows,), step)
    assert torch.equal(fields[0].data, fields[1].data)


def hard(dim: int) -> torch.Tensor:
    rows = torch.cat([rows[:4] for _, rows in hard_rows(dim)])
    return rows[: len(rows) // 2 * 2].reshape(-1, 2, dim)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("dim", [64, 80])
@pytest.mark.parametrize("name", NAMES)
def test_bytes_equal_those_of_the_reference(name: str, dim: int, measured: bool) -> None:
    bytes_agree(name, dim, hard(dim), measured=measured)


@pytest.mark.parametrize("dim", [16, 96, 128, 192, 256, 512])
@pytest.mark.parametrize("name", ["bf16", "fp8_e4m3", "int8", "kv4", "kv3", "q5_1", "iq4_nl+hadamard"])
def test_bytes_of_other_dims(name: str, dim: int) -> None:
    bytes_agree(name, dim, hard(dim)[::5], measured=True)


def test_bytes_of_bfloat16_rows() -> None:
    rows = hard(64).bfloat16()
    for name in ("int8", "q4_0"):
        bytes_agree(name, 64, rows[torch.isfinite(rows).all(-1).all(-1)], measured=False)


def test_every_code_of_eight_bits_is_written() -> None:
    """Every number that an fp8 code means, and the numbers half-way between two: ties go to even."""
    for name, kind in (("fp8_e4m3", torch.float8_e4m3fn), ("fp8_e5m2", torch.float8_e5m2)):
        numbers = torch.arange(256, dtype=torch.uint8).view(kind).float()
        numbers = numbers[torch.isfinite(numbers)].sort().values
        numbers = torch.cat([numbers, (numbers[1:] + numbers[:-1]) / 2])
        rows = torch.nn.functional.pad(numbers, (0, -len(numbers) % 128)).reshape(-1, 2, 64)
        bytes_agree(name, 64, rows, measured=False)


def test_rows_may_be_strided_as_models_make_them() -> None:
    fields = place("int8", 64, 2, 40)
    fused = torch.randn(40, 5, 128)
    step = make_step([40], [40], torch.arange(3)[None])
    for rows in (fused[:, 1:3, 64:], fused.transpose(0, 2)[:40, :2, :1].expand(40, 2, 64)):
        reference.store((fields[0],), (rows,), step)
        triton.store((fields[1],), (rows,), step)
        assert torch.equal(fields[0].data, fields[1].data)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", ["f32", "bf16", "fp8_e5m2", "int8", "kv4", "turboquant_3bit", "q4_0", "q5_1"])
def test_a_row_that_is_not_finite_is_refused_or_recorded_as_nan_and_spoils_no_other(name: str, bad: float) -> None:
    fields = place(name, 64, 2, 20)
    rows = torch.randn(20, 2, 64)
    step = make_step([20], [20], torch.tensor([[1]]))
    triton.store((fields[0],), (rows,), step)
    rows[17, 1, 63] = bad
    with pytest.raises(Corrupted, match="1 of 40 cache rows hold NaN or infinity"):
        triton.store((fields[1],), (rows,), step)
    with recording():
        triton.store((fields[1],), (rows,), step)
        reference.store((fields[0],), (rows,), step)
    assert torch.equal(fields[0].data, fields[1].data)
    stored = torch.cat([plane[1, 1, 17] for plane in reference.planes(fields[1])])
    assert fields[1].format.decode(stored, 64).isnan().all()


KINDS = [
    (("int8", 64, 2, True), ("kv4", 80, 1, False)),
    (("turboquant_4bit", 128, 1, False), ("bf16", 64, 3, True)),
    (("q5_1", 96, 3, False), ("q5_1+hadamard", 96, 3, False)),
    (("fp8_e4m3", 512, 1, True), ("int8", 64, 1, True)),
    (("kv3", 64, 2, True), ("f32", 48, 1, True), ("q4_0", 64, 4, False)),
]


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(name for name, *_ in kinds))
def test_fields_of_other_codes_frames_and_heads_are_stored_in_one_launch(
    kinds: tuple[tuple[str, int, int, bool], ...],
) -> None:
    """Of a layer that has three, in two."""
    tokens = 40
    placed = [place(name, dim, heads, tokens, measured=measured) for name, dim, heads, measured in kinds]
    theirs, ours = (tuple(pair[side] for pair in placed) for side in range(2))
    # Slices of one product, as models make them.
    product = torch.randn(tokens, sum(heads for _, _, heads, _ in kinds), 520)
    split = product.split([heads for _, _, heads, _ in kinds], 1)
    rows = tuple(part[..., :dim] for part, (_, dim, _, _) in zip(split, kinds, strict=True))
    step = make_step([tokens], [tokens], torch.arange(len(ours[0].data)).flip(0)[None])
    reference.store(theirs, rows, step)
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched, "store_kernel")
        triton.store(ours, rows, step)
    tiles = [-(-tokens * heads // 32) for _, _, heads, _ in kinds]
    assert watched.grids == [(sum(tiles[first : first + 2]),) for first in range(0, len(kinds), 2)]
    assert all(torch.equal(one.data, other.data) for one, other in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("which", [0, 1])
def test_rows_that_are_not_finite_are_counted_in_every_field(which: int) -> None:
    fields = tuple(zip(place("int8", 64, 2, 20), place("q4_0", 80, 1, 20), strict=True))
    rows = torch.randn(20, 2, 64), torch.randn(20, 1, 80)
    step = make_step([20], [20], torch.tensor([[1]]))
    rows[which][3, 0, 5] = rows[which][19, 0, 0] = math.nan
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched, "store_kernel")
        with pytest.raises(Corrupted, match="2 of 60 cache rows hold NaN or infinity"):
            triton.store(fields[0], rows, step)
    with recording():
        reference.store(fields[1], rows, step)
    assert len(watched.grids) == 1
    assert all(torch.equal(one.data, other.data) for one, other in zip(*fields, strict=True))


def test_a_token_of_no_line_is_stored_nowhere() -> None:
    fields = place("int8", 64, 2, 40)
    before = [field.data.clone() for field in fields]
    nowhere = dataclasses.replace(make_step([3], [3], torch.tensor([[1]])), line=torch.tensor([-1, -1, -1]))
    triton.store(fields, (torch.full((3, 2, 64), math.nan),) * 2, nowhere)
    assert all(torch.equal(field.data, saved) for field, saved in zip(fields, before, strict=True))


def test_a_frame_that_overflows_is_refused() -> None:
    _, field = place("q8_0", 64, 1, 4)
    narrow = dataclasses.replace(field, frame=Frame(None, torch.full((1, 64), 1e-3)))
    with pytest.raises(Corrupted, match="4 of 4 cache rows"):
        triton.store((narrow,), (torch.full((4, 1, 64), 3e38),), make_step([4], [4], torch.tensor([[0]])))


def test_no_rows_are_stored_without_a_word() -> None:
    fields = place("kv4", 64, 2, 4)
    step = make_step([1], [1], torch.tensor([[0]]))
    empty = dataclasses.replace(step, page=step.page[:0], line=step.line[:0])
    before = [field.data.clone() for field in fields]
    triton.store(fields, (torch.zeros(0, 2, 64),) * 2, empty)
    assert all(torch.equal(field.data, saved) for field, saved in zip(fields, before, strict=True))


@compiler.jit
def decode_kernel(data, out, page_bytes, ROW: tl.constexpr, AHEAD: tl.constexpr):  # noqa: ANN001, ANN201 (Triton's types)
    """Decode the lines of page 1 of a field of one head."""
    line = tl.arange(0, ROW.page_tokens)
    written = (line >= 0)[None, :]
    values, factor = read_rows(data, tl.full([1], 1, tl.int64), written, page_bytes, ROW, tl.float32, 0, AHEAD, AHEAD)
    dim, holds = dims(ROW)
    tl.store(out + line[:, None] * ROW.dim + dim[None, :], values * factor[:, None], mask=holds[None, :])


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("dim", [64, 80, 96])
@pytest.mark.parametrize("name", NAMES)
def test_any_bytes_decode_to_the_numbers_of_the_format(name: str, dim: int, ahead: bool) -> None:
    """Bit by bit, for bytes at random: every code, scales of any sign, infinities and NaN among them."""
    _, field = place(name, dim, 1, 40)
    field.data.copy_(torch.randint(0, 256, field.data.shape, generator=torch.Generator().manual_seed(dim)))
    row = layout(field)
    assert row.head_bytes == field.head_bytes
    got = torch.full((PAGE, dim), torch.nan)
    decode_kernel[(1,)](field.data[:, field.start :], got, field.data.stride(0), ROW=row, AHEAD=ahead)
    data = torch.cat([plane[1, 0] for plane in reference.planes(field)], -1)
    wanted = field.format.decode(data, dim)
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("name", NAMES)
def test_the_layout_is_that_of_the_format(name: str) -> None:
    for dim in (16, 64, 80, 96, 128, 192, 256, 512):
        _, field = place(name, dim, 2, 4)
        row = layout(field)
        planes = field.format.planes(dim)
        assert (row.code_bytes, 2 if row.scaled else 0) == (planes[0], sum(planes[1:]))
        assert sorted(number for number in row.dims() if number >= 0) == list(range(dim))
        assert row.columns & (row.columns - 1) == 0


def test_rows_of_one_layout_compile_once() -> None:
    assert hash(Row("int8", 64, 32)) == hash(Row("int8", 64, 32))
