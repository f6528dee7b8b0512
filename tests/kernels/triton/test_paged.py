"""Triton's attention against the reference, in the interpreter: small shapes, and memory full of NaN around them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import pytest
import torch
from kernels.native.cache import fill, formats
from kernels.triton.watched import Watched
from memory.toys import gqa, mla

from truekv.core.errors import Refused
from truekv.core.recording import recording
from truekv.core.spec import Field, Paged
from truekv.core.untouched import untouched
from truekv.formats.choice import codecs
from truekv.kernels.reference import paged as reference
from truekv.kernels.triton import paged as triton
from truekv.kernels.triton import tiles
from truekv.kernels.triton.tiles import FOLD, SPAN

if TYPE_CHECKING:
    from kernels.native.cache import Cache

    from truekv.core.batch import Step

NAMES = sorted(codecs())
BOUND = 2e-6
ROTATED = 1e-5
"""Queries are rotated in float32 here, where the reference is exact: that moves a score by some parts in 10^7."""


def run(cache: Cache, step: Step, queries: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return triton.attend(queries, cache.fields, 0.11, cache.layer.window, step)


def error(cache: Cache, counts: list[int], group: int, *, dtype: torch.dtype = torch.float32) -> float:
    """Largest difference between Triton and reference, relative to the largest number of the reference."""
    step = cache.step(counts)
    queries = cache.queries(step, group, dtype)
    scale = cache.layer.fields[0].dim ** -0.5
    wanted = reference.attend(queries, cache.fields, scale, cache.layer.window, step)
    got = triton.attend(queries, cache.fields, scale, cache.layer.window, step)
    assert got.dtype == wanted.dtype == dtype
    assert got.shape == wanted.shape
    return float((got.double() - wanted.double()).abs().max() / wanted.double().abs().max())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dim", [64, 80, 256])
def test_every_format_and_dim(name: str, dim: int) -> None:
    """Decode, verify and prefill in one batch, in the formats of a frame far from neutral."""
    cache = fill(gqa(1, dim), formats(name, name), [70, 33], measured=True, seed=dim)
    assert error(cache, [1, 17], 2) < (ROTATED if codecs()[name].rotated else BOUND)


@pytest.mark.parametrize("dim", [16, 96, 128, 192])
@pytest.mark.parametrize("name", ["bf16", "int8", "kv4", "kv3", "q5_1"])
def test_other_dims(name: str, dim: int) -> None:
    assert error(fill(gqa(1, dim), formats(name, name), [40], measured=True), [3], 2) < ROTATED


@pytest.mark.parametrize("group", [1, 2, 5, 8, 16])
@pytest.mark.parametrize("counts", [[1, 1], [3, 1], [17, 2]])
def test_groups_and_query_lengths(group: int, counts: list[int]) -> None:
    cache = fill(gqa(2, 64), formats("int8", "kv4"), [70, 33])
    assert error(cache, counts, group) < BOUND


@pytest.mark.parametrize(
    ("latent", "rope"), [("bf16", "bf16"), ("fp8_e4m3", "int8"), ("kv4", "int8"), ("q4_0", "q8_0")]
)
def test_latent_rows_are_keys_and_values(latent: str, rope: str) -> None:
    cache = fill(mla(512, 64), formats(latent, rope), [66], measured=True)
    assert error(cache, [1], 20) < ROTATED
    assert error(fill(mla(64, 64), formats(latent, rope), [66, 31], measured=True), [6, 31], 5) < ROTATED


@pytest.mark.parametrize("name", ["int8", "kv4", "q4_0"])
def test_values_of_zeros(name: str) -> None:
    """Blocks whose scales are all zero."""
    cache = fill(gqa(1, 64), formats("int8", name), [70])
    triton.store((cache.fields[1],), (torch.zeros_like(cache.rows[1]),), cache.step([70]))
    step = cache.step([2])
    got = run(cache, step, cache.queries(step, 2))
    assert torch.equal(got, torch.zeros_like(got))


def test_columns_that_hold_nothing_are_no_numbers_of_the_next_row() -> None:
    """A latent row of 80 numbers in 128 columns, and behind the last one memory that is no number."""
    assert error(fill(mla(80, 64), formats("turboquant_fp8", "int8"), [66, 31], measured=True), [1, 2], 5) < ROTATED


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, SPAN - 1, SPAN, SPAN + 1, 2 * SPAN + 1])
def test_lengths_at_the_edges_of_blocks_and_spans(length: int) -> None:
    cache = fill(gqa(1, 64), formats("int8", "kv4"), [length, 40])
    assert error(cache, [1, 1], 4) < BOUND
    assert error(cache, [min(length, 3), 3], 2) < BOUND


@pytest.mark.parametrize("window", [None, 700, 1500])
@pytest.mark.parametrize(("keys", "values"), [("int8", "bf16"), ("kv4", "kv4")])
def test_spans_are_joined_before_they_are_merged(
    keys: str, values: str, window: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of one span, of as many as are joined, and of more than that twice over."""
    lengths = [40, FOLD * SPAN, FOLD * SPAN + 1, 2 * FOLD * SPAN + 70]
    cache = fill(gqa(1, 64, window), formats(keys, values), lengths, measured=True)
    step = cache.step([1, 1, 2, 3])
    queries = cache.queries(step, 2)
    watched = Watched(monkeypatch, "join_kernel")
    expected = run(cache, step, queries)
    assert not watched.grids
    monkeypatch.setattr(triton, "JOINED", FOLD)
    assert torch.equal(run(cache, step, queries), expected), "a row of no more spans than are joined has the same bits"
    assert watched.grids == [(1, 3)]
    assert error(cache, [1, 1, 2, 3], 2) < ROTATED


