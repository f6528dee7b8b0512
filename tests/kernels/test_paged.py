"""The reference attention against a dense oracle in float64 that knows nothing of pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from memory.toys import formats_of, gqa, mla, model_spec

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.spec import Field, Paged
from truekv.formats.choice import codecs
from truekv.formats.frame import Frame, frame_for
from truekv.kernels.native.library import library
from truekv.kernels.reference.paged import BLOCK
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat


def make_arena(
    layer: Paged, formats: tuple[CacheFormat, ...], frames: Any = None, backend: str = "reference", **settings: Any
) -> Arena:
    spec = model_spec((layer,))
    planned = plan(spec, (formats,), **({"max_num_seqs": 2, "max_model_len": 512, "drafts": 4} | settings))
    return Arena(spec, planned, select(spec, (formats,), backend=backend), frames, poison=True)


def dense(
    layer: Paged,
    queries: tuple[torch.Tensor, ...],
    rows: tuple[torch.Tensor, ...],
    scale: float,
    first: int,
) -> torch.Tensor:
    """Attend in float64 with every row at hand: queries of the tokens from `first` on, rows of all tokens."""
    count, query_heads = queries[0].shape[:2]
    keys = torch.arange(rows[0].shape[0])
    position = first + torch.arange(count)
    seen = keys <= position[:, None]
    if layer.window is not None:
        seen &= position[:, None] - keys < layer.window
    scored = [(field, row) for field, row in zip(layer.fields, rows, strict=True) if field.role != "value"]
    (value,) = [row for field, row in zip(layer.fields, rows, strict=True) if field.role != "key"]
    group = query_heads // layer.fields[0].heads
    out = []
    for head in range(query_heads):
        score = sum(
            q[:, head].double() @ row[:, head // group].double().T for q, (_, row) in zip(queries, scored, strict=True)
        )
        weights = (score * scale).masked_fill(~seen, -torch.inf).softmax(-1)
        out.append(weights @ value[:, head // group].double())
    return torch.stack(out, 1)


def as_stored(
    layer: Paged, formats: tuple[CacheFormat, ...], rows: tuple[torch.Tensor, ...]
) -> tuple[torch.Tensor, ...]:
    """What a perfect memory would return: decoded codes, taken out of the frame again."""
    back = []
    for field, chosen, values in zip(layer.fields, formats, rows, strict=True):
        frame = frame_for(chosen, None)
        decoded = chosen.decode(chosen.encode(frame.rows(values)), field.dim)
        back.append(frame.output(decoded))
    return tuple(back)


def compare(
    layer: Paged,
    formats: tuple[CacheFormat, ...],
    group: int,
    chunks: tuple[int, ...],
    frames: Any = None,
    seed: int = 0,
    backend: str = "reference",
) -> torch.Tensor:
    """Run a sequence in chunks beside a companion; return the largest difference to the oracle."""
    make = torch.Generator().manual_seed(seed)
    length = sum(chunks)
    rows = tuple(torch.randn(length, field.heads, field.dim, generator=make) for field in layer.fields)
    queries = tuple(
        torch.randn(length, field.heads * group, field.dim, generator=make)
        for field in layer.fields
        if field.role != "value"
    )
    scale = layer.fields[0].dim ** -0.5
    arena = make_arena(layer, formats, frames, backend)
    sequence, companion = arena.open(), arena.open()
    out = []
    for count in chunks:
        start = sequence.position
        step = arena.reserve([Chunk(companion, [0] * 3), Chunk(sequence, [0] * count)])
        own = slice(start, start + count)
        with_companion = [
            torch.cat([torch.randn(3, *part.shape[1:], generator=make), part[own]]) for part in (*queries, *rows)
        ]
        got = arena.layers[0].attend(
            tuple(with_companion[: len(queries)]), tuple(with_companion[len(queries) :]), scale, step
        )
        out.append(got[3:])
        arena.advance(companion, 3)
        arena.advance(sequence, count)
    names = "/".join(chosen.name for chosen in formats)
    assert arena.kernels.calls[f"attend[{names}]"] == len(chunks)
    stored = rows if frames else as_stored(layer, formats, rows)
    return (torch.cat(out).double() - dense(layer, queries, stored, scale, 0)).abs().max()


@pytest.mark.parametrize("group", range(1, 9))
@pytest.mark.parametrize("heads", [1, 3])
def test_grouped_query_attention_for_every_group_size(heads: int, group: int) -> None:
    layer = gqa(heads, 64)
    assert compare(layer, formats_of((layer,))[0], group, (33, 1, 64, 1)) < 2e-6


@pytest.mark.parametrize("name", sorted(codecs()))
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_every_format_reads_back_what_it_stored(name: str, dim: int) -> None:
    layer = gqa(2, dim)
    assert compare(layer, formats_of((layer,), name)[0], 2, (40, 1, 30)) < 5e-6


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("name", sorted(codecs()))
def test_native_attention_reads_back_what_every_format_stored(name: str) -> None:
    """1e-4 of the largest number, some 2 here, where queries and weights are integers of 16 bits (integers.h)."""
    kernels = library()
    assert kernels is not None
    integers = type(codecs()[name]).__module__.endswith((".int8", ".lm")) and kernels.isa.startswith(("avx512", "amx"))
    layer = gqa(2, 96)
    assert compare(layer, formats_of((layer,), name)[0], 2, (40, 1, 30), backend="native") < (
        2e-4 if integers else 5e-6
    )


@pytest.mark.parametrize("name", sorted(codecs()))
def test_latent_attention_in_every_format(name: str) -> None:
    layer = mla(latent=128, rope=64)
    assert compare(layer, formats_of((layer,), name)[0], 5, (40, 1, 30)) < 5e-6


@pytest.mark.parametrize("dim", [16, 80, 192, 256, 512])
def test_head_dims(dim: int) -> None:
    layer = gqa(1, dim)
    assert compare(layer, formats_of((layer,), "f32")[0], 4, (10, 1, 22)) < 5e-6


@pytest.mark.parametrize("window", [1, 2, 31, 32, 33, BLOCK, BLOCK + 1, 1000])
def test_sliding_windows(window: int) -> None:
    """The window leaves whole blocks without a key for some queries, at the front and in the middle."""
    layer = gqa(2, 16, window)
    assert compare(layer, formats_of((layer,))[0], 2, (100, 1, 150, 40)) < 2e-6


def test_keys_and_values_may_have_different_dims_and_formats() -> None:
    layer = Paged((Field("k", 2, 96, "key"), Field("v", 2, 64, "value")))
    formats = (codecs()["bf16"], codecs()["kv4"])
    assert compare(layer, formats, 3, (40, 1, 30)) < 5e-6


def test_a_measured_frame_changes_codes_and_not_the_meaning() -> None:
    """Centre and scale per channel and head, far from neutral, at full precision: the same attention."""

    class Exact:
        """float32 rows that claim to need a frame."""

        def __getattr__(self, name: str) -> Any:
            return True if name in {"rotated", "calibrated"} else getattr(codecs()["f32"], name)

    layer = Paged((Field("k", 2, 64, "key"), Field("v", 2, 64, "value")))
    make = torch.Generator().manual_seed(3)
    frames = {
        (0, name): Frame(3 * torch.randn(2, 64, generator=make), 0.5 + torch.rand(2, 64, generator=make))
        for name in ("k", "v")
    }
    assert compare(layer, (Exact(), Exact()), 2, (40, 1, 30), frames) < 5e-5


@pytest.mark.parametrize("garbage", [0x00, 0x7F, 0xFF])
def test_unwritten_bytes_of_any_kind_are_never_read(garbage: int) -> None:
    layer = gqa(2, 64)
    for name in ("f32", "bf16", "fp8_e4m3", "int8", "q4_0"):
        outs = []
        for fill in (0x00, garbage):
            arena = make_arena(layer, formats_of((layer,), name)[0])
            arena._paged()[0].data.fill_(fill)
            sequence = arena.open()
            make = torch.Generator().manual_seed(0)
            step = arena.reserve([Chunk(sequence, [0] * 35)])
            rows = tuple(torch.randn(35, 2, 64, generator=make) for _ in range(2))
            outs.append(arena.layers[0].attend((torch.randn(35, 4, 64, generator=make),), rows, 0.2, step))
        assert torch.equal(*outs)
        assert torch.isfinite(outs[0]).all()


def test_a_draft_is_invisible_to_the_certain_tokens_before_it() -> None:
    layer = gqa(1, 16)
    outs = []
    for draft in (0.0, 1e30):
        arena = make_arena(layer, formats_of((layer,))[0])
        sequence = arena.open()
        make = torch.Generator().manual_seed(0)
        rows = torch.randn(5, 1, 16, generator=make)
        rows[3:] = draft
        step = arena.reserve([Chunk(sequence, [0] * 5, 2)])
        outs.append(arena.layers[0].attend((torch.randn(5, 2, 16, generator=make),), (rows, rows), 0.2, step)[:3])
    assert torch.equal(*outs)


def test_the_answer_has_the_dtype_of_the_question() -> None:
    layer = gqa(2, 64)
    for name in ("bf16", "int8"):
        arena = make_arena(layer, formats_of((layer,), name)[0])
        step = arena.reserve([Chunk(arena.open(), [0] * 4)])
        rows = torch.randn(4, 2, 64, dtype=torch.bfloat16)
        out = arena.layers[0].attend((torch.randn(4, 6, 64, dtype=torch.bfloat16),), (rows, rows), 0.1, step)
        assert out.dtype == torch.bfloat16
        assert out.shape == (4, 6, 64)


def test_offsets_beyond_two_gigabytes_are_addressed() -> None:
    """Only two pages are ever touched, so the rest of the allocation costs no memory."""
    layer = gqa(1, 512)
    formats = formats_of((layer,))[0]
    # A page of this layer is 128 KiB: the last of 20,000 starts at 2.6 GB.
    arena = Arena(
        model_spec((layer,), positions=640_000),
        plan(model_spec((layer,), positions=640_000), (formats,), max_num_seqs=1),
        select(model_spec((layer,)), (formats,)),
    )
    assert arena._paged()[0].data.nbytes > 1 << 31
    arena._free_pages.reverse()
    sequence = arena.open()
    make = torch.Generator().manual_seed(0)
    rows = tuple(torch.randn(40, 1, 512, generator=make) for _ in range(2))
    query = torch.randn(40, 1, 512, generator=make)
    step = arena.reserve([Chunk(sequence, [0] * 40)])
    assert list(sequence.pages) == [19_999, 19_998]
    out = arena.layers[0].attend((query,), rows, 0.05, step)
    assert (out.double() - dense(layer, (query,), rows, 0.05, 0)).abs().max() < 5e-6


def test_layers_that_no_kernel_can_run_are_refused_at_load() -> None:
    odd = Paged((Field("k", 2, 17, "key"), Field("v", 2, 17, "value")))
    with pytest.raises(Refused, match="layer 0 of toy: attend has no rows of 17 for the field 'k' in kv4"):
        select(model_spec((odd,)), ((codecs()["kv4"],) * 2,))
    uneven = Paged((Field("k", 2, 64, "key"), Field("v", 4, 64, "value")))
    with pytest.raises(
        Refused, match=r"attend needs fields of one head count .* \(k: key, 2 heads, v: value, 4 heads\)"
    ):
        select(model_spec((uneven,)), ((codecs()["f32"],) * 2,))
    no_value = Paged((Field("k", 2, 64, "key"),))
    with pytest.raises(Refused, match="exactly one value field"):
        select(model_spec((no_value,)), ((codecs()["f32"],),))
