"""Where the CUDA kernel comes from and when it is chosen."""

from __future__ import annotations

import errno
import hashlib
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from kernels.cuda.emulated import NEEDS_NVCC, Emulated, ptx
from memory.toys import formats_of, gqa, mla, model_spec

from truekv.core.errors import Refused
from truekv.core.options import EngineOptions
from truekv.kernels import table
from truekv.kernels.cuda import compiler, kernel, trial
from truekv.kernels.table import select
from truekv.serve.doctor import examine

if TYPE_CHECKING:
    from collections.abc import Iterator

LAYERS = (gqa(dim=128), mla(64, 64))


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A device as the table asks for it, on which kernels run that the emulator runs."""
    monkeypatch.setattr(trial, "runs_on", lambda _: True)
    trial.problem.cache_clear()
    table._say_triton.cache_clear()
    yield
    trial.problem.cache_clear()


def compiled(source: Path, definitions: dict[str, int]) -> bytes:
    return compiler.compiled(source.name, source.read_text(), definitions)


def on_the_cpu(monkeypatch: pytest.MonkeyPatch, emulated: Emulated) -> None:
    """Tensors stay where the emulator reads them."""
    monkeypatch.setattr(trial, "load", emulated.load)
    tried = trial.error
    monkeypatch.setattr(trial, "error", lambda kind, _device: tried(kind, torch.device("cpu")))


@NEEDS_NVCC
@pytest.mark.usefixtures("hopper")
def test_4_bit_rows_of_a_hopper_are_attended_to_in_cuda_once_the_kernel_has_passed_its_trial(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    emulated = Emulated()
    on_the_cpu(monkeypatch, emulated)
    kernels = select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), device="cuda")
    assert kernels.backend == "cuda"
    assert kernels.paged.__name__.endswith("cuda.paged")  # type: ignore[attr-defined]
    assert emulated.launches == 2
    rows = {name: backend for name, backend in kernels.describe() if not name.startswith("sample")}
    assert rows == {
        "store k=kv4 2x128": "triton",
        "store v=kv4 2x128": "triton",
        "attend k=kv4 2x128, v=kv4 2x128": "cuda",
        "store latent=kv4 1x64": "triton",
        "store rope=int8 1x64": "triton",
        "attend latent=kv4 1x64, rope=int8 1x64": "triton",
    }
    assert not caplog.messages
    assert select(model_spec(LAYERS), formats_of(LAYERS, "int8"), device="cuda").backend == "triton"
    assert select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), backend="triton", device="cuda").backend == "triton"


@NEEDS_NVCC
@pytest.mark.usefixtures("hopper")
def test_a_kernel_that_fails_its_trial_is_not_used_and_one_line_says_why(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = Emulated(ptx(kernel.Kind("kv4", 128)).replace("movmatrix.sync.aligned.m8n8.trans.b16 ", "mov.b32 "))
    on_the_cpu(monkeypatch, broken)
    for _ in range(2):
        assert select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), device="cuda").backend == "triton"
    (message,) = caplog.messages
    assert message.startswith("some rows are attended to in Triton, which takes longer, because the CUDA kernel for ")
    assert broken.launches == 2
    with pytest.raises(Refused, match="of the largest number on this device; use the triton backend"):
        select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), backend="cuda", device="cuda")


@pytest.mark.usefixtures("hopper")
def test_without_a_compiler_triton_runs_and_one_line_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(compiler, "_nvrtc_paths", list)
    compiler.compiler.cache_clear()
    compiler.nvcc.cache_clear()
    try:
        assert select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), device="cuda").backend == "triton"
    finally:
        compiler.compiler.cache_clear()
        compiler.nvcc.cache_clear()
    (message,) = caplog.messages
    assert message.endswith("because there is neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc")


def test_elsewhere_it_is_refused_or_left_out(caplog: pytest.LogCaptureFixture) -> None:
    assert select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), device="cuda").backend == "triton"
    assert not caplog.messages
    with pytest.raises(Refused, match="the cuda kernels run on a CUDA device: use the native backend"):
        select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), backend="cuda")
    with pytest.raises(Refused, match=r"run on CUDA devices of compute capability 9\.0; use the triton backend"):
        select(model_spec(LAYERS), formats_of(LAYERS, "kv4"), backend="cuda", device="cuda")
    with pytest.raises(Refused, match="run on a CUDA device"):
        examine("tiny-dense", EngineOptions(kv_cache_dtype="kv4", kernel_backend="cuda"))


@NEEDS_NVCC
def test_machine_code_is_kept_and_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __global__ void one(int* out) { *out = NUMBER; }\n')
    made = compiled(source, {"NUMBER": 1})
    assert made.startswith(b"\x7fELF")
    (kept,) = (tmp_path / "truekv").iterdir()
    kept.write_bytes(b"found" + hashlib.sha256(b"found").digest())
    assert compiled(source, {"NUMBER": 1}) == b"found"
    assert compiled(source, {"NUMBER": 2}).startswith(b"\x7fELF")
    source.write_text(source.read_text().replace("NUMBER", "NUMBER + 1"))
    assert compiled(source, {"NUMBER": 1}).startswith(b"\x7fELF")
    assert len(list((tmp_path / "truekv").iterdir())) == 3


@NEEDS_NVCC
def test_damaged_machine_code_is_noticed_and_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __global__ void one(int* out) { *out = 1; }\n')
    made = compiled(source, {})
    (kept,) = (tmp_path / "truekv").iterdir()
    whole = kept.read_bytes()
    # A device's driver and disassemblers take the file as it is.
    assert whole.startswith(made)
    flipped = [bytes([*whole[:place], whole[place] ^ 4, *whole[place + 1 :]]) for place in (0, len(made) // 2, -1)]
    for damaged in (*flipped, whole[:-1], whole[: len(whole) // 2], made, whole + b"\0", b"", b"\x7fELF"):
        kept.write_bytes(damaged)
        assert compiled(source, {}) == made
        assert caplog.messages == [f"the compiled kernel {kept} is damaged, so it is compiled again"]
        caplog.clear()
        assert kept.read_bytes() == whole
        assert compiled(source, {}) == made
        assert not caplog.messages
    assert list((tmp_path / "truekv").iterdir()) == [kept]


@NEEDS_NVCC
def test_processes_that_find_it_damaged_at_once_all_get_it_whole(tmp_path: Path) -> None:
    source, code = tmp_path / "one.cu", tmp_path / "code.py"
    source.write_text('extern "C" __global__ void one(int* out) { *out = 1; }\n')
    # Each reads and writes for as long as the others, who damage the file again and again.
    code.write_text(
        "import pathlib, sys\n"
        "from truekv.kernels.cuda import compiler\n"
        "source, made = pathlib.Path(sys.argv[1]), None\n"
        "for turn in range(6):\n"
        "    found = compiler.compiled(source.name, source.read_text(), {})\n"
        "    assert found == (made or found) and found.startswith(b'\\x7fELF')\n"
        "    made = found\n"
        "    (kept,) = (source.parent / 'truekv').glob('one-*.cubin')\n"
        "    if turn < 5:\n"
        "        kept.write_bytes(kept.read_bytes()[: 100 * turn])\n"
    )
    running = [
        subprocess.Popen([sys.executable, code, source], env={**os.environ, "XDG_CACHE_HOME": str(tmp_path)})
        for _ in range(3)
    ]
    assert [process.wait() for process in running] == [0, 0, 0]
    (kept,) = (tmp_path / "truekv").iterdir()
    assert kept.suffix == ".cubin"


@NEEDS_NVCC
def test_a_full_disk_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __global__ void one(int* out) { *out = 1; }\n')

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "replace", full)
    assert compiled(source, {}).startswith(b"\x7fELF")
    assert not list((tmp_path / "truekv").iterdir())


@NEEDS_NVCC
def test_where_nothing_can_be_kept_it_compiles_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    source = tmp_path / "one.cu"
    source.write_text('extern "C" __global__ void one(int* out) { *out = 1; }\n')
    assert compiled(source, {}).startswith(b"\x7fELF")
    source.write_text("no program")
    with pytest.raises(Refused, match=r"(fails: .*|does not compile )one\.cu"):
        compiled(source, {})


@pytest.mark.skipif(not compiler._nvrtc_paths(), reason="needs NVRTC, which comes with torch for CUDA")
def test_nvrtc_compiles_every_kind() -> None:
    made = compiler.Nvrtc(compiler._nvrtc_paths()[0])
    for kind in kernel.KINDS:
        assert made.compile(kind.file, kind.text, compiler.options(kind.definitions)).startswith(b"\x7fELF")


def test_a_cpu_loads_nothing_of_it() -> None:
    code = (
        "import sys; from memory.toys import *; select(model_spec((gqa(),)), formats_of((gqa(),)));"
        "sys.exit(any('kernels.cuda' in name for name in sys.modules))"
    )
    folder = Path(__file__).parents[2]
    assert not subprocess.run([sys.executable, "-c", code], cwd=folder, check=False).returncode
