from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, Self

import pytest
from bench import serve_engine
from bench.decode import NO_PEER, PEER_READY
from bench.serve_engine import Bench, Row, Size, by_turns, planned

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from pathlib import Path

needs_llama = pytest.mark.skipif(not PEER_READY.is_file(), reason="llama.cpp is not built; 'make bench-peer' does it")
TOY = Size(
    models=("hybrid",),
    concurrent=(1, 3),
    prompt=40,
    answer=6,
    rounds=1,
    depth=64,
    deep=2,
    steps=3,
    busy=3,
    shared=512,
    own=8,
    spoken=24,
    embedded="tiny-hybrid",
)


def toy(peer: bool = False, **changes: Any) -> Bench:
    values = {name: getattr(TOY, name) for name in Size.__dataclass_fields__}
    return Bench(Size(**{**values, **changes}), 1, peer, {})


def test_requests_together_and_one_after_the_other_are_answered_and_timed(folder: Path) -> None:
    assert folder.is_dir()
    together, more, arrivals, overhead, deep = toy(work=("throughput", "arrivals", "deep")).rows()
    assert deep.truekv > 0
    assert deep.detail == {"depth": 64}
    assert [row.concurrent for row in (together, more)] == [1, 3]
    assert all(row.truekv > 0 and row.other is None for row in (together, more, arrivals))
    assert min(*together.detail.values(), *more.detail.values()) > 0
    # Everything that a step calls was seen, and the shares are all of it.
    assert overhead.detail.keys() == {
        "schedule", "layout", "model", "answer", "sampling", "memory", "guards", "loop"
    }  # fmt: skip
    assert min(overhead.detail.values()) > 0
    assert sum(overhead.detail.values()) == pytest.approx(1)
    assert overhead.truekv == pytest.approx(1 - overhead.detail["model"] - overhead.detail["layout"])


def test_a_hit_covers_the_shared_part_of_a_prompt_and_the_first_of_its_kind_has_none(folder: Path) -> None:
    assert folder.is_dir()
    (row,) = toy(work=("prefix",)).rows()
    assert row.detail == {"cached_tokens": 512, "prompt_tokens": 520}
    assert row.ratio is not None
    assert row.ratio > 1.5


def test_text_that_repeats_is_guessed_and_drawn_text_is_not(folder: Path) -> None:
    assert folder.is_dir()
    repeats, drawn = toy(work=("speculation",), heard=512, spoken=48).rows()
    assert (repeats.what, drawn.what) == ("ngram", "rejected")
    assert repeats.detail["accepted"] > 0.5 * repeats.detail["drafted"] > 0
    assert drawn.detail["drafted"] > 0
    assert drawn.detail["accepted"] < 0.25 * drawn.detail["drafted"]
    assert repeats.detail["tokens"] == drawn.detail["tokens"] == 48


class Fake:
    """An engine whose answers are at hand."""

    def __init__(self, name: str, calls: list[str], tokens: list[int], seconds: list[float]) -> None:
        self._name, self._calls, self._tokens, self._seconds = name, calls, tokens, seconds

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        return

    def answers(self, text: str, _prompt: int, _answer: int, *, guesses: bool = False) -> dict[str, Any]:
        self._calls.append(f"{self._name} {text}" + " guessed" * guesses)
        return {"seconds": self._seconds.pop(0), "tokens": self._tokens, "drafted": [4, 2], "accepted": [3, 1]}


def test_engines_take_turns_and_the_best_round_of_each_counts() -> None:
    calls: list[str] = []
    engines: Any = [Fake("with", calls, [7, 8], [2.0, 1.0]), Fake("without", calls, [7, 8], [3.0, 4.0])]
    found = by_turns(engines, lambda engine: engine.answers("greedy", 8, 2), 2, lambda answer: answer["seconds"])
    assert calls == ["with greedy", "without greedy"] * 2
    assert [answer["seconds"] for answer in found] == [1.0, 3.0]


@pytest.mark.parametrize(("other", "refused"), [([7, 8], False), ([7, 9], True)])
def test_speed_counts_only_where_guesses_change_no_token(
    monkeypatch: pytest.MonkeyPatch, other: list[int], *, refused: bool
) -> None:
    def start(_bench: Bench, _model: str, _context: int, **options: Any) -> Fake:
        guesses = "speculative_config" in options
        return Fake("", [], [7, 8] if guesses else other, [1.0 if guesses else 1.5] * 8)

    monkeypatch.setattr(Bench, "_truekv", start)
    if refused:
        with pytest.raises(Refused, match="mtp on tiny-hybrid: tokens with guesses differ"):
            list(toy(work=("mtp",)).rows())
        return
    (row,) = toy(work=("mtp",)).rows()
    assert (row.truekv, row.ratio, row.met) == (2.0, 1.5, True)
    assert row.detail == {"drafted": 6, "accepted": 4, "acceptance": [0.75, 0.5], "tokens": 2}


def test_plans_of_released_models_keep_to_their_bytes() -> None:
    rows = {row.what: row for row in planned()}
    assert rows["memory"].truekv < 0.16e9
    assert rows["memory"].met
    assert 0 < rows["log"].truekv < 1 << 20
    assert rows["log"].met


@pytest.mark.parametrize(
    ("row", "ratio", "met"),
    [
        (Row("throughput", "dense", 8, "tokens/s", 30.0, 10.0, "llama.cpp"), 3.0, True),
        (Row("throughput", "dense", 4, "tokens/s", 30.0, 10.0, "llama.cpp"), 3.0, None),
        (Row("throughput", "dense", 8, "tokens/s", 30.0, None, "llama.cpp"), None, None),
        (Row("prefix", "dense", 1, "s", 1.0, 15.0, "no hit"), 15.0, False),
        (Row("overhead", "dense", 16, "of a step", 0.02, None, ""), None, True),
        (Row("overhead", "dense", 16, "of a step", 0.04, None, ""), None, False),
    ],
)
def test_numbers_are_held_to_their_bounds(row: Row, ratio: float | None, *, met: bool | None) -> None:
    assert (row.ratio, row.met) == (ratio, met)


@needs_llama
def test_llama_cpp_answers_the_same_requests(folder: Path) -> None:
    assert folder.is_dir()
    bench = toy(peer=True, work=("throughput", "deep"))
    *rows, deep = bench.rows()
    assert [row.concurrent for row in (*rows, deep)] == [1, 3, 2]
    assert all(row.other and {"peer_prefill", "peer_decode"} <= row.detail.keys() for row in rows)
    assert deep.other
    assert bench.versions["llama.cpp"].startswith("llama-cpp-python")


def test_the_json_has_every_row_and_what_it_is_held_to(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serve_engine, "describe", lambda _: {})
    monkeypatch.setattr(serve_engine, "FOLDER", tmp_path)
    assert serve_engine.main(["--json", "--quick", "--work", "memory"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert [row["what"] for row in printed["rows"]] == ["memory", "log"]
    assert printed["rows"][0]["bound"] == 0.16e9
    assert printed == json.loads((tmp_path / "serve_engine.json").read_text())


def test_a_missing_peer_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serve_engine, "PEER_READY", tmp_path / "ready")
    assert serve_engine.main(["--json", "--work", "throughput"]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.strip() == NO_PEER
