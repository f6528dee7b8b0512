from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
from bench import decode
from bench.decode import NO_PEER, PEER_READY, Row, Size, compare, watched
from bench.wire import EngineFailed, Worker

if TYPE_CHECKING:
    from pathlib import Path

needs_llama = pytest.mark.skipif(not PEER_READY.is_file(), reason="llama.cpp is not built; 'make bench-peer' does it")
TOY: dict[str, Any] = {
    "depths": (0, 40),
    "rounds": 1,
    "steps": 2,
    "prompts": (48,),
    "middle": 40,
    "chunk": 8,
    "sequences": 2,
}


def measured(peer: str, size: Size) -> list[Row]:
    versions: dict[str, str] = {}
    rows = list(compare(size, peer, 1, versions))
    assert set(versions) == {"truekv", peer}
    assert all(row.truekv > 0 and row.peer > 0 for row in rows)
    return rows


def test_everything_is_measured_on_both_engines(folder: Path) -> None:
    rows = measured("transformers", Size(models=("hybrid",), formats=("kv4",), **TOY))
    assert [(row.what, row.depth, row.batch, row.tokens) for row in rows] == [
        ("decode", 0, 1, 1),
        ("decode", 40, 1, 1),
        ("memory", 40, 1, 0),
        ("prefill", 0, 1, 48),
        ("append", 40, 1, 8),
        ("decode", 40, 2, 1),
    ]
    assert (folder / "checkpoints" / "hybrid.frames.safetensors").is_file()


@needs_llama
@pytest.mark.parametrize(("model", "kv"), [("dense", "bf16"), ("hybrid", "int8"), ("mla", "kv4")])
def test_llama_cpp_reads_the_checkpoints_and_reaches_a_depth(folder: Path, model: str, kv: str) -> None:
    rows = measured("llama.cpp", Size(models=(model,), formats=(kv,), **{**TOY, "depths": (0, 40, 700)}))
    assert len(rows) == 7
    assert (folder / "checkpoints" / f"{model}.gguf").is_file()


def test_the_json_is_what_is_watched(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [
        Row("decode", "dense", 4096, 1, 1, "int8", "q8_0", 20.0, 8.0),
        Row("decode", "dense", 4096, 8, 1, "int8", "q8_0", 50.0, 8.0),
        Row("memory", "dense", 4096, 1, 0, "int8", "q8_0", 2e9, 3e9),
    ]
    monkeypatch.setattr(decode, "compare", lambda *_: iter(rows))
    monkeypatch.setattr(decode, "describe", lambda _: {})
    monkeypatch.setattr(decode, "FOLDER", tmp_path)
    assert decode.main(["--json", "--quick"]) == 0
    expected = {
        "model": "dense",
        "depth": 4096,
        "format": "int8",
        "truekv_tps": 20.0,
        "peer_tps": 8.0,
        "peer_format": "q8_0",
        "ratio": 2.5,
    }
    assert json.loads(capsys.readouterr().out) == {"rows": [expected]} == watched(rows)
    assert len(json.loads((tmp_path / "decode-llama.cpp.json").read_text())["rows"]) == 3


def test_a_missing_peer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(decode, "PEER_READY", tmp_path / "ready")
    assert decode.main(["--json"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip() == NO_PEER


def test_an_engine_that_fails_says_why(tmp_path: Path) -> None:
    import sys

    with pytest.raises(EngineFailed, match=r"Refused: .*nowhere"):
        Worker(
            sys.executable,
            "bench.engines.truekv",
            str(tmp_path / "nowhere"),
            kv="int8",
            context=8,
            sequences=1,
            threads=1,
        )
