"""AMX is chosen after a trial on the machine, and whatever its tiles get wrong the trial notices."""

from __future__ import annotations

import ctypes
import json
import logging
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from truekv.kernels.native import trial
from truekv.kernels.native.arguments import Finite
from truekv.kernels.native.library import Library, library

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

LIBRARY = library()
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")
ISAS = LIBRARY.isas if LIBRARY else ()
EMULATED = LIBRARY is not None and hasattr(LIBRARY._library, "truekv_broken_tiles")
emulated = pytest.mark.skipif(not EMULATED, reason="no emulated tiles, which alone can be broken (make amx)")
needs_avx512 = pytest.mark.skipif("avx512_bf16" not in ISAS, reason="no AVX-512 with bf16")


def fresh() -> Library:
    """The library as it is when nobody has asked for a kernel yet."""
    assert LIBRARY is not None
    return Library(LIBRARY.path)


@pytest.fixture
def break_tiles() -> Generator[Callable[[int], None]]:
    assert LIBRARY is not None
    broken = ctypes.c_int.in_dll(LIBRARY._library, "truekv_broken_tiles")
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield lambda how: setattr(broken, "value", how)
    broken.value = 0
    torch.set_num_threads(before)


def test_it_is_tried_where_there_is_amx_and_not_before_a_kernel_is_asked_for() -> None:
    code = (
        "import json, sys; from truekv.kernels.native.library import library; found = library();"
        "tried = lambda: 'truekv.kernels.native.trial' in sys.modules;"
        "print(json.dumps([tried(), found.isa, tried(), found.isas, found.problem]))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    early, chosen, late, isas, problem = json.loads(done.stdout)
    assert not early
    assert late == ("amx" in isas)
    assert chosen == isas[-1]
    assert problem is None


@pytest.mark.skipif("amx" not in ISAS, reason="no tiles, neither AMX nor emulated ones (make amx)")
def test_amx_passes_and_is_chosen(caplog: pytest.LogCaptureFixture) -> None:
    found = fresh()
    made: list[object] = []
    with found.recorded(made.append):
        found.call("finite", Finite(number=0))
    assert found.isa == "amx"
    assert found.problem is None
    assert caplog.records == []
    assert len(made) == 1  # a captured step does not repeat the trial


@emulated
@pytest.mark.parametrize(
    ("how", "what"),
    [
        (1, "a linear map of [1, 32] to [1, 64]"),  # numbers of a pair meet crosswise
        (2, "attention over int8 keys and kv4 values"),  # digits of queries lose their sign
        (3, "attention over int8 keys and kv4 values"),  # digits of weights are given one
        (4, "a linear map of [40, 70] to [40, 1041]"),  # no tiles but in the first thread
        (5, "a linear map of [1, 32] to [1, 64]"),  # the last line of a tile is lost
        (6, "a linear map of [40, 70] to [40, 1041]"),  # sums are not cleared between tiles
    ],
)
def test_broken_amx_is_not_chosen(
    how: int, what: str, break_tiles: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    break_tiles(how)
    found = fresh()
    assert found.isa == "avx512_bf16"
    assert found.problem == f"on this machine amx and avx512_bf16 disagree in {what}"
    (record,) = caplog.records
    assert (record.name, record.levelno) == ("truekv", logging.WARNING)
    assert record.getMessage() == f"the kernels for avx512_bf16 run, which takes longer, because {found.problem}"
    assert found.isa == "avx512_bf16"
    assert len(caplog.records) == 1


@emulated
def test_an_instruction_set_that_is_forced_is_not_tried(break_tiles: Callable[[int], None]) -> None:
    break_tiles(1)
    for isa in ("amx", "avx512_bf16", "baseline"):
        found = fresh()
        with found.using(isa):
            assert found.isa == isa
            found.call("finite", Finite(number=0))
        found.isa = isa
        assert (found.isa, found.problem) == (isa, None)
    found = fresh()
    assert found.isa == "avx512_bf16"
    with found.using("amx"):
        assert found.isa == "amx"
    assert found.isa == "avx512_bf16"


@needs_avx512
def test_the_trial_compares_every_bit() -> None:
    """Maps of integers are the same everywhere; queries of 16 bits make other scores than those in floats."""
    found = fresh()
    assert trial.problem(found, "avx512_bf16", "avx512") is None
    assert trial.problem(found, "avx512", "avx2") == (
        "on this machine avx512 and avx2 disagree in attention over int8 keys and kv4 values"
    )
