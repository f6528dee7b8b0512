"""Runs a kernel's PTX on a CPU, all threads of a launch at once: a register is an array, a predicate a mask.

Every instruction is one that is defined below, or the kernel is refused. Addresses must lie in tensors that were
passed to the launch, shared memory is read only after it was written and, by another thread, after its warp has met or,
of another warp, after a barrier, and what takes part of a warp only where it takes all is refused. What is copied
asynchronously arrives when it is waited for, and not before. Registers and shared memory start as NaN. Threads wait
where they meet again: the group at the lowest instruction runs first.

Semantics are those of the PTX ISA. Tensor cores are taken at their worst (Fasi et al. 2021): products are exact, but
before they are added, with the number that they are added to, all are cut to 24 bits below the largest of them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import numpy as np
import torch

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

Array = Any
"""One number of each thread."""

_TYPES: Final = {
    "b16": np.uint16, "u16": np.uint16,
    "b32": np.uint32, "u32": np.uint32, "s32": np.int32, "f32": np.float32, "f16x2": np.uint32,
    "b64": np.uint64, "u64": np.uint64, "s64": np.int64,
    "pred": np.bool_,
}  # fmt: skip
_STORAGE: Final = {"p": np.bool_, "rs": np.uint16, "r": np.uint32, "rd": np.uint64, "f": np.float32}
_POISON: Final = {"p": False, "rs": 0x7E7E, "r": 0xFFFFFFFF, "rd": 0xFFFFFFFFFFFFFFFF, "f": np.nan}
_HALVES: Final = {("f32", "f16", "f16", "f32"): "f16", ("f32", "bf16", "bf16", "f32"): "bf16"}
_BYTES: Final = {("s32", "s8", "s8", "s32"): np.int8, ("s32", "s8", "u8", "s32"): np.uint8}


class Wrong(Exception):
    """What no device would do, or what this does not know."""


@dataclass(frozen=True)
class Instruction:
    """`predicate` is a register, with ! in front if it is to be false."""

    text: str
    predicate: str
    name: str
    parts: tuple[str, ...]
    """Of its name, without the first."""
    operands: tuple[str, ...]


@dataclass
class Program:
    """One kernel."""

    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    parameters: list[tuple[str, str]] = field(default_factory=list)
    """Names and types."""
    shared: dict[str, int] = field(default_factory=dict)
    """Where each variable starts."""
    shared_bytes: int = 0
    threads: int = 0
    """Of a block."""

    @classmethod
    def read(cls, text: str) -> Program:
        """Parse the only kernel of a file."""
        self = cls()
        text = re.sub(r"//[^\n]*", "", text)
        (head,) = re.findall(r"\.entry\s+\w+\((.*?)\)", text, re.DOTALL)
        self.parameters = [(name, kind) for kind, name in re.findall(r"\.param\s+\.(\w+)\s+(\w+)", head)]
        (self.threads,) = (int(number) for number in re.findall(r"\.maxntid (\d+), 1, 1", text))
        for align, name, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", text):
            start = -(-self.shared_bytes // int(align)) * int(align)
            self.shared[name], self.shared_bytes = start, start + int(size)
        # What a launch gives lies behind what is declared.
        for align, name in re.findall(r"\.extern \.shared \.align (\d+) \.b8 (\w+)\[\]", text):
            self.shared_bytes = -(-self.shared_bytes // int(align)) * int(align)
            self.shared[name] = self.shared_bytes
        body = text[text.index("{", text.index(".entry")) + 1 : text.rindex("}")]
        for statement in re.split(r";|(?<=:)\s", body):
            line = " ".join(statement.split())
            if label := re.fullmatch(r"(\$\w+):", line):
                self.labels[label[1]] = len(self.instructions)
            elif line and not line.startswith((".reg", ".shared", ".pragma")):
                found = re.fullmatch(r"(?:@(!?%p\d+) )?([a-z0-9]+)((?:[.:]+[a-zA-Z_0-9]+)*)(?: (.*))?", line)
                if not found:
                    raise Wrong(f"not an instruction: {line}")
                predicate, name, parts, operands = (part or "" for part in found.groups())
                split = tuple(re.findall(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+", operands))
                self.instructions.append(
                    Instruction(line, predicate, name, tuple(re.split(r"[.:]+", parts)[1:]), split)
                )
        return self


class Launch:
    """A grid of blocks of threads, and all that they hold."""

    def __init__(
        self,
        program: Program,
        grid: tuple[int, int, int],
        arguments: Sequence[torch.Tensor | int],
        shared_bytes: int = 0,
    ) -> None:
        """Take pointers as tensors, numbers as they are; `shared_bytes` are given to each block."""
        self.program = program
        blocks = grid[0] * grid[1] * grid[2]
        self.size = blocks * program.threads
        block = np.arange(self.size) // program.threads
        self.thread = np.arange(self.size) % program.threads
        self.block, self.warp = block, np.arange(self.size) // 32
        self.special = {
            "%tid.x": self.thread.astype(np.uint32),
            "%ctaid.x": (block % grid[0]).astype(np.uint32),
            "%ctaid.y": (block // grid[0] % grid[1]).astype(np.uint32),
            "%ctaid.z": (block // grid[0] // grid[1]).astype(np.uint32),
            "%nctaid.x": np.full(self.size, grid[0], np.uint32),
        }
        self.registers: dict[str, Array] = {}
        self.memory = Memory([item for item in arguments if isinstance(item, torch.Tensor)])
        # In twos of bytes, of which no kernel reads a part.
        self.shared = np.full((blocks, (program.shared_bytes + shared_bytes) // 2), 0xFFFF, np.uint16)
        # How many barriers a block has had, and how often a warp has met, barriers included.
        self.barriers, self.meetings = np.zeros(blocks, np.int32), np.zeros(self.size // 32, np.int32)
        # The thread that wrote each, and after how many of both; -1 for what nobody wrote.
        self.writer, self.epoch, self.meeting = (np.full(self.shared.shape, -1, np.int32) for _ in range(3))
        # The first and the last warp that read it since a barrier, and thread since a meeting of its warp.
        self.readers = np.full((2, *self.shared.shape), -1, np.int32)
        self.lanes = np.full((2, *self.shared.shape), -1, np.int32)
        self.read, self.met = (np.full(self.shared.shape, -1, np.int32) for _ in range(2))
        # What is under way: threads, the groups it belongs to, where it comes from, the places that it goes to.
        self.copies: list[tuple[Array, Array, Array, Array]] = []
        self.arriving = np.zeros(self.shared.shape, bool)
        self.group = np.zeros(self.size, np.int64)
        if len(arguments) != len(program.parameters):
            raise Wrong(f"{len(arguments)} arguments for {len(program.parameters)} parameters")
        self.given: dict[str, Array] = {}
        for (name, kind), item in zip(program.parameters, arguments, strict=True):
            number = item.data_ptr() if isinstance(item, torch.Tensor) else item
            self.given[name] = np.array(number).astype(_TYPES[kind])
        self.mask = np.ones(self.size, bool)
        self.executed = 0

    def run(self) -> None:
        """Run until every thread has returned."""
        code, end = self.program.instructions, len(self.program.instructions)
        joins = set(self.program.labels.values())
        at = np.zeros(self.size, np.int64)
        waiting = np.zeros(self.size, bool)
        with np.errstate(all="ignore"):
            while (at < end).any():
                free = (at < end) & ~waiting
                if not free.any():
                    raise Wrong("threads wait for others that have returned")
                now = int(at[free].min())
                self.mask = free & (at == now)
                while True:
                    instruction = code[now]
                    self.executed += 1
                    mask = self._predicated(instruction)
                    now += 1
                    if instruction.name == "bra":
                        at[self.mask] = now
                        at[mask] = self.program.labels[instruction.operands[0]]
                        break
                    if instruction.name == "ret":
                        at[self.mask] = now
                        at[mask] = end
                        break
                    if instruction.name == "bar" and instruction.parts[0] == "sync":
                        self._whole_warps(mask, instruction)
                        at[mask] = now
                        waiting[mask] = True
                        self._released(waiting)
                        break
                    self._step(instruction, mask)
                    if now in joins:
                        at[self.mask] = now
                        break

    def _predicated(self, instruction: Instruction) -> Array:
        if not instruction.predicate:
            return self.mask
        value = self.registers[instruction.predicate.lstrip("!")]
        return self.mask & (~value if instruction.predicate.startswith("!") else value)

    def _whole_warps(self, mask: Array, instruction: Instruction) -> None:
        warps = mask.reshape(-1, 32)
        if not (warps.all(1) | ~warps.any(1)).all():
            raise Wrong(f"part of a warp reaches {instruction.text}")

    def _released(self, waiting: Array) -> None:
        """Let blocks go on whose threads all wait."""
        blocks = waiting.reshape(len(self.barriers), -1)
        done = blocks.all(1)
        self.barriers[done] += 1
        self.meetings[np.repeat(done, self.program.threads // 32)] += 1
        blocks[done] = False

    def _is(self, operand: str, number: int, mask: Array) -> None:
        if (np.broadcast_to(self.get(operand, "s32"), self.size)[mask] != number).any():
            raise Wrong(f"{operand} is not {number} in all threads")

    # Operands.

    def get(self, operand: str, kind: str) -> Array:
        """Return an operand as numbers of a type: an array or one number."""
        wanted = _TYPES[kind]
        if operand in self.special:
            return self.special[operand].astype(wanted)
        if operand.startswith("%"):
            held = self.registers[operand]
            # A narrower type takes the lower bits.
            return held.view(wanted) if held.dtype.itemsize <= np.dtype(wanted).itemsize else held.astype(wanted)
        if operand.startswith("0f"):
            return np.array(int.from_bytes(bytes.fromhex(operand[2:])), np.uint32).view(np.float32).view(wanted)
        if operand in self.program.shared:
            return np.array(self.program.shared[operand], wanted)
        return np.array(
            int(operand, 0) & (1 << 8 * np.dtype(wanted).itemsize) - 1, f"u{np.dtype(wanted).itemsize}"
        ).view(wanted)

    def put(self, register: str, value: Array, mask: Array) -> None:
        """Set a register in the threads of a mask."""
        (kind,) = re.findall(r"^%(p|rs|rd|r|f)\d+$", register) or [None]
        if kind is None:
            raise Wrong(f"no register: {register}")
        value = np.broadcast_to(value, self.size)
        if value.dtype.itemsize < np.dtype(_STORAGE[kind]).itemsize:
            # Numbers of a narrower type are extended by their sign or by zeros.
            value = value.astype(f"{value.dtype.kind}{np.dtype(_STORAGE[kind]).itemsize}")
        value = value if value.dtype == _STORAGE[kind] else np.ascontiguousarray(value).view(_STORAGE[kind])
        if mask.all():
            self.registers[register] = value
            return
        old = self.registers.get(register)
        if old is None:
            old = np.full(self.size, _POISON[kind], _STORAGE[kind])
        self.registers[register] = np.where(mask, value, old)

    def _step(self, instruction: Instruction, mask: Array) -> None:
        name, parts, operands = instruction.name, instruction.parts, instruction.operands
        kinds = [part for part in parts if part in _TYPES]
        special = getattr(self, f"_do_{name}", None)
        if special is not None:
            special(instruction, mask, kinds)
            return
        key = ".".join((name, *(part for part in parts if part not in kinds)))
        function = _PLAIN.get(key)
        if function is None or not kinds:
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self.put(operands[0], function(*(self.get(item, kinds[-1]) for item in operands[1:])), mask)

    # Instructions that are more than a function of their operands.

    def _do_bar(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        if instruction.parts != ("warp", "sync"):
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self._whole_warps(mask, instruction)
        self._is(instruction.operands[0], -1, mask)
        self.meetings[mask[::32]] += 1

    def _do_cp(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        match instruction.parts:
            case ("async", "cg", "shared", "global"):
                target, source, size, *held = instruction.operands
                self._is(size, 16, mask)
                # Where nothing is to be read, zeros arrive.
                read = mask & (np.broadcast_to(self.get(held[0], "u32"), self.size) > 0) if held else mask
                if held and not set(np.unique(self.get(held[0], "u32")[mask])) <= {0, 16}:
                    raise Wrong(f"a part of 16 bytes: {instruction.text}")
                to, start = (self._address(item, kind) for item, kind in ((target, "u32"), (source, "u64")))
                block, at = self._in_shared(to, 16, mask)
                self._mark(block, at, mask)
                # What is at the address now may be another thing when it arrives.
                self.memory.read(start, 16, read)
                self.arriving[block, at] = True
                self.copies.append((np.flatnonzero(mask), self.group[mask], np.where(read, start, 0)[mask], at))
            case ("async", "commit_group"):
                self.group[mask] += 1
            case ("async", "wait_group"):
                self._arrive(self.group - int(instruction.operands[0]), mask)
            case _:
                raise Wrong(f"an instruction that is not known: {instruction.text}")

    def _arrive(self, before: Array, mask: Array) -> None:
        """Finish what threads of a mask copy in groups before some number."""
        left: list[tuple[Array, Array, Array, Array]] = []
        for threads, group, source, at in self.copies:
            done = mask[threads] & (group < before[threads])
            if done.any():
                which = np.zeros(self.size, bool)
                which[threads[done]] = True
                address = np.zeros(self.size, np.int64)
                address[threads[done]] = source[done]
                block = self.block[which][:, None]
                data = np.zeros((int(done.sum()), 16), np.uint8)
                data[source[done] > 0] = self.memory.read(address, 16, which & (address > 0))
                self.shared[block, at[done]] = data.view(np.uint16)
                self.arriving[block, at[done]] = False
                self._written(block, at[done], which)
            if not done.all():
                left.append((threads[~done], group[~done], source[~done], at[~done]))
        self.copies = left

    def _do_mov(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        self.put(instruction.operands[0], self.get(instruction.operands[1], kinds[0]), mask)

    def _do_setp(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, *sources = instruction.operands
        a, b = (self.get(item, kinds[0]) for item in sources)
        self.put(target, _COMPARE[instruction.parts[0]](a, b), mask)

    def _do_selp(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, a, b, chosen = instruction.operands
        self.put(target, np.where(self.registers[chosen], self.get(a, kinds[0]), self.get(b, kinds[0])), mask)

    def _do_cvt(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, *sources = instruction.operands
        parts = ".".join(instruction.parts)
        if parts == "rn.f16x2.f32":
            high, low = (self.get(item, "f32").astype(np.float16).view(np.uint16) for item in sources)
            value = low.astype(np.uint32) | high.astype(np.uint32) << np.uint32(16)
        elif parts == "rn.bf16x2.f32":
            high, low = (
                torch.from_numpy(np.array(np.broadcast_to(self.get(item, "f32"), self.size))).bfloat16()
                for item in sources
            )
            value = torch.stack([low, high], -1).view(torch.int32)[:, 0].numpy().view(np.uint32)
        elif parts == "f32.f16":
            value = self.get(sources[0], "b16").view(np.float16).astype(np.float32)
        elif parts == "rn.f32.s32":
            value = self.get(sources[0], "s32").astype(np.float32)
        elif len(kinds) == 2 and kinds == list(instruction.parts) and "f32" not in kinds:
            value = self.get(sources[0], kinds[1]).astype(_TYPES[kinds[0]])
        else:
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self.put(target, value, mask)

    def _do_cvta(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        self.put(instruction.operands[0], self.get(instruction.operands[1], kinds[0]), mask)

    def _do_mul(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, *sources = instruction.operands
        a, b = (self.get(item, kinds[0]) for item in sources)
        if "wide" in instruction.parts:
            double = np.int64 if kinds[0] == "s32" else np.uint64
            a, b = a.astype(double), b.astype(double)
        elif "lo" not in instruction.parts and kinds[0] != "f32":
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self.put(target, a * b, mask)

    def _do_mad(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, *sources = instruction.operands
        a, b, c = (self.get(item, kinds[0]) for item in sources)
        if instruction.parts[0] != "lo":
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self.put(target, a * b + c, mask)

    def _do_shl(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, a, by = instruction.operands
        self.put(target, self.get(a, kinds[0]) << self.get(by, "u32").astype(_TYPES[kinds[0]]), mask)

    def _do_shr(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        target, a, by = instruction.operands
        self.put(target, self.get(a, kinds[0]) >> self.get(by, "u32").astype(_TYPES[kinds[0]]), mask)

    def _do_shfl(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        self._whole_warps(mask, instruction)
        target, source, by, rest, members = instruction.operands
        if instruction.parts not in {("sync", "bfly", "b32"), ("sync", "idx", "b32")}:
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self._is(rest, 31, mask)
        self._is(members, -1, mask)
        by_T, lane_T = np.broadcast_to(self.get(by, "s32"), self.size), np.arange(self.size) % 32
        from_T = by_T & 31 if instruction.parts[1] == "idx" else lane_T ^ by_T
        value = self.get(source, "b32")[np.arange(self.size) - lane_T + from_T]
        self.put(target.split("|")[0], value, mask)
        if "|" in target:
            self.put(target.split("|")[1], np.ones(1, bool), mask)

    def _do_vote(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        self._whole_warps(mask, instruction)
        target, source, members = instruction.operands
        if instruction.parts != ("sync", "any", "pred"):
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        self._is(members, -1, mask)
        self.put(target, self.registers[source].reshape(-1, 32).any(1).repeat(32), mask)

    def _do_movmatrix(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        self._whole_warps(mask, instruction)
        if instruction.parts != ("sync", "aligned", "m8n8", "trans", "b16"):
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        target, source = instruction.operands
        halves = np.ascontiguousarray(self.get(source, "b32")).view(np.uint16).reshape(-1, 8, 8)
        turned = np.ascontiguousarray(halves.transpose(0, 2, 1))
        self.put(target, turned.reshape(-1).view(np.uint32), mask)

    def _do_mma(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        self._whole_warps(mask, instruction)
        kinds = instruction.parts[5:]
        if instruction.parts[:5] == ("sync", "aligned", "m16n8k32", "row", "col") and kinds in _BYTES:
            self._multiply_bytes(instruction, mask, _BYTES[kinds])
            return
        if instruction.parts[:5] != ("sync", "aligned", "m16n8k16", "row", "col") or kinds not in _HALVES:
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        out, a, b, c = (_members(item) for item in instruction.operands)
        a_WRK, b_WKN, c_WRN = (np.empty((self.size // 32, *shape)) for shape in ((16, 16), (16, 8), (16, 8)))
        for place, item in enumerate(a):
            rows, columns = slice(place % 2 * 8, place % 2 * 8 + 8), slice(place // 2 * 8, place // 2 * 8 + 8)
            a_WRK[:, rows, columns] = self._halves(item, _HALVES[kinds]).reshape(-1, 8, 8)
        for place, item in enumerate(b):
            b_WKN[:, place * 8 : place * 8 + 8] = (
                self._halves(item, _HALVES[kinds]).reshape(-1, 8, 8).transpose(0, 2, 1)
            )
        for place, item in enumerate(c):
            numbers = np.broadcast_to(self.get(item, "f32"), self.size).reshape(-1, 8, 4)
            c_WRN[:, place // 2 * 8 : place // 2 * 8 + 8, place % 2 :: 2] = numbers
        active = mask.reshape(-1, 32)[:, 0]
        d_WRN = np.zeros(c_WRN.shape, np.float32)
        d_WRN[active] = _product(a_WRK[active], b_WKN[active], c_WRN[active])
        for place, item in enumerate(out):
            part = d_WRN[:, place // 2 * 8 : place // 2 * 8 + 8, place % 2 :: 2]
            self.put(item, np.ascontiguousarray(part).reshape(-1), mask)

    def _multiply_bytes(self, instruction: Instruction, mask: Array, kind: type) -> None:
        out, a, b, c = (_members(item) for item in instruction.operands)
        a_WRK, b_WNK = np.empty((self.size // 32, 16, 32), np.int64), np.empty((self.size // 32, 8, 32), np.int64)
        for place, item in enumerate(a):
            rows, columns = place % 2 * 8, place // 2 * 16
            a_WRK[:, rows : rows + 8, columns : columns + 16] = self._of_bytes(item, np.int8)
        for place, item in enumerate(b):
            b_WNK[:, :, place * 16 : place * 16 + 16] = self._of_bytes(item, kind)
        d_WRN = (a_WRK @ b_WNK.transpose(0, 2, 1)).astype(np.int32)
        for place, (target, start) in enumerate(zip(out, c, strict=True)):
            part = d_WRN[:, place // 2 * 8 : place // 2 * 8 + 8, place % 2 :: 2]
            self.put(target, np.ascontiguousarray(part).reshape(-1) + self.get(start, "s32"), mask)

    def _of_bytes(self, operand: str, kind: type) -> Array:
        words = np.ascontiguousarray(np.broadcast_to(self.get(operand, "b32"), self.size))
        return words.view(kind).reshape(-1, 8, 16)

    def _halves(self, operand: str, kind: str) -> Array:
        words = np.ascontiguousarray(np.broadcast_to(self.get(operand, "b32"), self.size))
        if kind == "f16":
            return words.view(np.float16).astype(np.float64)
        return (words.view(np.uint16).astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)

    def _do_ldmatrix(self, instruction: Instruction, mask: Array, _kinds: list[str]) -> None:
        self._whole_warps(mask, instruction)
        turned = "trans" in instruction.parts
        if instruction.parts != ("sync", "aligned", "m8n8", "x4", *(("trans",) if turned else ()), "shared", "b16"):
            raise Wrong(f"an instruction that is not known: {instruction.text}")
        targets, place = _members(instruction.operands[0]), instruction.operands[1]
        rows = np.zeros((self.size, 16), np.uint8)
        rows[mask] = self._read_shared(self._address(place, "u32"), 16, mask)
        # Eight lanes in turn have the rows of one matrix.
        matrices = rows.view(np.uint16).reshape(-1, 4, 8, 8)
        matrices = matrices.transpose(0, 1, 3, 2) if turned else matrices
        for index, target in enumerate(targets):
            self.put(target, np.ascontiguousarray(matrices[:, index]).reshape(-1).view(np.uint32), mask)

    def _do_ld(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        targets, place = _members(instruction.operands[0]), instruction.operands[1]
        if instruction.parts[0] == "param":
            self.put(targets[0], self.given[place.strip("[]")], mask)
            return
        self._known(instruction, {"nc", "v2", "v4"})
        dtype = np.dtype(_TYPES[kinds[0]])
        read = self.memory.read if instruction.parts[0] == "global" else self._read_shared
        data = read(
            self._address(place, "u64" if instruction.parts[0] == "global" else "u32"),
            dtype.itemsize * len(targets),
            mask,
        ).view(dtype)
        for index, target in enumerate(targets):
            value = np.zeros(self.size, dtype)
            value[mask] = data[:, index]
            self.put(target, value, mask)

    def _do_st(self, instruction: Instruction, mask: Array, kinds: list[str]) -> None:
        place, sources = instruction.operands[0], _members(instruction.operands[1])
        self._known(instruction, {"v2", "v4"})
        values = [np.broadcast_to(self.get(item, kinds[0]), self.size)[mask] for item in sources]
        data = np.stack(values, -1).view(np.uint8)
        write = self.memory.write if instruction.parts[0] == "global" else self._write_shared
        write(self._address(place, "u64" if instruction.parts[0] == "global" else "u32"), data, mask)

    def _known(self, instruction: Instruction, options: set[str]) -> None:
        space, *rest = instruction.parts
        if space not in {"global", "shared"} or not set(rest) <= options | set(_TYPES):
            raise Wrong(f"an instruction that is not known: {instruction.text}")

    def _address(self, operand: str, kind: str) -> Array:
        base, _, offset = operand.strip("[]").partition("+")
        start = np.broadcast_to(self.get(base, kind), self.size).astype(np.int64)
        return start + int(offset or 0)

    def _read_shared(self, address: Array, size: int, mask: Array) -> Array:
        block, at = self._in_shared(address, size, mask)
        thread = np.flatnonzero(mask)[:, None]
        writer, warp = self.writer[block, at], self.warp[mask][:, None]
        if (writer < 0).any():
            raise Wrong("shared memory is read that nobody wrote")
        if self.arriving[block, at].any():
            raise Wrong("shared memory is read before what is copied there has arrived")
        other = writer // 32 != warp
        if (other & (self.epoch[block, at] == self.barriers[block])).any():
            raise Wrong("shared memory is read that another warp wrote since the last barrier")
        if (~other & (writer != thread) & (self.meeting[block, at] == self.meetings[warp])).any():
            raise Wrong("shared memory is read that another thread wrote since its warp has met")
        block, warp, thread = (np.broadcast_to(item, at.shape) for item in (block, warp, thread))
        self._seen(self.readers, self.read, self.barriers[block], warp, (block, at))
        self._seen(self.lanes, self.met, self.meetings[warp], thread, (block, at))
        return self.shared[block, at].view(np.uint8)

    @staticmethod
    def _seen(ends: Array, since: Array, now: Array, who: Array, place: tuple[Array, Array]) -> None:
        """Keep the first and the last who read a place since they have met."""
        block, at = place
        anew = since[block, at] != now
        ends[:, block[anew], at[anew]] = who[anew]
        since[block, at] = now
        # Threads are in order, and of a place that many read the last one stays.
        ends[0][block[::-1], at[::-1]] = np.minimum(ends[0][block, at], who)[::-1]
        ends[1][block, at] = np.maximum(ends[1][block, at], who)

    def _write_shared(self, address: Array, data: Array, mask: Array) -> None:
        block, at = self._in_shared(address, data.shape[1], mask)
        self._mark(block, at, mask)
        self.shared[block, at] = np.ascontiguousarray(data).view(np.uint16)

    def _mark(self, block: Array, at: Array, mask: Array) -> None:
        """See that places may be written, and by whom they are."""
        thread, warp = np.flatnonzero(mask)[:, None], self.warp[mask][:, None]
        others = (self.readers[:, block, at] != warp).any(0)
        if (others & (self.read[block, at] == self.barriers[block])).any():
            raise Wrong("shared memory is written that another warp read since the last barrier")
        others = (self.lanes[:, block, at] != thread).any(0) & (self.lanes[0][block, at] // 32 == warp)
        if (others & (self.met[block, at] == self.meetings[warp])).any():
            raise Wrong("shared memory is written that another thread read since its warp has met")
        if self.arriving[block, at].any():
            raise Wrong("shared memory is written before what is copied there has arrived")
        self._written(block, at, mask)

    def _written(self, block: Array, at: Array, mask: Array) -> None:
        self.writer[block, at] = np.flatnonzero(mask)[:, None]
        self.epoch[block, at] = self.barriers[block]
        self.meeting[block, at] = self.meetings[self.warp[mask]][:, None]

    def _in_shared(self, address: Array, size: int, mask: Array) -> tuple[Array, Array]:
        at = address[mask][:, None] // 2 + np.arange(size // 2)
        if size < 2 or (address[mask] % size).any() or (at < 0).any() or (at >= self.shared.shape[1]).any():
            raise Wrong("an address outside of shared memory, or not aligned")
        return self.block[mask][:, None], at


class Memory:
    """The tensors of a launch, at their own addresses."""

    def __init__(self, tensors: list[torch.Tensor]) -> None:
        """See their bytes, from the first to the last that belongs to a number."""
        spans: dict[int, Array] = {}
        for tensor in tensors:
            if tensor.numel():
                last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
                flat = tensor.as_strided((last + 1,), (1,)).view(torch.uint8).numpy()
                if tensor.data_ptr() not in spans or len(spans[tensor.data_ptr()]) < len(flat):
                    spans[tensor.data_ptr()] = flat
        self._starts = np.array(sorted(spans), np.int64)
        self._bytes = [spans[int(start)] for start in self._starts]

    def read(self, address: Array, size: int, mask: Array) -> Array:
        """Return bytes [threads of the mask, size]."""
        out = np.empty((int(mask.sum()), size), np.uint8)
        for chosen, flat, at in self._found(address[mask], size):
            out[chosen] = flat[at]
        return out

    def write(self, address: Array, data: Array, mask: Array) -> None:
        """Write bytes [threads of the mask, size]."""
        for chosen, flat, at in self._found(address[mask], data.shape[1]):
            flat[at] = data[chosen]

    def _found(self, address: Array, size: int) -> list[tuple[Array, Array, Array]]:
        if (address % size).any():
            raise Wrong(f"addresses that are no multiples of {size}")
        # Fields of a layer end where its tensor ends: an address belongs to the last that starts before it.
        owner = np.searchsorted(self._starts, address, "right") - 1
        found: list[tuple[Array, Array, Array]] = []
        for index in np.unique(owner):
            chosen = owner == index
            at = (address[chosen] - self._starts[index])[:, None] + np.arange(size)
            if index < 0 or at.max() >= len(self._bytes[index]):
                raise Wrong("an address outside of every tensor")
            found.append((chosen, self._bytes[index], at))
        return found


def _members(operand: str) -> list[str]:
    return [part.strip() for part in operand.strip("{}").split(",")]


def _product(a_WRK: Array, b_WKN: Array, c_WRN: Array) -> Array:
    terms = np.concatenate((a_WRK[:, :, None, :] * b_WKN.transpose(0, 2, 1)[:, None], c_WRN[..., None]), -1)
    exponent = np.frexp(np.abs(terms).max(-1))[1]
    unit = np.ldexp(1.0, exponent - 24)[..., None]
    total = np.trunc(terms / unit).sum(-1) * unit[..., 0]
    near = total.astype(np.float32)
    # Toward zero.
    return np.where(np.abs(near.astype(np.float64)) > np.abs(total), np.nextafter(near, np.float32(0)), near)


def _permuted(a: Array, b: Array, selectors: Array) -> Array:
    table = np.broadcast_arrays(a, b, selectors)
    both = table[0].astype(np.uint64) | table[1].astype(np.uint64) << np.uint64(32)
    out = np.zeros(both.shape, np.uint32)
    for place in range(4):
        nibble = table[2] >> np.uint32(4 * place) & np.uint32(15)
        byte = (both >> (nibble & np.uint32(7)).astype(np.uint64) * np.uint64(8)).astype(np.uint32) & np.uint32(0xFF)
        byte = np.where(nibble & np.uint32(8), np.where(byte & np.uint32(0x80), np.uint32(0xFF), np.uint32(0)), byte)
        out |= byte << np.uint32(8 * place)
    return out


def _logic(a: Array, b: Array, c: Array, table: Array) -> Array:
    number = int(table)
    out = np.zeros(np.broadcast(a, b, c).shape, np.uint32)
    for row in range(8):
        if number >> row & 1:
            out |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return out


def _inserted(a: Array, b: Array, start: Array, length: Array) -> Array:
    mask = np.uint32(((1 << int(length)) - 1) << int(start) & 0xFFFFFFFF)
    return a << start & mask | b & ~mask


def _fused_halves(*words: Array) -> Array:
    a, b, c = (
        np.ascontiguousarray(word).reshape(-1).view(np.float16).reshape(-1, 2).astype(np.float64) for word in words
    )
    # Products of halves are exact in float64, and so are sums of numbers of such sizes.
    return np.ascontiguousarray((a * b + c).astype(np.float16)).view(np.uint32)[:, 0]


def _flushed(function: Callable[[Array], Array]) -> Callable[[Array], Array]:
    tiny = np.finfo(np.float32).tiny

    def run(x: Array) -> Array:
        zero = np.float32(0)
        out = function(np.where(np.abs(x) < tiny, zero, x)).astype(np.float32)
        return np.where(np.abs(out) < tiny, zero, out)

    return run


def _divided(a: Array, b: Array) -> Array:
    """Toward zero; what threads that do not take part hold may be anything, 0 included."""
    a64, b64 = a.astype(np.int64), b.astype(np.int64)
    size = np.abs(a64) // np.maximum(np.abs(b64), 1)
    return np.where((a64 < 0) == (b64 < 0), size, -size).astype(a.dtype)


_COMPARE: Final[dict[str, Callable[[Array, Array], Array]]] = {
    "lt": np.less, "le": np.less_equal, "gt": np.greater, "ge": np.greater_equal, "eq": np.equal, "ne": np.not_equal,
}  # fmt: skip
_PLAIN: Final[dict[str, Callable[..., Array]]] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "not": np.invert,
    "abs": np.abs,
    "neg": np.negative,
    "min": np.fmin,
    "max": np.fmax,
    "div": _divided,
    "div.rn": np.divide,
    "rem": lambda a, b: a - _divided(a, b) * b,
    "prmt": _permuted,
    "lop3": _logic,
    "bfi": _inserted,
    "fma.rn": lambda a, b, c: (
        _fused_halves(*np.broadcast_arrays(a, b, c))
        if a.dtype == np.uint32
        else (a.astype(np.float64) * b + c).astype(np.float32)
    ),
    "ex2.approx.ftz": _flushed(np.exp2),
    "lg2.approx.ftz": _flushed(np.log2),
    "rcp.approx.ftz": _flushed(np.reciprocal),
}
