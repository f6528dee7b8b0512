"""The CUDA kernel as its own PTX, run on the CPU in the place of the device."""

from __future__ import annotations

import functools

import pytest
import torch
from kernels.cuda.ptx import Launch, Program

from truekv.kernels.cuda import compiler, kernel

NEEDS_NVCC = pytest.mark.skipif(compiler.nvcc() is None, reason="needs nvcc, which makes the PTX that runs here")


@functools.cache
def ptx(kind: kernel.Kind) -> str:
    found = compiler.nvcc()
    assert found is not None
    return found.ptx(kernel.SOURCE, compiler.options(kernel.definitions(kind)))


class Emulated:
    """What `kernel.load` returns on a device; `text` is other PTX than the kernel's."""

    def __init__(self, text: str = "") -> None:
        self.grids: list[tuple[int, int, int]] = []
        self._text = text

    @property
    def launches(self) -> int:
        return len(self.grids)

    def load(self, kind: kernel.Kind, _device: torch.device) -> Emulated:
        self.program = Program.read(self._text or ptx(kind))
        return self

    def launch(self, grid: tuple[int, int, int], arguments: tuple[object, ...]) -> None:
        self.grids.append(grid)
        given = [item if isinstance(item, torch.Tensor) else item.value for item in arguments]  # type: ignore[attr-defined]
        Launch(self.program, grid, given).run()
