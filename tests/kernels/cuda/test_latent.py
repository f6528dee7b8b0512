"""The CUDA kernel of latent rows, its PTX run instruction by instruction, against the reference."""

from __future__ import annotations

import ctypes
import dataclasses

import pytest
import torch
from kernels.cuda.emulated import BOUND, NEEDS_NVCC, Emulated, drawn, error, ptx, run, tried
from kernels.cuda.ptx import Wrong
from kernels.native.cache import Cache, fill, formats
from memory.toys import mla

from truekv.core.recording import recording
from truekv.core.spec import Field, Paged
from truekv.kernels.cuda import kernel, paged, trial
from truekv.kernels.reference import paged as reference
from truekv.kernels.triton import tiles
from truekv.kernels.triton.tiles import FOLD, SPAN

pytestmark = NEEDS_NVCC
LAYER = mla(512, 64)
BOUNDS = {"int8": BOUND, "kv4": BOUND, "bf16": 2e-5}
"""By code of latent rows. Weights of int8 and kv4 rows are halves, those of bf16 rows two numbers of bf16."""
ROPES = {"int8": "int8", "kv4": "int8", "bf16": "bf16"}


@pytest.fixture(params=["int8", "bf16"])
def code(request: pytest.FixtureRequest) -> str:
    """Format of both fields: one for each kernel."""
    return request.param


def cached(code: str, lengths: list[int], *, measured: bool = False, seed: int = 0) -> Cache:
    return fill(LAYER, formats(code, ROPES[code]), lengths, measured=measured, seed=seed)


@pytest.mark.parametrize(
    ("heads", "counts", "blocks"),
    [
        (1, [1, 1], 1),
        (16, [1, 1], 1),
        (20, [1, 1], 1),
        (5, [3, 7], 2),
        (20, [2, 1], 2),
        (33, [1, 1], 2),
        (20, [4, 1], 4),
        (128, [1, 1], 6),
    ],
)
def test_heads_and_query_lengths(heads: int, counts: list[int], blocks: int, code: str, emulated: Emulated) -> None:
    assert error(cached(code, [70, 33], measured=True), counts, heads, emulated) < BOUNDS[code]
    assert emulated.grids[-1][:2] == (blocks, 2)


@pytest.mark.parametrize("name", ["kv4", "turboquant_4bit"])
@pytest.mark.parametrize(("heads", "counts"), [(16, [1, 1]), (20, [1, 1]), (20, [2, 1]), (5, [3, 7])])
def test_rows_of_4_bits(heads: int, counts: list[int], name: str, emulated: Emulated) -> None:
    cache = fill(LAYER, formats(name, "int8"), [SPAN + 33, 40], measured=True)
    assert error(cache, counts, heads, emulated) < BOUND


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 96, SPAN - 1, SPAN, SPAN + 1])
def test_lengths_at_the_edges_of_pages_and_spans(length: int, code: str, emulated: Emulated) -> None:
    cache = cached(code, [length, 40], seed=length)
    assert error(cache, [1, 1], 20, emulated) < BOUNDS[code]
    assert error(cache, [min(length, 3), 3], 6, emulated) < BOUNDS[code]


