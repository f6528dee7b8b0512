"""Memory is taken when it is used: states, caches and loading, read from the system's own account."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from memory.toys import gdn, make_arena
from models.test_weights import random_weights, write_config
from safetensors.torch import save_file

from truekv.core import resident as resident_pages
from truekv.core.errors import Corrupted
from truekv.core.resident import mapped, release
from truekv.core.untouched import untouched
from truekv.kernels.native.library import library
from truekv.memory.states import StateLayer
from truekv.models.weights import Checkpoint

pytestmark = pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="the system keeps no such account")
MIB = 1 << 20


def resident(tensor: torch.Tensor) -> int:
    """Bytes of the mapping that a tensor lies in; nothing else may lie there."""
    (found,) = [item for item in mapped() if item.start <= tensor.data_ptr() < item.start + item.size]
    return found.resident


def test_zeros_are_provided_when_they_are_written() -> None:
    tensor = untouched((64, MIB), torch.uint8, "cpu", piece=MIB)
    before = resident(tensor)
    assert not tensor[5].any()
    tensor[7] = 1
    grown = resident(tensor) - before
    assert MIB <= grown < 2 * MIB
    assert tensor.sum() == MIB


def test_a_slot_that_is_zero_is_only_read() -> None:
    arena = make_arena((gdn(4, 8, 128, 128),), poison=False, max_num_seqs=8)
    (layer,) = arena.layers
    assert isinstance(layer, StateLayer)
    state = layer.state["state"]
    before = resident(state)
    slot = arena.open().slot
    assert resident(state) == before
    state[slot, -1] = -0.0
    assert resident(state) > before
    layer.open(slot)
    assert not state[slot].view(torch.int32).any(), "a zero of either sign that was written is written over"


def test_what_is_released_comes_back() -> None:
    def code() -> int:
        return sum(item.resident for item in mapped() if item.file.endswith("libtorch_cpu.so") and "x" in item.access)

    expected = torch.arange(64.0).view(8, 8).softmax(-1) @ torch.eye(8)
    before = code()
    release()
    assert code() < before / 4
    assert torch.equal(torch.arange(64.0).view(8, 8).softmax(-1) @ torch.eye(8), expected)
    assert code() > 0


def test_lists_of_other_systems_are_read_as_far_as_they_go(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = tmp_path / "smaps"
    listed.write_text("00400000-00403000 r-xp 00000000 fe:00 12 /bin/x\nRss:  8 kB\nff-zz what is this\n")
    monkeypatch.setattr(resident_pages, "_MAPS", listed)
    (found,) = mapped()
    assert (found.start, found.size, found.file) == (0x400000, 0x3000, "/bin/x")
    assert (found.resident, found.anonymous) == (8192, 8192)
    listed.write_text("nothing of the kind\n")
    assert list(mapped()) == []
    release()
    listed.unlink()
    assert list(mapped()) == []


LOAD = """
import re, sys
from pathlib import Path
from truekv.kernels.native.ops import OPS
from truekv.models.weights import Checkpoint
import torch

def status(name):
    return 1024 * int(re.search(rf"{name}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])

checkpoint = Checkpoint.open(sys.argv[1])
torch.ones(512, 512) @ torch.ones(512, 512)
before = status("VmRSS")
model = checkpoint.load("float32", OPS)
print(checkpoint.weight_bytes, status("VmHWM") - before)
"""


@pytest.mark.skipif(library() is None, reason="the native library is not built")
def test_loading_peaks_at_one_copy_of_the_weights(tmp_path: Path) -> None:
    write_config(tmp_path, num_hidden_layers=24, hidden_size=256, intermediate_size=2048)
    save_file(random_weights(tmp_path), tmp_path / "model.safetensors")
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(tmp_path)], capture_output=True, text=True, check=True
    ).stdout.split()
    size, peak = map(int, done)
    assert size > 100 * MIB
    assert peak < 1.3 * size


def test_files_that_change_while_they_are_read_are_named(tmp_path: Path) -> None:
    write_config(tmp_path)
    save_file(random_weights(tmp_path), tmp_path / "model.safetensors")
    checkpoint = Checkpoint.open(str(tmp_path))
    file = tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(Corrupted, match=r"cannot be read any more \(it ends at byte \d+\); download it again"):
        checkpoint.load("float32")
    file.unlink()
    with pytest.raises(Corrupted, match="cannot be read any more"):
        checkpoint.load("float32")
