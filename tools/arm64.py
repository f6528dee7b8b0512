"""Run a static program for 64-bit Arm Linux: python tools/arm64.py PROGRAM [ARGUMENT ...].

The processor is QEMU's, as a library (the package unicorn), for `make arm64` where qemu-user is not installed. The
kernel is played as far as the programs in native/check need it: one thread, memory, and output.
"""

from __future__ import annotations

import os
import struct
import sys
from pathlib import Path
from typing import Any, Final

import unicorn  # type: ignore[import-not-found] (installed by make arm64 alone)
from unicorn import arm64_const as arm  # type: ignore[import-not-found]

PAGE: Final = 4096
BASE: Final = 0x400000
"""Where a position-independent program is put."""
HEAP: Final = 0x10_0000_0000
MAPS: Final = 0x20_0000_0000
STACK: Final = 0x7F_0000_0000
STACK_BYTES: Final = 8 << 20
LOAD: Final = 1
AARCH64: Final = 183
NOSYS, NOTTY, BADF = -38, -25, -9
ANONYMOUS, FIXED = 0x20, 0x10
ANSWERS: Final = {
    29: NOTTY,  # ioctl
    96: 1,  # set_tid_address
    99: 0,  # set_robust_list: there is no other thread
    134: 0,  # rt_sigaction: there are no signals
    135: 0,  # rt_sigprocmask
    178: 1,  # gettid
    226: 0,  # mprotect
    233: 0,  # madvise
}
"""Of system calls that need nothing done."""
X: Final = [getattr(arm, f"UC_ARM64_REG_X{index}") for index in range(9)]


