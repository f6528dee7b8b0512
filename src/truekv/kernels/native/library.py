"""The shared library: found, loaded after torch, and asked for the kernels of one instruction set."""

from __future__ import annotations

import ctypes
import functools
import logging
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from truekv.core.errors import Refused
from truekv.core.folder import choose
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

NAME: Final = "libtruekv_native.so"
NativeCall = tuple[Any, ctypes.Structure]
"""A function of the library and its arguments."""


class Library:
    """The loaded library and the instruction set that it runs: the machine's best one, unless another is forced."""

    def __init__(self, path: Path) -> None:
        """Load it; torch comes first, so that both share one OpenMP runtime and its threads."""
        torch.get_num_threads()
        self.path = path
        self._library = ctypes.CDLL(str(path))
        machine = self._library.truekv_machine
        machine.restype = ctypes.c_char_p
        if not hasattr(self._library, "truekv_replay"):
            raise Refused(f"the native library {path} belongs to another version of truekv; install the package again")
        self.replay = self._library.truekv_replay
        self.replay.argtypes = (ctypes.c_int64, ctypes.c_void_p, ctypes.c_void_p)
        self.replay.restype = None
        self.isas: tuple[str, ...] = tuple(machine().decode().split())
        """What this machine can run, the slowest first."""
        self._isa: str | None = None
        self.problem: str | None = None
        """Why AMX is not chosen on a machine that has it; known as soon as `isa` is."""
        self.recorder: Callable[[NativeCall], None] | None = None
        """Told of every call that was made, so that a captured step can make it again on the same buffers."""
        self._functions: dict[tuple[str, str | None], Any] = {}

    @property
    def isa(self) -> str:
        """The instruction set whose kernels `call` runs, or those of the best one below it; set to force another.

        It is chosen when it is first asked for, after AMX has been tried on a machine that has it.
        """
        if self._isa is None:
            self._isa = self._best()
        return self._isa

    @isa.setter
    def isa(self, isa: str) -> None:
        self._isa = isa

    def call(self, op: str, arguments: ctypes.Structure) -> None:
        """Run an operation with its arguments; the caller keeps the tensors alive that they point to."""
        function = self._functions.get((op, self._isa))
        if function is None:
            function = self.function(op, self.isa, type(arguments))
        pointer = ctypes.byref(arguments)
        function(pointer)
        if self.recorder is not None:
            self.recorder((function, arguments))

    def function(self, op: str, isa: str, arguments: type[ctypes.Structure]) -> Any:  # noqa: ANN401 (ctypes has no public name for it)
        """Return an operation's kernel for an instruction set; Refused if it takes other arguments than these."""
        runnable = self.isas[: self.isas.index(isa) + 1]
        variant = next(isa for isa in reversed(runnable) if hasattr(self._library, f"truekv_{op}_{isa}"))
        size = getattr(self._library, f"truekv_{op}_size_{variant}")()
        if size != ctypes.sizeof(arguments):
            raise Refused(
                f"the native library takes {size} bytes of arguments for {op}, this truekv gives "
                f"{ctypes.sizeof(arguments)}: it belongs to another version; install the package again"
            )
        function = getattr(self._library, f"truekv_{op}_{variant}")
        function.restype = None
        self._functions[op, isa] = function
        return function

    @contextmanager
    def using(self, isa: str) -> Generator[None]:
        """Run another instruction set's kernels inside the block."""
        before = self._isa
        self._isa = choose("instruction set", isa, dict(zip(self.isas, self.isas, strict=True)))
        try:
            yield
        finally:
            self._isa = before

    @contextmanager
    def recorded(self, recorder: Callable[[NativeCall], None]) -> Generator[None]:
        """Tell `recorder` of every call inside the block."""
        self.recorder = recorder
        try:
            yield
        finally:
            self.recorder = None

    def _best(self) -> str:
        *_, below, best = ("", *self.isas)
        if best != "amx":
            return best
        from truekv.kernels.native.trial import problem

        self.problem = problem(self, best, below)
        if self.problem is None:
            return best
        logging.getLogger("truekv").warning(
            "the kernels for %s run, which takes longer, because %s", below, self.problem
        )
        return below


class Calls:
    """Calls that were recorded, to be made again by the library itself, without Python between them."""

    def __init__(self, calls: list[NativeCall]) -> None:
        """Keep what they point to; the caller keeps alive what that points to."""
        native = library()
        assert native is not None
        self._calls = calls
        self._replay = native.replay
        pointers = ctypes.c_void_p * len(calls)
        self._functions = pointers(*(ctypes.cast(function, ctypes.c_void_p).value for function, _ in calls))
        self._arguments = pointers(*(ctypes.addressof(arguments) for _, arguments in calls))

    def __call__(self) -> None:
        """Make them."""
        self._replay(len(self._calls), self._functions, self._arguments)


@functools.cache
def library() -> Library | None:
    """Return the library, or None where none was built."""
    # An editable installation keeps what was built beside the installed package, not in the source tree.
    import truekv.kernels.native as package

    for folder in package.__path__:
        if (path := Path(folder) / NAME).is_file():
            return Library(path)
    return None


def run(op: str, arguments: ctypes.Structure) -> None:
    """Run an operation of the library, which must be there: the backend is chosen only where it is."""
    native = library()
    assert native is not None
    native.call(op, arguments)
