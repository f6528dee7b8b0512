"""From CUDA C++ to machine code at first use, by NVRTC where torch brought it, else by nvcc; kept on disk.

A file of the cache is named after all that its contents follow from: sources, definitions, architecture and compiler.
Its last bytes are a digest of the others, so that a damaged one is noticed and made again.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import importlib.util
import logging
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Protocol

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

ARCHITECTURE: Final = "sm_90a"
_DIGEST: Final = hashlib.sha256().digest_size


class Compiler(Protocol):
    """What makes machine code of a source."""

    @property
    def version(self) -> str:
        """Changes whenever the code may."""
        ...

    def compile(self, name: str, text: str, options: list[str]) -> bytes:
        """Return a cubin of a text of this file name; Refused with the compiler's first complaint."""
        ...


class Nvrtc:
    """The compiler as a library, which comes with torch for CUDA."""

    def __init__(self, path: str) -> None:
        """Load it; OSError where it cannot be."""
        # It looks for this one by name alone, and the loader has no path to where packages put it.
        for other in sorted(Path(path).parent.glob("libnvrtc-builtins.so.*")):
            ctypes.CDLL(str(other), mode=ctypes.RTLD_GLOBAL)
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)))
        self.version = f"nvrtc {major.value}.{minor.value} {path}"

    def compile(self, name: str, text: str, options: list[str]) -> bytes:
        """See Compiler."""
        program = ctypes.c_void_p()
        created = self._library.nvrtcCreateProgram(ctypes.byref(program), text.encode(), name.encode(), 0, None, None)
        self._check(created)
        try:
            given = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self._library.nvrtcCompileProgram(program, len(options), given)
            if result:
                raise Refused(f"NVRTC does not compile {name}: {self._text(program, 'ProgramLog')[:300]}")
            return self._bytes(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _text(self, program: ctypes.c_void_p, what: str) -> str:
        return " ".join(self._bytes(program, what).rstrip(b"\0").decode(errors="replace").split())

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer))
        return buffer.raw

    def _check(self, result: int) -> None:
        if result:
            raise Refused(f"NVRTC says {self._library.nvrtcGetErrorString(result).decode()}")


class Nvcc:
    """The compiler as a program."""

    def __init__(self, path: str) -> None:
        """Ask it for its version."""
        self._path = path
        self.version = self._run("--version")

    def compile(self, name: str, text: str, options: list[str]) -> bytes:
        """See Compiler."""
        return self._made(name, text, ["-cubin", *options])

    def ptx(self, name: str, text: str, options: list[str]) -> str:
        """Return the code before it is made for a machine."""
        return self._made(name, text, ["-ptx", *options]).decode()

    def _made(self, name: str, text: str, options: list[str]) -> bytes:
        with tempfile.TemporaryDirectory() as folder:
            source, out = Path(folder) / name, Path(folder) / "out"
            source.write_text(text)
            self._run(*options, "-o", str(out), str(source))
            return out.read_bytes()

    def _run(self, *arguments: str) -> str:
        # The path is that of the nvcc on PATH, the arguments are this package's own.
        done = subprocess.run([self._path, *arguments], capture_output=True, text=True, check=False)  # noqa: S603
        if done.returncode:
            raise Refused(f"{self._path} fails: {' '.join((done.stderr or done.stdout).split())[:300]}")
        return done.stdout


@functools.cache
def compiler() -> Compiler:
    """Return a compiler that is there; Refused where none is."""
    for path in _nvrtc_paths():
        with suppress(OSError):
            return Nvrtc(path)
    found = nvcc()
    if found is None:
        raise Refused("there is neither NVRTC (pip install nvidia-cuda-nvrtc) nor nvcc")
    return found


@functools.cache
def nvcc() -> Nvcc | None:
    """Return the nvcc of the PATH, or None."""
    path = shutil.which("nvcc")
    return Nvcc(path) if path else None


def options(definitions: Mapping[str, int]) -> list[str]:
    """Return what both compilers are called with."""
    return [f"-arch={ARCHITECTURE}", "-std=c++17", *(f"-D{name}={value}" for name, value in definitions.items())]


def compiled(name: str, text: str, definitions: Mapping[str, int]) -> bytes:
    """Return machine code, out of the cache if it was made before; Refused where it cannot be made."""
    by, given = compiler(), options(definitions)
    digest = hashlib.sha256(text.encode() + repr((given, by.version)).encode()).hexdigest()
    kept = _folder() / f"{Path(name).stem}-{digest[:32]}.cubin"
    code = _found(kept)
    if code is None:
        code = by.compile(name, text, given)
        # Where nothing can be kept, it is compiled again the next time.
        with suppress(OSError):
            _keep(kept, code)
    return code


def _found(kept: Path) -> bytes | None:
    """Return the machine code of a file, or None where there is none, or not what was written; that is said."""
    try:
        contents = kept.read_bytes()
    except OSError:
        return None
    # Behind the code, where tools that read such files do not look.
    code, digest = contents[:-_DIGEST], contents[-_DIGEST:]
    if hashlib.sha256(code).digest() == digest:
        return code
    logging.getLogger("truekv").warning("the compiled kernel %s is damaged, so it is compiled again", kept)
    return None


def _keep(kept: Path, code: bytes) -> None:
    """Write a file of the cache, under its name only once it is whole: other processes may look for it now."""
    kept.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=kept.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(code + hashlib.sha256(code).digest())
        Path(name).replace(kept)
    except OSError:
        Path(name).unlink(missing_ok=True)
        raise


def _folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "truekv"


def _nvrtc_paths() -> list[str]:
    """Return where packages put it: nvidia/cuda_nvrtc/lib, or nvidia/cu13/lib."""
    package: Any = importlib.util.find_spec("nvidia")
    roots = package.submodule_search_locations or () if package else ()
    return [str(path) for root in roots for path in sorted(Path(root).glob("*/lib/libnvrtc.so.*"))]