def test_many_spans_are_joined_in_an_order_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    cache = fill(gqa(1, 64), formats("int8", "bf16"), [40, (3 * FOLD + 1) * SPAN + 70])
    step = cache.step([1, 2])
    queries = cache.queries(step, 2)
    monkeypatch.setattr(triton, "JOINED", 2 * FOLD)
    expected = run(cache, step, queries)
    monkeypatch.setattr(triton, "JOINED", 4 * FOLD)
    got = run(cache, step, queries)
    assert torch.equal(got[:1], expected[:1])
    assert not torch.equal(got[1:], expected[1:]), "the order of sums is one that a test can see"
    assert error(cache, [1, 2], 2) < BOUND


@pytest.mark.parametrize(
    ("layer", "keys", "values", "group", "new"),
    [
        (gqa(2, 64), "int8", "kv4", 4, 2),
        (gqa(1, 64, 700), "kv4", "kv4", 2, 2),
        (gqa(1, 64, 2500), "bf16", "int8", 8, 2),
        (mla(128, 64), "int8", "int8", 16, 1),
    ],
)
def test_a_program_of_several_spans_leaves_the_same_bits(
    layer: Paged, keys: str, values: str, group: int, new: int
) -> None:
    """Rows that end in the first, a middle and the last span of a program, and one whose last program has one."""
    lengths = [40, SPAN + 1, FOLD * SPAN, (FOLD + 1) * SPAN, (2 * FOLD - 1) * SPAN + 90]
    cache = fill(layer, formats(keys, values), lengths, measured=True)
    step = cache.step([1, new, 1, 1, new])
    queries = cache.queries(step, group)
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched, "attend_kernel")
        one = run(cache, step, queries)
        patched.setattr(tiles, "_MANY", 1)
        several = run(cache, step, queries)
        heads = 5 * layer.fields[0].heads
        assert watched.grids == [(1, heads, 2 * FOLD), (1, heads, 2)]
        assert torch.equal(several, one)
        # So have those that other programs join first.
        patched.setattr(triton, "JOINED", FOLD)
        assert torch.equal(run(cache, step, queries), one)
        patched.setattr(tiles, "_MANY", 1 << 20)
        assert torch.equal(run(cache, step, queries), one)


