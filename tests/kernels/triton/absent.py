"""A GPU that is not there: Triton compiles for it whatever is launched, and nothing runs."""

from __future__ import annotations

import itertools
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NamedTuple

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

if TYPE_CHECKING:
    from collections.abc import Generator


SHARED: Final = {90: 227 << 10, 80: 99 << 10}
"""Bytes that one program may have, by compute capability; 8.0's code runs on the 8.6 and 8.9 too, which have least."""


_NUMBERS: Final = itertools.count()


class Compiled(NamedTuple):
    """A kernel as it would have been loaded."""

    name: str
    """Of its function."""
    cubin: bytes
    shared: int
    """Bytes of a program."""
    warps: int
    """Of a program."""


class AbsentDevice:
    """Stands for Triton's own driver, whose methods these are.

    Tensors lie on the CPU, where their addresses are as even as on a device. Triton asks for a kernel to be loaded when
    it is first launched, with the types and constants that it found in the arguments.
    """

    def __init__(self, capability: int) -> None:
        """Take a compute capability of two digits."""
        self.capability = capability
        self.compiled: list[Compiled] = []
        """In the order of their first launches."""
        self.utils = self
        self._warps = 0
        self._number = next(_NUMBERS)

    def get_current_target(self) -> GPUTarget:
        """Say what is compiled for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Say which device it is: another than all before, as Triton keeps what it has loaded by device."""
        return self._number

    def get_current_stream(self, _device: int) -> int:
        """Say where a launch is queued."""
        return 0

    def get_device_properties(self, _device: int) -> dict[str, int]:
        """Say how much shared memory there is; a kernel that takes more is refused as on a device."""
        return {"max_shared_mem": SHARED[self.capability]}

    def launcher_cls(self, _source: Any, metadata: Any) -> Any:
        """Make what launches a kernel, just before it is loaded."""
        self._warps = metadata.num_warps
        return lambda *_: None

    def load_binary(self, name: str, cubin: bytes, shared: int, _device: int) -> tuple[object, object, int, int, int]:
        """Take a kernel; it may have as many threads as any."""
        self.compiled.append(Compiled(name, cubin, shared, self._warps))
        return object(), object(), 0, 0, 1024


@contextmanager
def absent(capability: int) -> Generator[AbsentDevice]:
    """Let kernels be compiled for a GPU of this compute capability inside the block."""
    # Not `active`, which would look for a GPU.
    before, device = driver._active, AbsentDevice(capability)
    driver.set_active(device)
    try:
        # No launch writes what this would look for.
        with torch.inference_mode():
            yield device
    finally:
        driver._active = before
