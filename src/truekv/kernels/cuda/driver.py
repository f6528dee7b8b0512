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
_MOST_SHARED: Final = 8
"""CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES of the driver's header: without it a launch gives 48 KiB at most."""


class Function:
    """A kernel on one device."""

    def __init__(self, code: bytes, name: str, device: torch.device, shared_bytes: int = 0) -> None:
        """Load it into the device's context, which torch made; Refused where the driver does not take it.

        `shared_bytes`: shared memory that launches give to each block, beside what the code declares.
        """
        self._device, self._shared_bytes = device, shared_bytes
        self._module, self._function = ctypes.c_void_p(), ctypes.c_void_p()
        with torch.cuda.device(device):
            # So that there is a context, and in this thread.
            torch.cuda.synchronize()
            _check(_driver().cuModuleLoadData(ctypes.byref(self._module), code), f"load the kernel '{name}'")
            found = _driver().cuModuleGetFunction(ctypes.byref(self._function), self._module, name.encode())
            _check(found, f"find the kernel '{name}'")
            allowed = _driver().cuFuncSetAttribute(self._function, _MOST_SHARED, ctypes.c_int(shared_bytes))
        _check(allowed, f"give {shared_bytes} bytes of shared memory to the kernel '{name}'")

    def launch(self, grid: tuple[int, int, int], arguments: Seq[Argument]) -> None:
        """Launch blocks of 128 threads on the current stream of the device, and do not wait for them."""
        held: list[Any] = [
            ctypes.c_void_p(item.data_ptr()) if isinstance(item, torch.Tensor) else item for item in arguments
        ]
        pointers = (ctypes.c_void_p * len(held))(*(ctypes.addressof(item) for item in held))
        stream = ctypes.c_void_p(torch.cuda.current_stream(self._device).cuda_stream)
        sizes = (ctypes.c_uint(size) for size in (*grid, _THREADS, 1, 1, self._shared_bytes))
        result = _driver().cuLaunchKernel(self._function, *sizes, stream, pointers, None)
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
