"""The CUDA kernel's PTX, run instruction by instruction, against the reference: permuted pages, and NaN around them."""

from __future__ import annotations

import ctypes
import dataclasses
from typing import TYPE_CHECKING, TypeAlias

import pytest
import torch
from kernels.cuda.emulated import BOUND, NEEDS_NVCC, Emulated, error, ptx, run, tried
from kernels.cuda.ptx import Wrong
from kernels.native.cache import fill, formats
from memory.toys import gqa

from truekv.core.recording import recording
from truekv.core.spec import Field, Paged
from truekv.kernels.cuda import kernel, paged, trial
from truekv.kernels.reference import paged as reference
from truekv.kernels.triton import tiles
from truekv.kernels.triton.tiles import SPAN

if TYPE_CHECKING:
    from kernels.native.cache import Cache

    from truekv.core.protocols import CacheFormat


pytestmark = NEEDS_NVCC
Formats: TypeAlias = "tuple[CacheFormat, ...]"
SMALL = {code: kernel.Kind(code, 64, code) for code in ("kv4", "q4_0")}
"""Rows of which each has one scale, and rows whose blocks have."""


@pytest.fixture(params=SMALL)
def rows(request: pytest.FixtureRequest) -> Formats:
    """Formats of keys and values."""
    return formats(request.param, request.param)


@pytest.mark.parametrize("turboquant", [False, True])
@pytest.mark.parametrize("kind", kernel.GROUPED, ids=str)
def test_every_kind_of_rows(kind: kernel.Kind, turboquant: bool, emulated: Emulated) -> None:
    alike = {"kv4": "turboquant_4bit", "kv3": "turboquant_3bit"} if turboquant else {}
    names = [alike.get(code, code) for code in (kind.keys, kind.values)]
    cache = fill(gqa(2, kind.dim), formats(*names), [70, 33], measured=True, seed=kind.dim)
    assert error(cache, [1, 2], 4, emulated) < BOUND


@pytest.mark.parametrize("kind", [kernel.Kind("kv3", 128, "kv3"), kernel.Kind("kv3", 256, "kv3")], ids=str)
@pytest.mark.parametrize("length", [1, 33, 129, SPAN + 1])
def test_lengths_of_3_bits(length: int, kind: kernel.Kind, emulated: Emulated) -> None:
    cache = fill(gqa(1, kind.dim), formats("kv3", "kv3"), [length, 40])
    assert error(cache, [min(length, 3), 3], 2, emulated) < BOUND


@pytest.mark.parametrize(
    ("group", "counts"), [(1, [1, 1]), (1, [4, 8]), (2, [4, 1]), (3, [1, 2]), (5, [1, 1]), (8, [1, 1])]
)
def test_groups_and_query_lengths(group: int, counts: list[int], rows: Formats, emulated: Emulated) -> None:
    assert error(fill(gqa(2, 128), rows, [70, 33]), counts, group, emulated) < BOUND


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 127, 128, 129, SPAN - 1, SPAN, SPAN + 1])
def test_lengths_at_the_edges_of_pages_and_spans(length: int, rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(1, 64), rows, [length, 40])
    assert error(cache, [1, 1], 4, emulated) < BOUND
    assert error(cache, [min(length, 3), 3], 2, emulated) < BOUND


@pytest.mark.parametrize("window", [1, 2, 31, 33, 100, SPAN, SPAN + 100])
def test_windows(window: int, rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(1, 64, window), rows, [SPAN + 200, 40])
    assert error(cache, [3, 2], 2, emulated) < BOUND