def raw(
    cache: Cache, queries: tuple[torch.Tensor, torch.Tensor], kind: kernel.Kind, emulated: Emulated
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Launch on framed queries [T, H, D] of one token each; the averages, largest scores and sums of one span."""
    tokens, heads, _ = queries[0].shape
    step = cache.step([1] * tokens)
    out = torch.empty(tokens, heads, 512), torch.empty(tokens, heads), torch.empty(tokens, heads)
    emulated.load(kind, queries[0].device).launch(
        (-(-heads // (8 * kind.tiles)), tokens, 1),
        (
            *(item.data[:, item.start :] for item in cache.fields),
            *queries,
            *(torch.ones(tokens, heads) for _ in queries),
            *(step.gather, step.position, step.count, step.pages, *out),
            ctypes.c_uint32(cache.fields[0].data.stride(0)),
            ctypes.c_int64(tokens),
            *(ctypes.c_int32(number) for number in (1, step.pages.shape[1], heads, 1)),
        ),
    )
    return out


@pytest.mark.parametrize("kind", kernel.LATENTS, ids=str)
def test_every_number_in_every_place(kind: kernel.Kind, emulated: Emulated) -> None:
    """One key per sequence, met by queries that are one number each; its average is itself."""
    rows, heads, make = 512, 8 * kind.tiles, torch.Generator().manual_seed(kind.tiles)
    cache = cached(kind.keys, [1] * rows)
    numbers: list[torch.Tensor] = []
    for stored in cache.fields:
        codes, *scales = reference.planes(stored)
        width = stored.field.dim if stored.format.name == "bf16" else codes.shape[-1]
        made = torch.randint(0, 256, (rows, width), dtype=torch.uint8, generator=make)
        found = trial.numbers("int8" if stored.format.name == "bf16" else stored.format.name, made).float()
        codes[:, 0] = 0
        codes[cache.pages[:, 0], 0, 0] = found.bfloat16().view(torch.uint8) if stored.format.name == "bf16" else made
        for plane in scales:
            plane[cache.pages[:, 0], 0] = torch.tensor([1.0]).half().view(torch.uint8)
        numbers.append(found)
    place = (torch.arange(rows)[:, None] * heads + torch.arange(heads)) % 512
    queries = [torch.nn.functional.one_hot(place % len(row[0]), len(row[0])).float() for row in numbers]
    average, largest, total = raw(cache, (queries[0], queries[1]), kind, emulated)
    scores = numbers[0].gather(1, place) + numbers[1].gather(1, place % 64)
    assert float((largest - scores).abs().max()) < 1e-4
    unit = 2.0 ** (15 if kind.keys == "bf16" else 14)
    assert float((total / unit - 1).abs().max()) < 1e-5
    assert torch.equal(average / unit, numbers[0][:, None].expand_as(average))
    assert len({(int(dim), int(code)) for dim, code in enumerate(numbers[0].flatten().tolist())}) == rows * 512


@pytest.mark.parametrize("size", [0.0, 2.0**-24, 1e-5, 0.2, 65504.0])
@pytest.mark.parametrize("which", [0, 1])
def test_scales_of_any_size_beside_others(which: int, size: float, emulated: Emulated) -> None:
    cache = cached("int8", [70])
    _, scales = reference.planes(cache.fields[which])
    scales[cache.pages[0], 0, 5:19] = torch.tensor([size]).half().view(torch.uint8)
    if size < 1:
        assert error(cache, [2], 4, emulated) < BOUND
        return
    # Scores of a hundred thousand: one key has all the weight, and is one of those that are as good.
    step = cache.step([1])
    got = run(cache, step, cache.queries(step, 4))
    assert emulated.launches == 1
    assert torch.isfinite(got).all()


@pytest.mark.parametrize("size", [1e3, 1e9, 1e25])
def test_scores_of_any_size_of_bf16(size: float, emulated: Emulated) -> None:
    """One key has all the weight: the one that is best in float64."""
    cache = cached("bf16", [70])
    step = cache.step([1])
    queries = tuple((query * size).bfloat16().float() for query in cache.queries(step, 10))
    rows = [
        reference.planes(item)[0][cache.pages[0]].view(torch.bfloat16).double().flatten(0, 2)[:70]
        for item in cache.fields
    ]
    score = sum(query[0].double() @ row.T for query, row in zip(queries, rows, strict=True))
    got = run(cache, step, queries)[0].double()
    best = rows[0][score.argmax(-1)]
    assert float((got - best).abs().max()) < 1e-3 * float(best.abs().max())
    assert emulated.launches == 1


@pytest.mark.parametrize(("latent", "rope"), [(1.0, 0.0), (0.0, 1.0), (1e-20, 1.0), (30.0, 1e-4), (0.0, 0.0)])
def test_queries_of_any_two_sizes(latent: float, rope: float, code: str, emulated: Emulated) -> None:
    cache = cached(code, [70])
    step = cache.step([2])
    queries = tuple(query * by for query, by in zip(cache.queries(step, 10), (latent, rope), strict=True))
    queries = tuple(query.bfloat16().float() for query in queries)
    wanted = reference.attend(queries, cache.fields, 0.11, None, step)
    assert float((run(cache, step, queries) - wanted).abs().max()) < 2 * BOUNDS[code] * float(wanted.abs().max())
    assert emulated.launches == 1


def test_a_row_does_not_depend_on_its_companions_or_the_width_of_the_table(code: str, emulated: Emulated) -> None:
    cache = cached(code, [SPAN + 90, 530, 3], measured=True)
    step = cache.step([2, 2, 1])
    queries = drawn(cache, step, 20)
    together = run(cache, step, queries)
    assert torch.isfinite(together).all()
    for sequence, rows in enumerate((slice(0, 2), slice(2, 4), slice(4, 5))):
        alone = cache.step([rows.stop - rows.start], [sequence])
        if sequence:
            width = -(-cache.lengths[sequence] // 32)
            alone = dataclasses.replace(alone, pages=alone.pages[:, :width])
        assert torch.equal(run(cache, alone, tuple(query[rows] for query in queries)), together[rows]), sequence
    # Nor on how many tokens follow it.
    one = cache.shortened([SPAN + 89, 530, 3]).step([1], [0])
    assert torch.equal(run(cache, one, tuple(query[:1] for query in queries)), together[:1])
    assert emulated.launches == 5


def test_a_block_of_several_spans_joins_them_as_others_would(
    code: str, emulated: Emulated, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = cached(code, [(FOLD + 1) * SPAN + 90, 530, 3])
    step = cache.step([1, 2, 1])
    queries = drawn(cache, step, 16)
    one = run(cache, step, queries)
    monkeypatch.setattr(tiles, "_MANY", 1)
    several = run(cache, step, queries)
    assert emulated.grids == [(2, 3, FOLD + 2), (2, 3, 2)]
    # The interpreter rounds a product before it is added to, and has another power of two.
    assert (several - one).abs().max() < 1e-6 * one.abs().max()
    assert torch.equal(several[3:], one[3:]), "the row of one span has nothing to join"
    assert error(cache, [1, 2, 1], 16, emulated) < BOUNDS[code]


def test_many_query_rows_leave_no_more_sums_than_are_planned_for(code: str, emulated: Emulated) -> None:
    """More than 64 take several spans in any case; see engine/activations.py."""
    cache = cached(code, [2 * SPAN + 5])
    assert error(cache, [4], 20, emulated) < BOUNDS[code]
    assert error(cache, [4], 16, emulated) < BOUNDS[code]
    assert [grid[2] for grid in emulated.grids] == [1, 3]


@pytest.mark.parametrize("garbage", [0x00, 0x7F, 0xFF])
def test_lines_that_nobody_wrote_are_never_read_as_numbers(garbage: int, code: str, emulated: Emulated) -> None:
    outs: list[torch.Tensor] = []
    for fill_byte in (0x55, garbage):
        cache = cached(code, [69, 33])
        step = cache.step([69, 33])
        cache.fields[0].data.fill_(fill_byte)
        reference.store(cache.fields, cache.rows, step)
        step = cache.step([1, 3])
        outs.append(run(cache, step, drawn(cache, step, 2)))
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(*outs)
    assert emulated.launches == 2


def test_rows_without_tokens_and_tokens_of_nobody(code: str, emulated: Emulated) -> None:
    cache = cached(code, [70, 33])
    step = cache.step([3], [0])
    queries = drawn(cache, step, 7)
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
        given = tuple(torch.cat([query, torch.full_like(query[:2], torch.nan)]) for query in queries)
        got = run(cache, padded, given)
    assert torch.equal(got[:3], run(cache, step, queries))
    assert not got[3:].any()
    assert emulated.launches == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_query_of_no_number_spoils_its_own_row_only(which: int, code: str, emulated: Emulated) -> None:
    cache = cached(code, [70])
    step = cache.step([3])
    queries = drawn(cache, step, 9)
    spoiled = [query.clone() for query in queries]
    spoiled[which][1, 3, 5] = torch.nan
    whole, got = run(cache, step, queries), run(cache, step, (spoiled[0], spoiled[1]))
    assert got[1, 3].isnan().all()
    got[1, 3] = whole[1, 3]
    assert torch.equal(got, whole)
    assert emulated.launches == 2


@pytest.mark.parametrize("which", [0, 1])
def test_a_stored_row_of_no_number_spoils_its_sequence_and_nobody_else(
    which: int, code: str, emulated: Emulated
) -> None:
    cache = cached(code, [70, 40])
    step = cache.step([3, 1])
    queries = drawn(cache, step, 2)
    whole = run(cache, step, queries)
    for plane in reference.planes(cache.fields[which]):
        plane[step.page[1], 0, step.line[1]] = 0xFF
    got = run(cache, step, queries)
    assert got[1:3].isnan().all()
    assert torch.equal(got[3], whole[3])
    assert emulated.launches == 2


def test_what_has_no_kernel_here_is_tritons(emulated: Emulated) -> None:
    """Chunks of more query rows, other formats, other sizes, windows."""
    for layer, names, group, count in (
        (LAYER, ("int8", "int8"), 16, 9),
        (LAYER, ("bf16", "int8"), 16, 1),
        (LAYER, ("kv3", "int8"), 16, 1),
        (mla(128, 64), ("int8", "int8"), 16, 1),
        (Paged(LAYER.fields, window=20), ("int8", "int8"), 16, 1),
    ):
        cache = fill(layer, formats(*names), [40])
        step = cache.step([count])
        queries = cache.queries(step, group)
        wanted = reference.attend(queries, cache.fields, 0.11, layer.window, step)
        assert float((run(cache, step, queries) - wanted).abs().max()) < 1e-4
    assert not emulated.launches
    for name, rope in ROPES.items():
        both = formats(name, rope)
        assert [kind.keys for kind in paged.taken(LAYER, both)] == [name] * 2
        assert not paged.taken(Paged(LAYER.fields, window=20), both)
        assert not paged.taken(mla(256, 64), both)
        assert not paged.taken(Paged((Field("l", 1, 512, "both"), Field("r", 1, 32, "key"))), both)
    assert not paged.taken(LAYER, formats("kv3", "int8"))
    assert not paged.taken(LAYER, formats("bf16", "int8"))


def test_the_trial_before_its_first_use_passes(emulated: Emulated) -> None:
    for kind in kernel.LATENTS:
        assert trial.error(kind, torch.device("cpu")) < trial.BOUND / 2
    assert emulated.grids == [(2, 2, 2), (2, 2, 1)] * len(kernel.LATENTS)


SMALL = {code: kernel.Kind(code, 512, rope, 2) for code, rope in ROPES.items()}
BROKEN = {
    "the order of values": ("int8", "movmatrix.sync.aligned.m8n8.trans.b16 ", "mov.b32 "),
    "the largest score": ("int8", "max.f32", "min.f32"),
    "the sign of values": ("int8", str(0x80808080 - 2**32), "0"),
    "the even numbers": ("int8", ", 16960;", ", 16961;"),
    "lower bytes": ("int8", "shl.b32", "shr.u32"),
    "values as they lie": ("bf16", "x4.trans.shared", "x4.shared"),
    "the order of weights": ("bf16", "movmatrix.sync.aligned.m8n8.trans.b16 ", "mov.b32 "),
    "the largest of bf16": ("bf16", "max.f32", "min.f32"),
    "what bf16 leaves of a weight": ("bf16", "sub.f32", "add.f32"),
    "the second part of a line": ("bf16", "+64];", "+0];"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_kernel_fails_the_trial(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    code, old, new = BROKEN[what]
    kind = SMALL[code]
    assert old in ptx(kind)
    assert not tried(kind, ptx(kind).replace(old, new), monkeypatch) <= trial.BOUND


@pytest.mark.parametrize(("kind", "least"), [(SMALL["int8"], 7), (SMALL["bf16"], 5)], ids=str)
def test_a_barrier_less_is_seen(kind: kernel.Kind, least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ptx(kind)
    barriers = text.count("bar.sync")
    assert barriers >= least
    for place in range(barriers):
        parts = text.split("bar.sync")
        without = "bar.sync".join(parts[: place + 1]) + "mov.u32 %r1, %r1; //" + "bar.sync".join(parts[place + 1 :])
        monkeypatch.setattr(trial, "load", Emulated(without).load)
        with pytest.raises(Wrong, match="since the last barrier"):
            trial.error(kind, torch.device("cpu"))


@pytest.mark.parametrize("old", ["cp.async.wait_group 2;", "cp.async.commit_group;"])
def test_tokens_that_have_not_arrived_are_not_read(old: str, monkeypatch: pytest.MonkeyPatch) -> None:
    text = ptx(SMALL["bf16"])
    assert old in text
    monkeypatch.setattr(trial, "load", Emulated(text.replace(old, "")).load)
    with pytest.raises(Wrong, match="before what is copied there has arrived"):
        trial.error(SMALL["bf16"], torch.device("cpu"))
