"""The CUDA driver, as far as it takes to load machine code and to launch it on torch's stream."""

from __future__ import annotations

import ctypes
import functools
from typing import TYPE_CHECKING, Any, Final, TypeAlias

from truekv.core.errors import Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

Argument: TypeAlias = "torch.Tensor | ctypes.c_int32 | ctypes.c_uint32 | ctypes.c_int64"
"""A tensor stands for its address."""
_THREADS: Final = 128


class Function:
    """A kernel on one device."""

    def __init__(self, code: bytes, name: str, device: torch.device) -> None:
        """Load it into the device's context, which torch made; Refused where the driver does not take it."""
        self._device = device
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            # So that there is a context, and in this thread.
            torch.cuda.synchronize()
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code), f"load the kernel '{name}'")
            found = _driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
        _check(found, f"find the kernel '{name}'")

    def launch(self, grid: tuple[int, int, int], arguments: Seq[Argument]) -> None:
        """Launch blocks of 128 threads on the current stream of the device, and do not wait for them."""
        held: list[Any] = [
            ctypes.c_void_p(item.data_ptr()) if isinstance(item, torch.Tensor) else item for item in arguments
        ]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(item) for item in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        result = _driver().cuLaunchKernel(
            self._function, *(ctypes.c_uint(size) for size in (*grid, _THREADS, 1, 1, 0)), stream, pointers, None
        )
        _check(result, "launch a kernel")


@functools.cache
def _driver() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise Refused(f"there is no CUDA driver: {error}") from error


def _check(result: int, what: str) -> None:
    if result:
        text = ctypes.c_char_p()
        _driver().cuGetErrorString(result, ctypes.byref(text))
        raise Refused(f"the CUDA driver cannot {what}: {(text.value or str(result).encode()).decode()}")