def up(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // PAGE) * PAGE


class Machine:
    """One process: its memory, and the system calls that it makes."""

    def __init__(self, program: Path, arguments: list[str]) -> None:
        """Load a program and lay out its stack; exits with a sentence where it is not for this processor."""
        self.status: int | None = None
        self._cpu: Any = unicorn.Uc(unicorn.UC_ARCH_ARM64, unicorn.UC_MODE_ARM)
        self._cpu.ctl_set_cpu_model(arm.UC_CPU_ARM64_A72)  # plain ARMv8.0, as the kernels are compiled for
        self._cpu.reg_write(arm.UC_ARM64_REG_CPACR_EL1, 3 << 20)  # the vector unit is on
        self._cpu.hook_add(unicorn.UC_HOOK_INTR, self._interrupted)
        self._break = self._heap_end = HEAP
        self._next_map = MAPS
        image = program.read_bytes()
        if image[:6] != b"\x7fELF\x02\x01" or struct.unpack_from("<H", image, 18)[0] != AARCH64:
            sys.exit(f"{program} is no program for 64-bit Arm")
        self._start(image, [str(program), *arguments])

    def run(self) -> int:
        """Run it to its end and return its exit status; a fault ends it with a sentence."""
        try:
            self._cpu.emu_start(self._entry, 0)
        except unicorn.UcError as error:
            at = self._cpu.reg_read(arm.UC_ARM64_REG_PC)
            sys.exit(f"the program stopped at {at:#x}: {error}")
        return 1 if self.status is None else self.status

    def _start(self, image: bytes, arguments: list[str]) -> None:
        kind, entry, headers = struct.unpack_from("<H", image, 16)[0], *struct.unpack_from("<QQ", image, 24)
        size, count = struct.unpack_from("<HH", image, 54)
        base = BASE if kind == 3 else 0
        table = 0
        for index in range(count):
            what, _, offset, at, _, stored, needed, _ = struct.unpack_from("<IIQQQQQQ", image, headers + index * size)
            if what == 3:
                sys.exit(f"{arguments[0]} needs a dynamic loader; link it with -static")
            if what != LOAD:
                continue
            first = (base + at) // PAGE * PAGE
            last = up(base + at + needed)
            self._map(first, last - first)
            self._cpu.mem_write(base + at, image[offset : offset + stored])
            if offset <= headers < offset + stored:
                table = base + at + headers - offset
        self._entry = base + entry
        self._map(STACK - STACK_BYTES, STACK_BYTES)
        top = STACK - PAGE
        places: list[int] = []
        for text in arguments:
            top -= len(text.encode()) + 1
            self._cpu.mem_write(top, text.encode() + b"\0")
            places.append(top)
        top = (top - 16) // 16 * 16
        self._cpu.mem_write(top, b"truekv's emulator"[:16])
        # man getauxval: PHDR, PHENT, PHNUM, PAGESZ, ENTRY, RANDOM, HWCAP (fp and asimd).
        auxiliary = [3, table, 4, size, 5, count, 6, PAGE, 9, self._entry, 25, top, 16, 3, 0, 0]
        words = [len(places), *places, 0, 0, *auxiliary]
        stack = (top - 8 * len(words)) // 16 * 16
        self._cpu.mem_write(stack, struct.pack(f"<{len(words)}Q", *words))
        self._cpu.reg_write(arm.UC_ARM64_REG_SP, stack)

    def _map(self, start: int, size: int) -> None:
        """Map pages that are not mapped yet."""
        held = [(first, last + 1) for first, last, _ in self._cpu.mem_regions()]
        for page in range(start, start + size, PAGE) if any(f < start + size and start < e for f, e in held) else ():
            if not any(first <= page < end for first, end in held):
                self._cpu.mem_map(page, PAGE)
        if not any(first < start + size and start < end for first, end in held):
            self._cpu.mem_map(start, size)

    def _interrupted(self, _cpu: object, number: int, _data: object) -> None:
        if number != 2:
            sys.exit(f"the program stopped at {self._cpu.reg_read(arm.UC_ARM64_REG_PC):#x} by exception {number}")
        call, *arguments = (self._cpu.reg_read(X[index]) for index in (8, 0, 1, 2, 3, 4, 5))
        result = self._system(call, arguments)
        self._cpu.reg_write(X[0], result & (1 << 64) - 1)

    def _system(self, call: int, a: list[int]) -> int:
        """Do what Linux does for a system call of 64-bit Arm; those that no check makes are said to be unknown."""
        known = {
            64: self._write,
            66: self._write_parts,
            93: self._exit,
            94: self._exit,  # of all threads
            123: self._processors,
            214: self._grow,
            215: self._unmap,
            222: self._mmap,
        }
        if call in known:
            return known[call](*a)
        if call not in ANSWERS:
            sys.stderr.write(f"system call {call} is not played here\n")
        return ANSWERS.get(call, NOSYS)

    def _exit(self, status: int, *_: int) -> int:
        self.status = status & 255
        self._cpu.emu_stop()
        return 0

    def _write(self, file: int, at: int, size: int, *_: int) -> int:
        return os.write(file, bytes(self._cpu.mem_read(at, size))) if file in {1, 2} else BADF

    def _write_parts(self, file: int, at: int, count: int, *_: int) -> int:
        parts = struct.iter_unpack("<QQ", bytes(self._cpu.mem_read(at, 16 * count)))
        return sum(self._write(file, start, size) for start, size in parts if size)

    def _processors(self, _thread: int, _size: int, at: int, *_: int) -> int:
        """sched_getaffinity: the first processor."""
        self._cpu.mem_write(at, (1).to_bytes(8, "little"))
        return 8

    def _unmap(self, at: int, size: int, *_: int) -> int:
        self._cpu.mem_unmap(at, up(size))
        return 0

    def _mmap(self, _at: int, size: int, _access: int, flags: int, *_: int) -> int:
        """Memory without a file, wherever there is room."""
        if not flags & ANONYMOUS or flags & FIXED:
            return NOSYS
        at, self._next_map = self._next_map, self._next_map + up(size)
        self._cpu.mem_map(at, up(size))
        return at

    def _grow(self, end: int, *_: int) -> int:
        """Brk."""
        if end > self._break:
            if up(end) > self._heap_end:
                self._cpu.mem_map(self._heap_end, up(end) - self._heap_end)
                self._heap_end = up(end)
            self._break = end
        return self._break


def main() -> int:
    """Run the program that is named."""
    if len(sys.argv) < 2:
        sys.exit("usage: python tools/arm64.py PROGRAM [ARGUMENT ...]")
    return Machine(Path(sys.argv[1]), sys.argv[2:]).run()


if __name__ == "__main__":
    sys.exit(main())
