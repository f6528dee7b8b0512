"""The shared library: what it links, whose threads it runs on, and what it exports."""

from __future__ import annotations

import ctypes
import re
import subprocess
import sys

import pytest

from truekv.core.errors import Refused
from truekv.kernels.native.arguments import Finite
from truekv.kernels.native.library import Library, library

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")


@pytest.fixture
def native() -> Library:
    assert LIBRARY is not None
    return LIBRARY


def test_one_openmp_runtime_is_mapped_and_it_is_torchs() -> None:
    """Two runtimes would each start their own threads and fight for the cores."""
    code = (
        "from truekv.kernels.native.library import library; assert library() is not None;"
        "maps = open('/proc/self/maps').read().splitlines();"
        "print(*{line.split()[-1] for line in maps if 'gomp' in line or 'iomp' in line or 'libomp' in line})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (mapped,) = done.stdout.split()
    assert "/torch/lib/" in mapped


def test_it_links_neither_torch_nor_python(native: Library) -> None:
    image = native.path.read_bytes()
    for name in (b"libtorch", b"libc10", b"libpython"):
        assert name not in image
    assert b"libgomp.so.1" in image


def test_it_is_small(native: Library) -> None:
    assert native.path.stat().st_size < 1.5 * 2**20


def test_only_operations_are_exported(native: Library) -> None:
    names = re.findall(rb"truekv_\w+", native.path.read_bytes())
    isas = b"|".join(isa.encode() for isa in ("baseline", "avx2", "avx512", "avx512_bf16", "amx"))
    operations = re.compile(rb"truekv_(machine|native|replay|\w+_(" + isas + rb"))")
    assert len(set(names)) > 10
    assert [name for name in names if not operations.fullmatch(name)] == []


def test_an_unknown_instruction_set_is_refused(native: Library) -> None:
    with pytest.raises(Refused, match="unknown instruction set 'avx3'"), native.using("avx3"):
        pass


def test_the_instruction_set_is_put_back(native: Library) -> None:
    before = native.isa
    with native.using("baseline"):
        assert native.isa == "baseline"
    assert native.isa == before


def test_an_instruction_set_without_a_kernel_of_its_own_runs_the_best_one_below_it(native: Library) -> None:
    other = Library(native.path)
    other.isas = (*other.isas, "tiles")
    other.isa = "tiles"
    found = Finite(number=0)
    other.call("finite", found)
    assert found.finite == 1
    chosen = other._functions["finite", "tiles"].__name__
    native.call("finite", Finite(number=0))
    assert chosen == native._functions["finite", native.isa].__name__
    assert chosen != "truekv_finite_baseline"


def test_a_library_of_another_version_is_refused(native: Library) -> None:
    class Short(ctypes.Structure):
        _fields_ = (("x", ctypes.c_void_p),)

    with pytest.raises(Refused, match=r"takes \d+ bytes of arguments for rms_norm, this truekv gives 8"):
        Library(native.path).call("rms_norm", Short())
