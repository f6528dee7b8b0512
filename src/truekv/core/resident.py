"""What of this process lies in memory, and giving back what loading left there. Elsewhere than on Linux: nothing."""

from __future__ import annotations

import ctypes
import mmap
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAPS: Final = Path("/proc/self/smaps")
_MAP: Final = re.compile(r"([0-9a-f]+)-([0-9a-f]+) ([-r][-w][-x]). [0-9a-f]+ [0-9a-f:]+ (\d+) *(.*)")


@dataclass(frozen=True, slots=True)
class Mapped:
    """One mapping of the process's memory: /proc/self/smaps, which man proc_pid_smaps describes. Sizes in bytes."""

    start: int
    size: int
    access: str
    """r, w, x or - each."""
    file: str
    """Empty where no file is mapped, [heap] and the like for what has a name of its own."""
    resident: int
    anonymous: int
    """Of those that are resident: not, or no longer, those of the file."""


def mapped() -> Iterator[Mapped]:
    """Yield every mapping; none where the system has no such list.

    Where it does not tell which pages are the process's own, all of them are taken for it.
    """
    try:
        text = _MAPS.read_text()
    except OSError:
        return
    for block in re.split(r"\n(?=[0-9a-f]+-)", text):
        head = _MAP.match(block)
        if head is None:
            continue  # not a line as Linux writes it
        start, end, access, _, file = head.groups()
        sizes = {name: 1024 * int(count) for name, count in re.findall(r"^(\w+): +(\d+) kB", block, re.MULTILINE)}
        first, resident = int(start, 16), sizes.get("Rss", 0)
        yield Mapped(first, int(end, 16) - first, access, file, resident, sizes.get("Anonymous", resident))


def release() -> None:
    """Give back what is free inside of the heap, and the pages of libraries that are only read.

    Importing torch runs through 60 MB of code once. What is needed again is mapped again when it is next run, from
    the file's pages that the system keeps. Mappings of which the process has changed a page are left alone.
    """
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "malloc_trim"):
        return  # not glibc
    libc.malloc_trim(ctypes.c_size_t(0))
    madvise = libc.madvise
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for item in mapped():
        if item.file.startswith("/") and "w" not in item.access and not item.anonymous:
            madvise(item.start, item.size, mmap.MADV_DONTNEED)
