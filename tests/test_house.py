"""The rooms, their one-way imports and their sizes are kept by a test, not by good intentions."""

from __future__ import annotations

import ast
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from truekv.kernels.native.library import library

ROOT = Path(__file__).parent.parent
SOURCES = sorted((ROOT / "src").rglob("*.py"))


def test_rooms_import_one_way() -> None:
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout
    assert "3 kept, 0 broken" in done.stdout


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_a_file_can_be_read_in_one_sitting(path: Path) -> None:
    text = path.read_text()
    kernels = "kernels" in path.parts
    assert text.count("\n") <= (600 if kernels else 400)
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module says in one sentence what it is"
    if not kernels:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                assert (node.end_lineno or 0) - node.lineno < 50, node.name


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT / "src")))
def test_torch_is_imported_on_first_use(path: Path) -> None:
    if path.name == "lazy.py":
        return
    top = [node for node in ast.parse(path.read_text()).body if isinstance(node, ast.Import | ast.ImportFrom)]
    names = [alias.name for node in top if isinstance(node, ast.Import) for alias in node.names]
    names += [node.module or "" for node in top if isinstance(node, ast.ImportFrom)]
    assert not [name for name in names if re.match(r"(torch|transformers|safetensors)\b", name)]


def test_the_tests_that_the_documents_name_exist() -> None:
    names = {
        name
        for path in (ROOT / "docs").rglob("*.md")
        for name in re.findall(r"tests/[\w/]+\.py(?:::\w+)?", path.read_text())
    }
    assert len(names) > 30
    for name in names:
        file, _, test = name.partition("::")
        assert f"def {test}" in (ROOT / file).read_text(), name


def test_importing_truekv_costs_nothing() -> None:
    code = "import sys, truekv; from truekv import EngineOptions, Refused; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.skipif(shutil.which("g++") is None, reason="there is no C++ compiler")
def test_where_there_is_a_compiler_the_native_library_is_built() -> None:
    """Without it two thousand tests of native kernels and of bitwise equality would be skipped, and the rest pass."""
    assert library() is not None
