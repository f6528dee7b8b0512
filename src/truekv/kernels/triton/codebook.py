"""The levels that codes stand for, and how a GPU looks them up: a dozen integers of 8 bits need no memory."""

from __future__ import annotations

from typing import Final

LEVELS: Final = {
    "kv4": (-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104),
    "kv3": (-88, -55, -31, -10, 10, 31, 55, 88),
    "iq4_nl": (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113),
}
"""By code, ascending: those of formats/lm.py and of llama.cpp."""
STEPS: Final = {"kv4": 0.02622245, "kv3": 0.02444652}
"""A level is that much of the root mean square of a row."""


_NUMBERS: Final = (
    "prmt.b32 a, {bytes}, 0x64646464, 0x4140; add.rn.f16x2 {low}, a, m;"
    " prmt.b32 a, {bytes}, 0x64646464, 0x4342; add.rn.f16x2 {high}, a, m;"
)
"""From four bytes n to n - 128 in fp16, two to a word: 0x64 above a byte makes 1024 + n, and m takes 1152 from both."""


def look_up_16(levels: tuple[int, ...]) -> str:
    """Write PTX from four bytes of two codes each to levels in fp16: the low and the high code of a byte in one word.

    PRMT picks four of eight bytes by four selectors of three bits, and codes are selectors: two look-ups of half of the
    levels, and one choice between them by the codes' fourth bits. Of the four words of levels the first and the third
    are operands, because an instruction has room for one constant.
    """
    _, second, _, fourth = words(levels)
    lines = [
        ".reg .b32 s, t, a, b, m, first, third;",
        _kept("first", words(levels)[0]),
        _kept("third", words(levels)[2]),
        "mov.b32 m, 0xe480e480;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 t, $4, 1; and.b32 t, t, 0x44444444; or.b32 t, t, 0x32103210;",
    ]
    for low in (0, 2):
        if low:
            lines.append("shr.u32 s, s, 16; shr.u32 t, t, 16;")
        lines += [
            f"prmt.b32 a, first, {second:#010x}, s;",
            f"prmt.b32 b, third, {fourth:#010x}, s;",
            "prmt.b32 b, a, b, t;",
            _NUMBERS.format(low=f"${low}", high=f"${low + 1}", bytes="b"),
        ]
    return "{ " + " ".join(lines) + " }"


def look_up_8(levels: tuple[int, ...]) -> str:
    """Write PTX from the three bytes of eight codes, four times, to levels in fp16: two codes that follow in one word.

    Two bits of codes 0, 2, 4, 6 lie in the first byte, of codes 1, 3, 5, 7 in the second, the third bits in the last.
    Two codes at a time are put side by side into each byte, where they select levels. The first word of levels is an
    operand, because an instruction has room for one constant.
    """
    _, second = words(levels)
    lines = [".reg .b32 s, t, a, b, m, first;", _kept("first", words(levels)[0]), "mov.b32 m, 0xe480e480;"]
    for pair in range(4):
        # Their lower bits to bits 0-1 and 4-5 of each byte, then the third ones to bits 2 and 6.
        lines += [
            f"{_shifted('s', '$16', -2 * pair)} and.b32 s, s, 0x03030303;",
            f"{_shifted('t', '$17', 4 - 2 * pair)} and.b32 t, t, 0x30303030; or.b32 s, s, t;",
            f"{_shifted('t', '$18', 2 - 2 * pair)} and.b32 t, t, 0x04040404; or.b32 s, s, t;",
            f"{_shifted('t', '$18', 5 - 2 * pair)} and.b32 t, t, 0x40404040; or.b32 s, s, t;",
        ]
        for low in (0, 2):
            if low:
                lines.append("shr.u32 s, s, 16;")
            out = 4 * pair + low
            lines += [
                f"prmt.b32 b, first, {second:#010x}, s;",
                _NUMBERS.format(low=f"${out}", high=f"${out + 1}", bytes="b"),
            ]
    return "{ " + " ".join(lines) + " }"


def words(levels: tuple[int, ...]) -> tuple[int, ...]:
    """Levels plus 128 as bytes, four to a word."""
    table = bytes(level + 128 for level in levels)
    return tuple(int.from_bytes(table[start : start + 4], "little") for start in range(0, len(table), 4))


def _kept(target: str, word: int) -> str:
    """Write PTX that sets a constant which the compiler takes for a number of the thread, and keeps in a register.

    No bit is that of a lane and that of one below. As a constant it would be moved anew before every use.
    """
    return (
        f"mov.u32 {target}, %lanemask_lt; mov.u32 t, %lanemask_eq; and.b32 {target}, {target}, t; "
        f"or.b32 {target}, {target}, {word:#010x};"
    )


def _shifted(target: str, source: str, left: int) -> str:
    """Write PTX that shifts left, or right by a number below zero."""
    return f"shl.b32 {target}, {source}, {left};" if left >= 0 else f"shr.u32 {target}, {source}, {-left};"
