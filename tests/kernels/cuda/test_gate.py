"""What nvcc makes of the CUDA kernels, held to gate.toml: no spills, and instructions per number of the cache."""

from __future__ import annotations

import importlib
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
from kernels.cuda.emulated import NEEDS_NVCC

from truekv.kernels.cuda import compiler, kernel

TOOLS = Path(__file__).parents[3] / "tools"
TABLE = tomllib.loads((Path(__file__).parent / "gate.toml").read_text())


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("triton_gate")


def name(kind: kernel.Kind) -> str:
    return f"latent {kind.keys} {kind.tiles} tiles" if kind.tiles else f"{kind.keys}/{kind.values} {kind.dim}"


def numbers(kind: kernel.Kind) -> float:
    """Of the cache, for each instruction of a warp in the loop over pages: a page, or a quarter of some."""
    if kind.tiles:
        # Two pages of int8, and 16 tokens of bf16.
        return (16 if kind.keys == "bf16" else 2 * kernel.PAGE_TOKENS) * (kernel.LATENT + kernel.ROPE) / 4
    return 2 * kernel.PAGE_TOKENS * kind.dim


def test_the_table_has_every_kind() -> None:
    assert {*TABLE} - {"nvcc"} == {name(kind) for kind in kernel.KINDS}


@NEEDS_NVCC
@pytest.mark.parametrize("kind", kernel.KINDS)
def test_the_kernel_takes_no_more_than_the_table_says(kind: kernel.Kind, gate: Any) -> None:
    found = compiler.nvcc()
    assert found is not None
    if f"release {TABLE['nvcc']}," not in found.version:
        pytest.skip(f"the table was made with nvcc {TABLE['nvcc']}")
    usage, code = gate._disassembled(found.compile(kind.file, kind.text, compiler.options(kind.definitions)))
    (registers,) = re.findall(r"REG:(\d+)", usage)
    assert re.findall(r"(?:STACK|LOCAL):(\d+)", usage) == ["0", "0"]
    instructions, loops = gate._loops(code)
    assert not [text for text in instructions if text.startswith(("LDL", "STL"))]
    # What is out of line, behind the last instruction, ends in jumps back too; and there may be a loop over spans.
    longest = max(end - start for start, end in loops if any("MMA" in text for text in instructions[start:end]))
    assert int(registers) <= TABLE[name(kind)]["registers"]
    assert longest * 32 / numbers(kind) <= TABLE[name(kind)]["instructions"]
    assert longest > 200
