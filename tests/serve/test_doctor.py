"""`truekv doctor`: the machine, the library and the kernel table."""

from __future__ import annotations

import ctypes
import json
from typing import TYPE_CHECKING

import pytest

from truekv.core.options import EngineOptions
from truekv.kernels.native import library as native
from truekv.serve.assemble import design
from truekv.serve.doctor import examine

if TYPE_CHECKING:
    from collections.abc import Callable

    from command_line import Outcome

    Call = Callable[..., Outcome]


def test_the_report_names_the_library_that_is_loaded(truekv: Call) -> None:
    found = native.library()
    if found is None:
        pytest.skip("the native library is not built")
    report = json.loads(truekv("doctor", "--json").out)["library"]
    assert report == {
        "path": str(found.path),
        "instruction_sets": list(found.isas),
        "chosen": found.isas[-1],
        "problem": None,
        "refused": None,
    }
    printed = truekv("doctor").out
    assert str(found.path) in printed
    assert f"[{found.isa}]" in printed


def test_another_instruction_set_is_reported_while_it_is_used() -> None:
    found = native.library()
    if found is None:
        pytest.skip("the native library is not built")
    with found.using("baseline"):
        assert examine(None, EngineOptions()).library.chosen == "baseline"


def test_an_instruction_set_that_failed_its_trial_is_named(truekv: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    found = native.library()
    if found is None or not hasattr(found._library, "truekv_broken_tiles"):
        pytest.skip("no emulated tiles, which alone can be broken (make amx)")
    broken = ctypes.c_int.in_dll(found._library, "truekv_broken_tiles")
    monkeypatch.setattr(native, "library", lambda: native.Library(found.path))
    monkeypatch.setattr(broken, "value", 2)
    reason = "on this machine amx and avx512_bf16 disagree in attention over int8 keys and kv4 values"
    printed = truekv("doctor").out
    assert "[avx512_bf16], amx\n" in printed
    assert f"not amx, because {reason}\n" in printed
    report = json.loads(truekv("doctor", "--json").out)["library"]
    assert (report["chosen"], report["refused"]) == ("avx512_bf16", reason)


def test_a_models_kernels_are_those_of_its_engine(truekv: Call) -> None:
    report = json.loads(truekv("doctor", "tiny-hybrid", "--kv-cache-dtype", "int8/kv4", "--json").out)
    kernels = design("tiny-hybrid", EngineOptions(kv_cache_dtype="int8/kv4")).kernels.describe()
    assert [(f"{row['operation']} {row['on']}", row["backend"]) for row in report["kernels"]] == list(kernels)
    assert {row["operation"] for row in report["kernels"]} == {"scan", "store", "attend", "sample"}
    for row in report["kernels"]:
        assert row["instruction_set"] == (report["library"]["chosen"] if row["backend"] == "native" else "torch")


def test_kernels_in_triton_are_named() -> None:
    pytest.importorskip("triton")
    *rows, sample = examine("tiny-hybrid", EngineOptions(kv_cache_dtype="int8", kernel_backend="triton")).kernels
    assert sample.operation == "sample"  # of logits that lie on the host
    assert sample.backend != "triton"
    assert {(row.operation, row.backend, row.instruction_set) for row in rows} == {
        (operation, "triton", "triton") for operation in ("scan", "store", "attend")
    }


def test_the_table_says_what_each_operation_works_on(truekv: Call) -> None:
    printed = truekv("doctor", "tiny-mla", "--kv-cache-dtype", "int8").out
    assert "latent=int8 1x128, rope=int8 1x64" in printed


def test_without_a_library_it_says_why_and_what_to_do(truekv: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "library", lambda: None)
    done = truekv("doctor")
    assert done.code == 0
    assert "no C++ compiler when truekv was installed; install one and install truekv again" in done.out
    assert "the reference kernels run, which are 50-100x slower" in done.out


def test_a_library_that_cannot_be_loaded_is_reported(truekv: Call, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken() -> None:
        raise OSError("libgomp.so.1: cannot open shared object file")

    monkeypatch.setattr(native, "library", broken)
    assert "it cannot be loaded: libgomp.so.1" in truekv("doctor").out


def test_a_model_that_cannot_run_is_refused(truekv: Call) -> None:
    done = truekv("doctor", "tiny-hybrid", "--kv-cache-dtype", "int9")
    assert done.code == 2
    assert "int8" in done.err