def test_programs_of_several_spans_are_for_steps_that_have_many(monkeypatch: pytest.MonkeyPatch) -> None:
    assert tiles.spans_of_a_program(FOLD * 2048 - 1) == 1
    assert tiles.spans_of_a_program(FOLD * 2048) == FOLD
    # A window's programs are those that see something; long chunks have long spans instead.
    monkeypatch.setattr(tiles, "_MANY", 4)
    for window, new, each in ((None, 1, FOLD), (SPAN, 1, 1), (7 * SPAN, 1, FOLD), (None, 40, 1)):
        cache = fill(gqa(1, 64, window), formats("int8", "bf16"), [8 * SPAN, 8 * SPAN])
        step = cache.step([new, new])
        watched = Watched(monkeypatch, "attend_kernel")
        run(cache, step, cache.queries(step, 2))
        assert [grid[2] for grid in watched.grids] == [8 // each if new == 1 else 2]


@pytest.mark.parametrize("window", [1, 2, 31, 33, 100, 200, SPAN, SPAN + 100, 2000])
def test_windows(window: int) -> None:
    cache = fill(gqa(1, 64, window), formats("int8", "bf16"), [SPAN + 200, 40])
    assert error(cache, [1, 1], 2) < BOUND
    assert error(cache, [40, 40], 2) < BOUND


def test_keys_and_values_of_different_dims() -> None:
    layer = Paged((Field("k", 2, 96, "key"), Field("v", 2, 64, "value")))
    assert error(fill(layer, formats("q5_1", "kv3"), [70, 33], measured=True), [1, 5], 3) < ROTATED


def test_bfloat16_in_and_out() -> None:
    cache = fill(gqa(2, 64), formats("bf16", "int8"), [70, 33])
    assert error(cache, [1, 5], 2, dtype=torch.bfloat16) <= 2**-8


@pytest.mark.parametrize("factor", [0.0, -0.0, 1e-42, 1e-20, 30.0, 1e4])
def test_scores_of_any_size(factor: float) -> None:
    """Scores beyond the range of exp, keys of zeros, negative zeros and denormal numbers."""
    cache = fill(gqa(1, 64), formats("f32", "f32"), [70])
    cache.fields[0].data[:, : 32 * 64 * 4].view(torch.float32).mul_(factor)
    assert error(cache, [1], 2) < BOUND * max(1.0, factor)


def test_queries_may_be_strided_as_models_make_them() -> None:
    cache = fill(gqa(2, 64), formats("int8", "kv4"), [70])
    step = cache.step([3])
    (query,) = cache.queries(step, 2)
    gated = torch.cat([query, torch.full_like(query, torch.nan)], -1)
    assert torch.equal(run(cache, step, (gated[..., :64],)), run(cache, step, (query,)))


@pytest.mark.parametrize("kind", ["int8", "kv3", "latent"])
def test_a_row_does_not_depend_on_its_companions_or_the_width_of_the_table(kind: str) -> None:
    """Alone and in a batch the same bits, while later rows of the sequence lie there or not."""
    layer, names = {
        "int8": (gqa(1, 64), ("int8", "bf16")),
        "kv3": (gqa(1, 64, 300), ("kv3", "q4_0")),
        "latent": (mla(64, 64), ("int8", "int8")),
    }[kind]
    cache = fill(layer, formats(*names), [SPAN + 90, 530, 3], measured=True)
    step = cache.step([2, 2, 1])
    queries = cache.queries(step, 4)
    together = run(cache, step, queries)
    assert torch.isfinite(together).all()
    for sequence, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        alone = cache.step([rows.stop - rows.start], [sequence])
        if sequence:
            width = -(-cache.lengths[sequence] // 32)
            alone = dataclasses.replace(alone, pages=alone.pages[:, :width])
        assert torch.equal(run(cache, alone, tuple(query[rows] for query in queries)), together[rows]), sequence
    one = cache.shortened([SPAN + 89, 530, 3]).step([1], [0])
    assert torch.equal(run(cache, one, tuple(query[:1] for query in queries)), together[:1])


@pytest.mark.parametrize("garbage", [0x00, 0x7F, 0xFF])
@pytest.mark.parametrize("name", ["f32", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "kv4", "kv3", "q5_1"])
def test_lines_that_nobody_wrote_are_never_read_as_numbers(name: str, garbage: int) -> None:
    outs: list[torch.Tensor] = []
    for fill_byte in (0x55, garbage):
        cache = fill(gqa(1, 80), formats(name, name), [69, 33])
        step = cache.step([69, 33])
        cache.fields[0].data.fill_(fill_byte)
        triton.store(cache.fields, cache.rows, step)
        step = cache.step([1, 3])
        outs.append(run(cache, step, cache.queries(step, 2)))
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(*outs)


def test_rows_without_tokens_and_tokens_of_nobody() -> None:
    """A padded step: a row of count 0 owns the tokens that are left."""
    cache = fill(gqa(2, 64), formats("int8", "int8"), [70, 33])
    step = cache.step([3], [0])
    (query,) = cache.queries(step, 2)
    zero, last = torch.zeros(1, dtype=torch.int64), torch.full((2,), 1)
    padded = dataclasses.replace(
        step,
        owner=torch.cat([step.owner, last]),
        offset=torch.cat([step.offset, zero, zero]),
        gather=torch.cat([torch.nn.functional.pad(step.gather, (0, 1)), torch.zeros(1, 4, dtype=torch.int64)]),
        position=torch.cat([step.position, zero]),
        count=torch.cat([step.count, zero]),
        pages=torch.nn.functional.pad(torch.cat([step.pages, step.pages]), (0, 20), value=int(step.pages[0, 0])),
    )
    got = run(cache, padded, (torch.cat([query, torch.full_like(query[:2], torch.nan)]),))
    assert torch.equal(got[:3], run(cache, step, (query,)))
    assert not got[3:].any()


@pytest.mark.parametrize("name", ["int8", "kv4", "bf16"])
def test_a_query_of_no_number_spoils_its_own_row_only(name: str) -> None:
    cache = fill(gqa(2, 64), formats(name, name), [70])
    step = cache.step([3])
    (query,) = cache.queries(step, 2)
    spoiled = query.clone()
    spoiled[1, 3, 5] = torch.nan
    whole, got = run(cache, step, (query,)), run(cache, step, (spoiled,))
    assert got[1, 3].isnan().all()
    got[1, 3] = whole[1, 3]
    assert torch.equal(got, whole)


@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("name", ["f32", "bf16", "fp8_e4m3", "fp8_e5m2", "int8", "kv4", "kv3", "q5_1"])
def test_a_stored_row_of_no_number_spoils_its_sequence_and_nobody_else(name: str, which: int) -> None:
    cache = fill(gqa(2, 64), formats(name, name), [70, 40])
    step = cache.step([3, 1])
    (query,) = cache.queries(step, 2)
    whole = run(cache, step, (query,))
    # The row of the first sequence's second new token and first kv head, as key or as value alone.
    for plane in reference.planes(cache.fields[which]):
        plane[step.page[1], 0, step.line[1]] = 0xFF
    got = run(cache, step, (query,))
    assert got[1:3, :2].isnan().all()
    assert torch.equal(got[:, 2:], whole[:, 2:])
    assert torch.equal(got[3], whole[3])


def test_nothing_is_read_on_the_host_while_a_step_is_recorded() -> None:
    """Tensors that raise when a number is taken out of them."""

    class Sealed(torch.Tensor):
        def item(self) -> float:
            raise AssertionError("a number was read on the host")

        __int__ = __float__ = __bool__ = __index__ = item  # type: ignore[assignment]

    cache = fill(gqa(2, 64), formats("int8", "kv4"), [70])
    step = cache.step([3])
    queries = cache.queries(step, 2)
    sealed = dataclasses.replace(
        step, **{item.name: getattr(step, item.name).as_subclass(Sealed) for item in dataclasses.fields(step)}
    )
    with pytest.raises(AssertionError, match="read on the host"):
        int(sealed.count[0])
    with recording():
        triton.store((cache.fields[0],), (cache.rows[0][-3:],), sealed)
        got = run(cache, sealed, queries)
    assert torch.equal(torch.Tensor(got), run(cache, step, queries))


def test_layers_that_have_no_kernel_are_refused() -> None:
    for codec in codecs().values():
        assert triton.refusal(gqa(2, 64), (codec, codec)) is None
    kinds = formats("bf16", "bf16", "bf16")
    three = Paged((Field("k", 1, 64, "key"), Field("r", 1, 64, "key"), Field("s", 1, 64, "key")))
    value = Field("v", 1, 64, "value")
    assert "scores one or two fields" in str(triton.refusal(Paged((*three.fields, value)), (*kinds, kinds[0])))
    assert "a multiple of 16" in str(triton.refusal(gqa(1, 24), kinds[:2]))
    unknown = dataclasses.replace(codecs()["int8"], name="int9")
    assert "do not know the format 'int9'" in str(triton.refusal(gqa(1, 64), (unknown, unknown)))


def test_pages_that_start_anywhere_are_refused() -> None:
    cache = fill(gqa(1, 64), formats("int8", "int8"), [40])
    odd = tuple(dataclasses.replace(item, data=item.data[:, 1:]) for item in cache.fields)
    step = cache.step([1])
    with pytest.raises(Refused, match="multiples of 16 bytes"):
        triton.attend(cache.queries(step, 2), odd, 0.1, None, step)


def test_heads_may_lie_further_apart_than_32_bits_count() -> None:
    """As a product of many heads leaves them: [H, T, D] seen as [T, H, D]."""
    cache = fill(gqa(3, 16), formats("f32", "f32"), [2])
    step, apart = cache.step([1]), 1 << 30
    (query,) = cache.queries(step, 1)
    far = untouched((2 * apart + 16,), torch.float32, "cpu").as_strided(query.shape, (16, apart, 1))
    far.copy_(query)
    assert torch.equal(run(cache, step, (far,)), run(cache, step, (query,)))
