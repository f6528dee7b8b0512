from __future__ import annotations

import json
from statistics import correlation
from typing import TYPE_CHECKING, Any, Self

import pytest
from bench import decode
from bench.decode import (
    NO_PEER,
    PEER_READY,
    SAME,
    Load,
    Row,
    Size,
    compare,
    start_transformers,
    start_truekv,
    watched,
)
from bench.wire import EngineFailed, Worker

from truekv.core.errors import Refused
from truekv.kernels.native.library import library

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


class Fake:
    """An engine that notes what it was asked for."""

    def __init__(self, name: str, calls: list[tuple[str, str]], seconds: float, logits: list[float]) -> None:
        self.version, self._name, self._calls, self._seconds, self._logits = name, name, calls, seconds, logits

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        self._calls.append((self._name, "end"))

    def fill(self, depth: int, sequences: int = 1) -> None:
        self._calls.append((self._name, f"fill {depth} x {sequences}"))

    def decode(self, steps: int) -> list[float]:
        self._calls.append((self._name, f"decode {steps}"))
        return [self._seconds] * steps

    def append(self, tokens: int) -> float:
        self._calls.append((self._name, f"append {tokens}"))
        return self._seconds * tokens

    def logits(self) -> list[float]:
        return self._logits

    def peak(self) -> int:
        return 1 << 20


def faked(monkeypatch: pytest.MonkeyPatch, peer_logits: list[float]) -> list[tuple[str, str]]:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(decode, "start_truekv", lambda _: Fake("ours", calls, 0.01, [1.0, 2.0, 3.0]))
    monkeypatch.setitem(decode.START, "transformers", lambda _: (Fake("theirs", calls, 0.04, peer_logits), "bf16"))
    return calls


def test_engines_take_turns_and_everything_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = faked(monkeypatch, [1.1, 2.0, 3.0])
    size = Size(models=("hybrid",), formats=("int8",), **{**TOY, "rounds": 2})
    rows = list(compare(size, "transformers", 1, {}))
    assert [(row.what, row.depth, row.batch, row.tokens, round(row.ratio, 6)) for row in rows] == [
        ("decode", 0, 1, 1, 4.0),
        ("decode", 40, 1, 1, 4.0),
        ("memory", 40, 1, 0, 1.0),
        ("prefill", 0, 1, 48, 4.0),
        ("append", 40, 1, 8, 4.0),
        ("decode", 40, 2, 1, 4.0),
    ]
    assert round(rows[-1].truekv) == 200, "tokens of both sequences in 10 ms"
    assert [name for name, what in calls if what == "decode 2"] == ["ours", "theirs"] * 6
    assert calls.count(("ours", "end")) == calls.count(("theirs", "end")) == 2


def test_engines_that_compute_different_models_are_not_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = faked(monkeypatch, [3.0, 1.0, 2.0])
    with pytest.raises(Refused, match=rf"correlate by -0.500, less than {SAME['int8']}"):
        list(compare(Size(models=("hybrid",), formats=("int8",), **TOY), "transformers", 1, {}))
    assert calls[-2:] == [("theirs", "end"), ("ours", "end")]


def test_truekv_and_transformers_run_in_processes_of_their_own(folder: Path) -> None:
    with (
        start_truekv(Load("hybrid", "kv4", 160, 2, 1)) as ours,
        start_transformers(Load("hybrid", "", 0, 0, 1))[0] as peer,
    ):
        for engine in (ours, peer):
            engine.fill(40, 2)
            assert len(engine.decode(2)) == 2
            assert engine.peak() > 1 << 20
            engine.fill(0)
            assert engine.append(48) > 0
        assert correlation(ours.logits(), peer.logits()) > SAME["kv4"]
        assert ours.version == f"kernels: {'native' if library() else 'reference'}"
    assert (folder / "checkpoints" / "hybrid.frames.safetensors").is_file()


@needs_llama
@pytest.mark.parametrize(("model", "kv"), [("dense", "bf16"), ("hybrid", "int8"), ("mla", "int8"), ("mla", "kv4")])
def test_llama_cpp_reads_the_checkpoints_and_reaches_a_depth(folder: Path, model: str, kv: str) -> None:
    versions: dict[str, str] = {}
    size = Size(models=(model,), formats=(kv,), **{**TOY, "depths": (0, 40, 700)})
    rows = list(compare(size, "llama.cpp", 1, versions))
    assert len(rows) == 7
    assert all(row.truekv > 0 and row.peer > 0 for row in rows)
    assert versions["llama.cpp"].startswith("llama-cpp-python")
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

    with pytest.raises(EngineFailed, match=r"Refused: .*is neither a directory nor a hub id"):
        Worker(
            sys.executable,
            "bench.engines.truekv",
            str(tmp_path / "nowhere"),
            kv="int8",
            context=8,
            sequences=1,
            threads=1,
        )
