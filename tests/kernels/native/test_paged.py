"""Native attention against the reference, in every instruction set; and a row's bits depend on the row alone."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import pytest
import torch
from kernels.native.cache import error, fill, formats
from memory.toys import gqa, mla

from truekv.core.spec import Field, Paged
from truekv.formats.choice import codecs
from truekv.kernels.native import paged as native
from truekv.kernels.native.library import library
from truekv.kernels.reference import paged as reference

if TYPE_CHECKING:
    from kernels.native.cache import Cache

    from truekv.core.batch import Step

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="no native library was built")
ISAS = LIBRARY.isas if LIBRARY else ()
NAMES = sorted(codecs())
BOUND = 2e-6
DIGITS_BOUND = 1e-4
"""Where queries and weights become integers of 16 bits, because the machine multiplies bytes (integers.h)."""


def bound(*names: str) -> float:
    assert LIBRARY is not None
    integers = any(type(codecs()[name]).__module__.endswith((".int8", ".lm")) for name in names)
    return DIGITS_BOUND if integers and LIBRARY.isa in ("avx512", "avx512_bf16", "amx") else BOUND


every_isa = pytest.mark.usefixtures("isa")


@every_isa
@pytest.mark.parametrize("name", NAMES)
def test_every_format_and_dim(name: str) -> None:
    """Decode, verify and prefill of one batch, in the formats of a frame far from neutral."""
    for dim in (16, 64, 80, 96, 128, 192, 256):
        cache = fill(gqa(2, dim), formats(name, name), [70, 33, 1], measured=True, seed=dim)
        assert error(cache, [1, 1, 1], 2) < bound(name), dim
        assert error(cache, [5, 33, 1], 3) < bound(name), dim


@every_isa
@pytest.mark.parametrize("group", range(1, 17))
def test_every_group(group: int) -> None:
    cache = fill(gqa(2, 64), formats("int8", "kv4"), [70, 33, 1])
    assert error(cache, [1, 1, 1], group) < bound("int8")
    assert error(cache, [37, 3, 1], group) < bound("int8")


@every_isa
@pytest.mark.parametrize("name", NAMES)
def test_latent_rows_are_keys_and_values(name: str) -> None:
    second = name if codecs()[name].code_bits >= 8 else "int8"
    for latent in (64, 512):
        cache = fill(mla(latent, 64), formats(name, second), [66, 31], measured=True)
        assert error(cache, [1, 1], 20) < bound(name, second)
        assert error(cache, [6, 31], 5) < bound(name, second)


@pytest.mark.parametrize("length", [1, 2, 31, 32, 33, 63, 64, 65, 511, 512, 513, 544, 1023, 1024, 1025])
def test_lengths_at_the_edges_of_blocks_and_splits(length: int) -> None:
    for names in (("f32", "bf16"), ("int8", "kv4"), ("q8_0", "fp8_e5m2")):
        cache = fill(gqa(1, 64), formats(*names), [length, 40])
        assert error(cache, [1, 1], 4) < bound(*names)
        assert error(cache, [min(length, 40), 3], 2) < bound(*names)


@pytest.mark.parametrize("count", range(1, 41))
def test_query_lengths(count: int) -> None:
    assert error(fill(gqa(2, 64), formats("int8", "int8"), [90, 600]), [count, 41 - count], 3) < bound("int8")


@every_isa
@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, 100, 512, 513, 2000])
def test_windows(window: int) -> None:
    cache = fill(gqa(2, 64, window), formats("int8", "bf16"), [1100, 40])
    assert error(cache, [1, 1], 2) < bound("int8")
    assert error(cache, [70, 40], 2) < bound("int8")


def test_bfloat16_in_and_out() -> None:
    cache = fill(gqa(2, 64), formats("bf16", "int8"), [70, 33])
    assert error(cache, [1, 33], 2, dtype=torch.bfloat16) <= 2**-8


def test_keys_and_values_of_different_dims() -> None:
    layer = Paged((Field("k", 2, 96, "key"), Field("v", 2, 64, "value")))
    assert error(fill(layer, formats("q5_1", "kv3"), [70, 33], measured=True), [1, 33], 3) < bound("kv3")


def test_queries_may_be_strided_as_models_make_them() -> None:
    cache = fill(gqa(2, 64), formats("int8", "kv4"), [70])
    step = cache.step([3])
    (query,) = cache.queries(step, 2)
    gated = torch.cat([query, torch.full_like(query, torch.nan)], -1)
    assert torch.equal(run(cache, step, (gated[..., :64],)), run(cache, step, (query,)))


def test_scores_of_any_size() -> None:
    """Scores beyond the range of exp, keys of zeros, negative zeros and denormal numbers."""
    for factor in (0.0, -0.0, 1e-42, 1e-20, 30.0, 1e4):
        # A score's rounding is relative to the score, and a weight's to the difference of two.
        most = BOUND * max(1.0, factor)
        layer = gqa(1, 64)
        cache = fill(layer, formats("f32", "f32"), [70])
        cache.fields[0].data[:, : 32 * 64 * 4].view(torch.float32).mul_(factor)
        assert error(cache, [1], 2) < most
        assert error(cache, [30], 2) < most


def run(cache: Cache, step: Step, queries: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return native.attend(queries, cache.fields, 0.11, cache.layer.window, step)


@functools.cache
def long_cache(kind: str) -> Cache:
    layer, names = {
        "int8": (gqa(2, 64), ("int8", "int8")),
        "kv4": (gqa(1, 80), ("kv4", "kv4")),
        "kv3": (gqa(2, 128, 700), ("kv3", "q4_0")),
        "latent": (mla(128, 64), ("int8", "int8")),
        "float": (gqa(2, 64), ("f32", "bf16")),
    }[kind]
    return fill(layer, formats(*names), [1300, 530, 64, 1], measured=True)


@every_isa
@pytest.mark.parametrize("kind", ["int8", "kv4", "kv3", "latent", "float"])
@pytest.mark.parametrize("group", [1, 2, 3, 8])
def test_a_row_does_not_depend_on_its_chunk_or_its_companions(kind: str, group: int) -> None:
    """One token at a time, in chunks, in a batch: the same bits, while later rows of the sequence lie there or not."""
    cache = long_cache(kind)
    step = cache.step([1300, 530, 64, 1])
    queries = cache.queries(step, group)
    together = run(cache, step, queries)
    assert torch.isfinite(together).all()
    first = 0
    for sequence, length in enumerate(cache.lengths):
        for end, count in (
            (length, 1),
            (length, min(7, length)),
            (length - length // 3, min(40, length - length // 3)),
        ):
            lengths = list(cache.lengths)
            lengths[sequence] = end
            alone = cache.shortened(lengths).step([count], [sequence])
            rows = slice(first + end - count, first + end)
            got = run(cache, alone, tuple(query[rows] for query in queries))
            assert torch.equal(got, together[rows]), (sequence, end, count)
        first += length


@every_isa
@pytest.mark.parametrize("names", [("int8", "kv4"), ("kv3", "fp8_e4m3"), ("bf16", "int8"), ("q8_0", "f32")])
@pytest.mark.parametrize(("heads", "group", "count"), [(5, 2, 1), (3, 4, 2), (16, 5, 1), (2, 7, 2), (7, 1, 3)])
def test_a_head_does_not_depend_on_the_heads_taken_with_it(
    names: tuple[str, str], heads: int, group: int, count: int
) -> None:
    """Many sequences are work enough, so that all heads go together; those of a single one are parted."""
    layer, lengths = gqa(heads, 64, 300), [90, 33, 517, 3, 64, 1200, 31, 32, 40, 4]
    cache = fill(layer, formats(*names), lengths, measured=True)
    step = cache.step([count] * len(lengths))
    queries = cache.queries(step, group)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        together = run(cache, step, queries)
        torch.set_num_threads(16)  # of 16 threads each would get less than one piece
        for sequence in range(len(lengths)):
            rows = slice(sequence * count, (sequence + 1) * count)
            got = run(cache, cache.step([count], [sequence]), tuple(query[rows] for query in queries))
            assert torch.equal(got, together[rows]), sequence
    finally:
        torch.set_num_threads(before)
    assert error(cache, [count] * len(lengths), group) < bound(*names)


@pytest.mark.skipif("amx" not in ISAS, reason="no tiles, neither AMX nor emulated ones (make amx)")
@pytest.mark.parametrize("kind", ["int8", "kv4", "kv3", "latent"])
def test_tiles_add_up_the_same_integers(kind: str) -> None:
    """Sums of integers are exact, so sixteen rows at a time are bitwise the rows one by one."""
    cache = long_cache(kind)
    for counts, group in (([1, 1, 1, 1], 20), ([300, 37, 5, 1], 4)):
        step = cache.step(counts)
        queries = cache.queries(step, group)
        with LIBRARY.using("amx"):
            tiles = run(cache, step, queries)
        with LIBRARY.using("avx512"):
            assert torch.equal(tiles, run(cache, step, queries))


@pytest.mark.parametrize("kind", ["int8", "latent"])
def test_a_row_does_not_depend_on_the_threads(kind: str) -> None:
    cache = long_cache(kind)
    outs: list[torch.Tensor] = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            for counts in ([1, 1, 1, 1], [300, 20, 5, 1]):
                step = cache.step(counts)
                outs.append(run(cache, step, cache.queries(step, 4)))
    finally:
        torch.set_num_threads(before)
    for index in range(2, len(outs)):
        assert torch.equal(outs[index], outs[index % 2])


@pytest.mark.parametrize("garbage", [0x00, 0x7F, 0xFF])
@pytest.mark.parametrize("name", NAMES)
def test_lines_that_nobody_wrote_are_never_read_as_numbers(name: str, garbage: int) -> None:
    outs: list[torch.Tensor] = []
    for fill_byte in (0x55, garbage):
        cache = fill(gqa(2, 80), formats(name, name), [69, 33, 1])
        written = cache.fields[0].data.clone()
        again = torch.full_like(written, fill_byte)
        step = cache.step([69, 33, 1])
        cache.fields[0].data.copy_(again)
        native.store(cache.fields, cache.rows, step)
        outs.append(run(cache, step, cache.queries(step, 2)))
        outs.append(run(cache, cache.step([1, 1, 1]), cache.queries(cache.step([1, 1, 1]), 2)))
    assert torch.isfinite(outs[0]).all()
    assert torch.equal(outs[0], outs[2])
    assert torch.equal(outs[1], outs[3])


def test_rows_of_a_step_that_belong_to_no_sequence_are_zeros() -> None:
    """A padded step: its token is in no chunk."""
    cache = fill(gqa(2, 64), formats("int8", "int8"), [70])
    step = cache.step([3])
    (query,) = cache.queries(step, 2)
    padded = run(cache, step, (torch.cat([query, query]),))
    assert torch.equal(padded[:3], run(cache, step, (query,)))
    assert not padded[3:].any()


@every_isa
@pytest.mark.parametrize("name", ["int8", "kv4", "kv3", "bf16"])
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


@every_isa
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
