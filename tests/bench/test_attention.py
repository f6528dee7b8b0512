from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
import torch
from bench import attention
from bench.attention import SHAPES, Row, Size, measure, watched
from bench.fill import SAMPLE, fill
from bench.machine import RawRead, describe, native

from truekv.core.batch import Chunk
from truekv.core.spec import ModelSpec
from truekv.formats.choice import choose_formats
from truekv.kernels.native.library import library
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan

if TYPE_CHECKING:
    from pathlib import Path

needs_library = pytest.mark.skipif(library() is None, reason="the native library was not built")
TOY = Size(contexts=(64,), batches=(1, 2), passes=1, cold_bytes=1 << 16)


@needs_library
def test_the_json_is_what_is_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(attention, "QUICK", TOY)
    monkeypatch.setattr(attention, "SHAPES", SHAPES[1:2])
    monkeypatch.setattr(attention, "RawRead", lambda: RawRead(1 << 20))
    monkeypatch.setattr(attention, "FOLDER", tmp_path)
    assert attention.main(["--quick", "--json", "--backend", "reference", "--threads", "1"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert set(printed) == {"raw_read_gbps", "rows"}
    assert len(printed["rows"]) == len(SHAPES[1].formats) * 2
    for row in printed["rows"]:
        assert set(row) == {"shape", "format", "context", "batch", "gbps", "fraction_of_raw_read"}
        assert row["gbps"] > 0
    saved = json.loads((tmp_path / "attention.json").read_text())
    assert saved["rows"] == printed["rows"]
    assert len(saved["raw_read_gbps_beside"]) == len(printed["rows"])
    assert 0 < max(saved["raw_read_gbps_beside"]) <= printed["raw_read_gbps"] + 0.001


@pytest.mark.parametrize("threads", ["0", "-1", "two", ""])
def test_threads_are_counted_from_one(threads: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        attention.main([f"--threads={threads}"])
    assert ended.value.code == 2
    assert f"argument --threads: '{threads}' is no number of 1 or more" in capsys.readouterr().err


@needs_library
@pytest.mark.parametrize("forced", ["", "baseline"])
def test_the_header_names_the_instruction_set_in_use(
    forced: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(attention, "QUICK", TOY)
    monkeypatch.setattr(attention, "SHAPES", ())
    monkeypatch.setattr(attention, "FOLDER", tmp_path)
    raw = RawRead(1 << 20)
    raw.measure(1)
    monkeypatch.setattr(attention, "RawRead", lambda: raw)
    assert attention.main(["--quick", "--threads", "1", *(["--instruction-set", forced] if forced else [])]) == 0
    used = forced or native().isa
    assert f"; instruction set: {used}; " in capsys.readouterr().out.splitlines()[0]
    assert json.loads((tmp_path / "attention.json").read_text())["machine"]["instruction set"] == used
    assert attention.main(["--quick", "--instruction-set", "avx3"]) == 2
    assert "unknown instruction set 'avx3'" in capsys.readouterr().err


@needs_library
@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: shape.name)
def test_every_shape_and_format_can_be_measured(shape: attention.Shape) -> None:
    rows = list(measure(TOY, (shape,), "reference", RawRead(1 << 20), 1))
    assert [(row.format, row.batch) for row in rows] == [(name, batch) for name in shape.formats for batch in (1, 2)]


def test_a_fraction_is_of_raw_read() -> None:
    object_ = watched([Row("s", "int8", 4096, 1, 5.0, 19.0)], 20.0)
    assert object_["rows"] == [
        {"shape": "s", "format": "int8", "context": 4096, "batch": 1, "gbps": 5.0, "fraction_of_raw_read": 0.25}
    ]


@needs_library
def test_raw_read_reads_every_word_with_any_threads() -> None:
    raw = RawRead((1 << 20) + 64)
    assert raw.measure(1) > 0
    assert raw.measure(2) > 0
    raw._buffer[12345] = 7
    with pytest.raises(AssertionError, match="raw_read returned"):
        raw.measure(2)


@needs_library
def test_the_machine_is_described() -> None:
    described = describe(2)
    assert all(described.values())
    assert described["instruction set"] in {"baseline", "avx2", "avx512", "avx512_bf16", "amx"}


@pytest.mark.parametrize("depth", [1, 40, SAMPLE, SAMPLE + 33])
def test_a_filled_cache_has_a_finite_row_for_every_token(depth: int) -> None:
    shape = SHAPES[1]
    spec = ModelSpec("bench", 64, 64, depth + 8, "bfloat16", (shape.layer,) * 2)
    formats = choose_formats(spec, "int8", "", "bfloat16")
    kernels = select(spec, [one or () for one in formats], backend="reference")
    arena = Arena(spec, plan(spec, formats, max_num_seqs=2), kernels, poison=True)
    held = fill(arena, depth, 2)
    assert [sequence.position for sequence in held] == [depth, depth]
    arena.check()
    step = arena.reserve([Chunk(sequence, [0]) for sequence in held])
    for layer in arena.layers:
        assert isinstance(layer, PagedLayer)
        rows = tuple(torch.zeros(2, stored.field.heads, stored.field.dim) for stored in layer.stored)
        kernels.store(layer.stored, rows, step)
        out = kernels.attend((torch.randn(2, shape.heads, 256),), layer.stored, 0.06, None, step)
        assert bool(torch.isfinite(out).all())
        assert bool((out != 0).any())
