"""What the compiler makes of a few kernels, held to gate.toml; `make triton-gate` looks at all of them."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
from kernels.triton.absent import SHARED
from kernels.triton.launches import launches

HERE = Path(__file__).parent
ROOT = HERE.parents[2]
TOOL = ROOT / "tools" / "triton_gate.py"
TABLE = tomllib.loads((Path(__file__).parent / "gate.toml").read_text())
# One of each kind of code, a rule and a product: the rest takes minutes.
FEW = (
    "attend[int8/kv4] D=128 G=8 M=8",
    "attend[fp8_e4m3/fp8_e4m3] D=128 G=8 M=8",
    "gdn 128x128",
    "mamba2 64x128",
    "prepare[gdn] R=3 4 places",
    "experts 16 rows",
)


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOL.parent))
    return importlib.import_module("triton_gate")


def test_the_table_has_every_launch_and_no_other() -> None:
    assert {*launches()} == {*TABLE} - {"triton"}
    assert all({*row} == {"sm_90", "sm_80"} for name, row in TABLE.items() if name != "triton")


def test_kernels_take_no_more_than_the_table_says() -> None:
    # A process of its own: here kernels are interpreted.
    done = subprocess.run([sys.executable, TOOL, *FEW], capture_output=True, text=True, check=False)
    if done.returncode == 3:
        pytest.skip(done.stdout.splitlines()[-1])
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if " registers " in line]
    assert [line.split(" sm_")[0].rstrip() for line in lines] == [name for name in FEW for _ in ("sm_90", "sm_80")]
    assert all(re.search(r" 0 local$", line) for line in lines)


def test_a_name_that_nothing_has_is_told() -> None:
    done = subprocess.run([sys.executable, TOOL, "attend"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.endswith("nothing is launched under the name 'attend'; gate.toml has all of them\n")


def test_whatever_grows_is_named(gate: Any) -> None:
    table: dict[str, Any] = {"a": {"sm_90": {"registers": 64, "shared": 0, "instructions": 3.5}}}
    found = gate.Found(registers=64, shared=0, instructions=3.5, local=0)
    assert gate.complaints("a", 90, found, table) == []
    for what in found._fields:
        (sentence,) = gate.complaints("a", 90, found._replace(**{what: 65}), table)
        assert sentence.startswith(f"a for sm_90: 65 {what} instead of ")
    assert "is not in gate.toml" in gate.complaints("a", 80, found, table)[0]


def test_steps_of_all_sizes_share_their_kernels() -> None:
    """Else a request would wait seconds for a compiler, whenever its step is the first one of some size.

    Where a step's parts begin follows from their sizes, too, and a compiler may care.
    """
    done = subprocess.run([sys.executable, HERE / "all_sizes.py"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    # Attention with a window and without, of few query rows and of many; a norm and one with an addition. Two recurrent
    # rules, of which one has to solve; convolutions take one place at once, or two or eight, of one span or of more.
    often = {"attend_kernel": 4, "merge_kernel": 2, "_norm": 2, "prepare": 8, "carry": 2, "advance": 2, "answer": 2}
    once = ("query_kernel", "store_kernel", "solve", "_norm_rotate", "_gate", "_activate", "span_kernel")
    assert json.loads(done.stdout) == often | dict.fromkeys(once, 1)


def test_nothing_is_spilled_and_shared_memory_suffices(gate: Any) -> None:
    """For every kernel and both GPUs, as the table has it."""
    rows = [
        (name, int(key[3:]), row) for name, levels in TABLE.items() if name != "triton" for key, row in levels.items()
    ]
    assert all(row["shared"] <= SHARED[level] for _, level, row in rows)
    found = {
        (name, level): gate.Found(row["registers"], row["shared"], 0, row.get("local", 0)) for name, level, row in rows
    }
    assert not [text for (name, level), one in found.items() for text in gate.faults(name, level, one)]
    (pair, good), *_ = found.items()
    assert "local memory" in gate.faults(*pair, good._replace(local=1))[0]


def test_the_longest_innermost_loop_is_counted(gate: Any) -> None:
    code = """
.L_x_0:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_1:
        /*0010*/              @P0  FADD R2, R2, R3 ;
        /*0020*/                   FADD R2, R2, R3 ;
        /*0030*/             @!P1  BRA `(.L_x_1) ;
        /*0040*/                   BRA `(.L_x_0) ;
        /*0050*/                   EXIT ;
.L_x_2:
        /*0060*/                   BRA `(.L_x_2);
"""
    instructions, loops = gate._loops(code)
    assert len(instructions) == 7
    assert instructions[1].split() == ["FADD", "R2,", "R2,", "R3"]
    assert loops == [(1, 4)]