def raw(cache: Cache, query: torch.Tensor, emulated: Emulated) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on framed queries [T, H, D] of one token each; the averages, largest scores and sums of one span."""
    (tokens, heads, dim), key = query.shape, cache.fields[0]
    kv_heads = key.field.heads
    step = cache.step([1] * tokens)
    out = torch.empty(tokens, heads, dim), torch.empty(tokens, heads), torch.empty(tokens, heads)
    numbers = (1, step.pages.shape[1], 0, heads // kv_heads, 1)
    emulated.load(kernel.Kind(key.format.name, dim, cache.fields[1].format.name), query.device).launch(
        (kv_heads, tokens, 1),
        (
            *(item.data[:, item.start :] for item in cache.fields),
            *(query, torch.ones(tokens, heads)),
            *(step.gather, step.position, step.count, step.pages, *out),
            *(ctypes.c_uint32(item.data.stride(0)) for item in cache.fields),
            ctypes.c_int64(tokens),
            *(ctypes.c_int32(number) for number in numbers),
        ),
    )
    return out


def planes(cache: Cache, which: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of a field: uint8 [pages, heads, lines, bytes], of rows in blocks [..., blocks, bytes]."""
    found = reference.planes(cache.fields[which])
    if len(found) == 2:
        return found[0], found[1]
    blocks = found[0].unflatten(-1, (cache.fields[which].field.dim // kernel.BLOCK, -1))
    return blocks[..., 2:], blocks[..., :2]


@pytest.mark.parametrize("kind", kernel.GROUPED, ids=str)
def test_every_code_in_every_place_is_its_level(kind: kernel.Kind, emulated: Emulated) -> None:
    """One key per sequence, met by queries that are one number each; and one value, which its average is."""
    dim, make = kind.dim, torch.Generator().manual_seed(kind.dim)
    # Of blocks the power of two above their scales is the factor of weights: here 1.
    scale = 0.5 if kind.blocks else 1.0
    cache = fill(gqa(1, dim), formats(kind.keys, kind.values), [1] * dim)
    levels: list[torch.Tensor] = []
    for which in range(2):
        lines, scales = planes(cache, which)
        codes = torch.randint(0, 256, (dim, *lines.shape[3:]), dtype=torch.uint8, generator=make)
        lines[cache.pages[:, 0], 0, 0] = codes
        scales[cache.pages[:, 0], 0, 0] = torch.tensor([scale]).half().view(torch.uint8)
        levels.append(trial.numbers((kind.keys, kind.values)[which], codes).flatten(1))
    # Words are decoded alike: every level of a code is in each place of one, or of three.
    for code, found in zip((kind.keys, kind.values), levels, strict=True):
        width = {"kv4": 8, "kv3": 32, "q4_0": 8}.get(code, 0)
        seen = [set(found[:, place::width].flatten().tolist()) for place in range(width)]
        assert all(len(one) == 1 << kernel.BITS[code] for one in seen)
    columns = (torch.arange(dim)[:, None] * 8 + torch.arange(8)) % dim
    average, largest, total = raw(cache, torch.nn.functional.one_hot(columns, dim).float(), emulated)
    assert torch.equal(largest.double() / scale, levels[0].gather(1, columns))
    assert torch.equal(total, torch.full_like(total, 2.0**15))
    assert torch.equal((average / total[..., None]).double() / scale, levels[1][:, None].expand_as(average))


@pytest.mark.parametrize("size", [0.0, 2.0**-24, 1e-5, 0.2, 65504.0])
@pytest.mark.parametrize("which", [0, 1])
def test_scales_of_any_size_beside_others(which: int, size: float, rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(1, 64), rows, [70])
    _, scales = planes(cache, which)
    scales[cache.pages[0], 0, 5:19] = torch.tensor([size]).half().view(torch.uint8)
    assert error(cache, [2], 4, emulated) < BOUND


@pytest.mark.parametrize("factor", [0.0, 1e-30, 1e3, 1e6])
def test_scores_of_any_size(factor: float, rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(1, 64), rows, [70])
    step = cache.step([2])
    queries = (cache.queries(step, 4)[0] * factor,)
    got = run(cache, step, queries)
    assert emulated.launches == 1
    if factor < 1:
        wanted = reference.attend(queries, cache.fields, 0.11, None, step)
        assert float((got - wanted).abs().max()) < BOUND * float(wanted.abs().max())
        return
    # One key has all the weight, and queries of half precision may take another only if it is as good.
    key, value = cache.fields
    held = [torch.cat(reference.planes(item), -1)[cache.pages[0]].flatten(0, 2)[:70] for item in cache.fields]
    score = key.frame.query(queries[0]).flatten(0, 1).double() @ key.format.decode(held[0], 64).double().T
    score[:4, 69] = -torch.inf
    values = value.frame.output(value.format.decode(held[1], 64)[:, None])[:, 0]
    taken = (got.flatten(0, 1)[:, None] - values).abs().amax(-1).argmin(-1)
    best = score.amax(-1)
    assert bool((best - score.gather(1, taken[:, None])[:, 0] < 1e-3 * best).all())


def test_a_row_does_not_depend_on_its_companions_or_the_width_of_the_table(rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(1, 64, 300), rows, [SPAN + 90, 530, 3], measured=True)
    step = cache.step([2, 2, 1])
    queries = cache.queries(step, 4)
    together = run(cache, step, queries)
    assert torch.isfinite(together).all()
    for sequence, part in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        alone = cache.step([part.stop - part.start], [sequence])
        if sequence:
            width = -(-cache.lengths[sequence] // 32)
            alone = dataclasses.replace(alone, pages=alone.pages[:, :width])
        assert torch.equal(run(cache, alone, tuple(query[part] for query in queries)), together[part]), sequence
    one = cache.shortened([SPAN + 89, 530, 3]).step([1], [0])
    assert torch.equal(run(cache, one, tuple(query[:1] for query in queries)), together[:1])
    assert emulated.launches == 5


def test_a_token_in_a_chunk_has_the_bits_that_it_has_alone(rows: Formats, emulated: Emulated) -> None:
    """Tokens at positions 362 to 364, of which only the first sees the last line of the second page."""
    cache = fill(gqa(1, 64, 300), rows, [365], measured=True)
    step = cache.step([3])
    queries = cache.queries(step, 2)
    together = run(cache, step, queries)
    for place in range(3):
        alone = cache.shortened([363 + place]).step([1])
        assert torch.equal(run(cache, alone, (queries[0][place : place + 1],))[0], together[place])
    assert emulated.launches == 4


def test_a_block_of_several_spans_joins_them_as_others_would(
    rows: Formats, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    for window in (None, SPAN + 50):
        cache = fill(gqa(1, 64, window), rows, [3 * SPAN + 90, 530, 3], measured=True)
        step = cache.step([2, 2, 1])
        queries = cache.queries(step, 4)
        one = run(cache, step, queries)
        with monkeypatch.context() as patched:
            patched.setattr(tiles, "_MANY", 1)
            several = run(cache, step, queries)
        # The interpreter rounds a product before it is added to, and has another power of two.
        assert (several - one).abs().max() < 1e-6 * one.abs().max()
        assert torch.equal(several[4:], one[4:]), "the row of one span has nothing to join"
    assert emulated.grids == [(1, 3, 4), (1, 3, 1)] * 2


@pytest.mark.parametrize("garbage", [0x00, 0x7F, 0xFF])
def test_lines_that_nobody_wrote_are_never_read_as_numbers(garbage: int, rows: Formats, emulated: Emulated) -> None:
    outs: list[torch.Tensor] = []
    for fill_byte in (0x55, garbage):
        cache = fill(gqa(1, 64), rows, [69, 33])
        step = cache.step([69, 33])
        cache.fields[0].data.fill_(fill_byte)
        reference.store(cache.fields, cache.rows, step)
        step = cache.step([1, 3])
        outs.append(run(cache, step, cache.queries(step, 2)))
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(*outs)
    assert emulated.launches == 2


def test_rows_without_tokens_and_tokens_of_nobody(rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(2, 64), rows, [70, 33])
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
    with recording():
        got = run(cache, padded, (torch.cat([query, torch.full_like(query[:2], torch.nan)]),))
    assert torch.equal(got[:3], run(cache, step, (query,)))
    assert not got[3:].any()
    assert emulated.launches == 2


def test_a_query_of_no_number_spoils_its_own_row_only(rows: Formats, emulated: Emulated) -> None:
    cache = fill(gqa(2, 64), rows, [70])
    step = cache.step([3])
    (query,) = cache.queries(step, 2)
    spoiled = query.clone()
    spoiled[1, 3, 5] = torch.nan
    whole, got = run(cache, step, (query,)), run(cache, step, (spoiled,))
    assert got[1, 3].isnan().all()
    got[1, 3] = whole[1, 3]
    assert torch.equal(got, whole)
    assert emulated.launches == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_stored_row_of_no_number_spoils_its_sequence_and_nobody_else(
    which: int, rows: Formats, emulated: Emulated
) -> None:
    cache = fill(gqa(2, 64), rows, [70, 40])
    step = cache.step([3, 1])
    (query,) = cache.queries(step, 2)
    whole = run(cache, step, (query,))
    for plane in planes(cache, which):
        plane[step.page[1], 0, step.line[1]] = 0xFF
    got = run(cache, step, (query,))
    assert got[1:3, :2].isnan().all()
    assert torch.equal(got[:, 2:], whole[:, 2:])
    assert torch.equal(got[3], whole[3])
    assert emulated.launches == 2


def test_what_has_no_kernel_here_is_tritons(emulated: Emulated) -> None:
    """Chunks of more query rows, other formats and other head sizes."""
    for dim, name, group, count in ((64, "kv4", 4, 3), (64, "int8", 2, 1), (80, "kv4", 2, 1)):
        cache = fill(gqa(1, dim), formats(name, name), [40])
        step = cache.step([count])
        wanted = reference.attend(cache.queries(step, group), cache.fields, 0.11, None, step)
        assert float((run(cache, step, cache.queries(step, group)) - wanted).abs().max()) < 1e-4
    assert not emulated.launches
    four, eight = formats("kv4", "int8")
    assert paged.taken(gqa(2, 128), (four, four)) == (kernel.Kind("kv4", 128),)
    assert paged.taken(gqa(2, 128), (eight, four)) == (kernel.Kind("int8", 128),)
    blocks = formats("q8_0", "q4_0+hadamard")
    assert paged.taken(gqa(2, 256), blocks) == (kernel.Kind("q8_0", 256, "q4_0"),)
    assert not paged.taken(gqa(2, 256), blocks[::-1])
    assert not paged.taken(gqa(2, 256), (blocks[0], four))
    assert not paged.taken(gqa(2, 96), (blocks[0], blocks[0]))
    assert not paged.taken(gqa(2, 256), (eight, four))
    assert not paged.taken(gqa(2, 80), (four, four))
    assert not paged.taken(gqa(2, 128), (four, eight))
    assert not paged.taken(gqa(2, 64), formats("kv3", "kv3"))
    assert not paged.taken(gqa(2, 128), formats("int8", "kv3"))
    assert not paged.taken(Paged((Field("l", 1, 64, "both"), Field("r", 1, 64, "key"))), (four, four))


def test_the_trial_before_its_first_use_passes(emulated: Emulated) -> None:
    for kind in kernel.GROUPED:
        assert trial.error(kind, torch.device("cpu")) < trial.BOUND / 2
    assert emulated.launches == 2 * len(kernel.GROUPED)


BROKEN = {
    "a level of keys": ("kv4", str(0xD0C2B198 - 2**32), str(0xD1C2B198 - 2**32)),
    "a code of values": ("kv4", str(0x00F000F0), str(0x00700070)),
    "the order of weights": ("kv4", "movmatrix.sync.aligned.m8n8.trans.b16 ", "mov.b32 "),
    "the largest score": ("kv4", "max.f32", "min.f32"),
    "what rounds values": ("kv4", "fma.rn.f16x2", "prmt.b32"),
    "the sign of keys": ("q4_0", str(0x80808080 - 2**32), "0"),
    "a code of values in blocks": ("q4_0", str(0x00F000F0), str(0x00700070)),
    "the halves of a word": ("q4_0", str(0x5432), str(0x5410)),
    "the largest scale of blocks": ("q4_0", "abs.f32", "mov.f32"),
    "the second part of a page": ("q4_0", "+512]", "+0]"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_fails_the_trial(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, old, new = BROKEN[what]
    kind = SMALL[code]
    assert old in ptx(kind)
    assert not tried(kind, ptx(kind).replace(old, new), monkeypatch) <= trial.BOUND


@pytest.mark.parametrize(
    ("code", "old", "new", "sentence"),
    [
        ("kv4", "bar.sync \t0;", "", "another warp wrote since the last barrier"),
        ("kv4", "fma.rn.f16x2", "fma.rz.f16x2", "an instruction that is not known: fma.rz"),
        ("q4_0", "bar.warp.sync \t-1;", "", "another thread wrote since its warp has met"),
        ("q4_0", "cp.async.wait_group 1;", "", "before what is copied there has arrived"),
        ("q4_0", "cp.async.wait_group 1;", "cp.async.wait_group 2;", "before what is copied there has arrived"),
    ],
)
def test_what_no_device_would_do_is_refused(
    code: str, old: str, new: str, sentence: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind = SMALL[code]
    assert old in ptx(kind)
    monkeypatch.setattr(trial, "load", Emulated(ptx(kind).replace(old, new)).load)
    with pytest.raises(Wrong, match=sentence):
        trial.error(kind, torch.device("cpu"))


@pytest.mark.parametrize("place", range(2, 7))
def test_every_meeting_of_a_warp_is_needed(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For keys, values and what blocks have of scales, and before the next keys and values; not before the first."""
    kind, meeting = SMALL["q4_0"], "bar.warp.sync \t-1;"
    *parts, last = ptx(kind).split(meeting)
    text = "".join(part + ("" if index == place else meeting) for index, part in enumerate(parts)) + last
    monkeypatch.setattr(trial, "load", Emulated(text).load)
    with pytest.raises(Wrong, match="another thread"):
        trial.error(kind, torch.device("cpu"))


def test_pages_that_no_tensor_holds_are_never_read(emulated: Emulated) -> None:
    cache = fill(gqa(1, 64), formats("kv4", "kv4"), [70])
    most = int(cache.pages.max())
    short = tuple(dataclasses.replace(item, data=item.data[:most]) for item in cache.fields)
    step = cache.step([1])
    with pytest.raises(Wrong, match="outside of every tensor"):
        paged.attend(cache.queries(step, 2), short, 0.1, None, step)
    assert emulated.launches == 1
