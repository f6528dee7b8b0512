"""The look-ups written in PTX, which no interpreter runs, executed instruction by instruction."""

from __future__ import annotations

import inspect
import re
import struct
from typing import Any

import pytest

from truekv.kernels.triton import codes
from truekv.kernels.triton.codebook import LEVELS, look_up_8, look_up_16

MASK = 0xFFFFFFFF


def prmt(a: int, b: int, selector: int) -> int:
    """PTX ISA, prmt.b32 in its default mode: byte n is the byte of {b, a} that nibble n names, or its sign."""
    source = struct.pack("<II", a, b)
    chosen = bytearray()
    for place in range(4):
        nibble = selector >> (4 * place) & 15
        byte = source[nibble & 7]
        chosen.append((0xFF if byte & 0x80 else 0) if nibble & 8 else byte)
    return int.from_bytes(chosen, "little")


def add(a: int, b: int) -> int:
    """add.rn.f16x2, of numbers whose sums fp16 holds."""
    sums = [x + y for x, y in zip(halves([a]), halves([b]), strict=True)]
    packed = struct.pack("<2e", *sums)
    assert list(struct.unpack("<2e", packed)) == sums
    return int.from_bytes(packed, "little")


RUN = {
    "mov.b32": lambda a: a,
    "mov.u32": lambda a: a,
    "add.rn.f16x2": add,
    "prmt.b32": prmt,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "shl.b32": lambda a, b: a << b & MASK,
    "shr.u32": lambda a, b: a >> b,
}


def execute(text: str, outputs: int, *inputs: int, lane: int = 0) -> list[int]:
    """Run a block of PTX in one lane of a warp: `$0` ... are its outputs, then its inputs."""
    registers = {f"${outputs + index}": value for index, value in enumerate(inputs)}
    registers |= {"%lanemask_eq": 1 << lane, "%lanemask_lt": (1 << lane) - 1}
    for line in text.strip("{} ").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = (operand.strip() for operand in operands.split(","))
        values = [registers[one] if one in registers else int(one, 0) for one in sources]
        registers[target] = RUN[name](*values)
    return [registers[f"${index}"] for index in range(outputs)]


def halves(words: list[int]) -> list[float]:
    return [number for word in words for number in struct.unpack("<2e", struct.pack("<I", word))]


def word(four: list[int]) -> int:
    return int.from_bytes(bytes(four), "little")


def fours() -> list[list[int]]:
    """Every byte in every place, beside others."""
    return [[(start + place * 67) % 256 for place in range(4)] for start in range(256)]


@pytest.mark.parametrize("code", [code for code, levels in LEVELS.items() if len(levels) == 16])
def test_two_codes_of_a_byte_become_their_levels(code: str) -> None:
    levels = LEVELS[code]
    for lane, four in enumerate(fours()):
        found = halves(execute(look_up_16(levels), 4, word(four), lane=lane % 32))
        assert found == [levels[code] for byte in four for code in (byte & 15, byte >> 4)]


def test_eight_codes_of_three_bytes_become_their_levels() -> None:
    levels = LEVELS["kv3"]
    for index, even in enumerate(fours()):
        odd, high = fours()[(index * 5 + 3) % 256], fours()[(index * 11 + 7) % 256]
        found = halves(execute(look_up_8(levels), 16, word(even), word(odd), word(high), lane=index % 32))
        for place in range(8):
            low = odd if place % 2 else even
            expected = [levels[(low[j] >> (place // 2 * 2) & 3) | ((high[j] >> place & 1) << 2)] for j in range(4)]
            # Two codes to a word, four words to a pair of codes.
            assert found[8 * (place // 2) + place % 2 : 8 * (place // 2) + 8 : 2] == expected


def written_in(kernel: Any) -> str:
    """The assembly between quotes in a kernel's source."""
    (found,) = re.findall(r'inline_asm_elementwise\(\s*((?:"[^"]*"\s*)+),', inspect.getsource(kernel.fn))
    return "".join(re.findall(r'"([^"]*)"', found))


def test_bytes_become_the_upper_half_of_fp16_numbers() -> None:
    text = written_in(codes._e5m2)
    for four in fours():
        raw = struct.pack("<2I", *execute(text, 2, word(four)))
        assert raw == b"".join(bytes([0, byte]) for byte in four)


def test_signed_bytes_become_numbers() -> None:
    text = written_in(codes._signed)
    for four in fours():
        signed = struct.unpack("4b", bytes(four))
        assert halves(execute(text, 2, word(four))) == [1152 + number for number in signed]
