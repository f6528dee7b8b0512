from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from bench import step

from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(library() is None, reason="the native library was not built")
def test_every_native_call_of_a_step_is_counted(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.is_dir()
    assert step.main(["--depth", "40", "--threads", "1", "--steps", "3", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    # Three recurrent layers and one of attention: two norms each, those of queries and keys, and the last one.
    calls = {"gdn": 3, "delta_gates": 3, "gated_norm": 3, "attend": 1, "store": 2, "activate": 4, "rms_norm": 11}
    assert calls.items() <= printed["calls"].items()
    # Per layer into and out of the mixer, into and out of the MLP; and the head.
    assert printed["calls"]["linear"] == 17
    # Rows once, inputs and states once each.
    assert printed["calls"]["finite"] == 7
    assert printed["operations"].keys() == printed["calls"].keys()
    assert printed["total"] > printed["outside"] > 0


@pytest.mark.skipif(library() is None, reason="the native library was not built")
def test_captured_and_eager_steps_are_timed_in_turns(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert folder.is_dir()
    arguments = ["--capture", "--depth", "40", "--threads", "1", "--steps", "3", "--sequences", "2"]
    assert step.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed.keys() == {"eager", "captured"}
    assert all(way["median"] >= way["least"] > 0 for way in printed.values())
    assert 0 < printed["captured"]["host"] < printed["eager"]["host"]


@pytest.mark.skipif(library() is None, reason="the native library was not built")
def test_what_the_host_does_in_a_step_of_many_requests_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--host", "--model", "dense", "--depth", "20", "--threads", "1", "--steps", "5", "--sequences", "3"]
    assert step.main([*arguments, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["median"] >= printed["least"] > 0


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        (["--host", "--depth", "-3"], "argument --depth: '-3' is no number of 1 or more"),
        (["--host", "--capture"], "argument --capture: not allowed with argument --host"),
        (["--host", "--model", "dense", "--format", "int7"], "int7"),
        (["--host", "--model", "dense", "--depth", "99999999"], "this checkpoint has positions for 1 to 4096 tokens"),
    ],
)
def test_what_cannot_be_measured_is_told_in_a_sentence(
    asked: list[str], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        step.main(asked)
    assert ended.value.code == 2
    assert sentence in capsys.readouterr().err.splitlines()[-1]
