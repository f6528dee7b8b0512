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


_ROUNDS: Final = "prmt.b32 {low}, {bytes}, 0x64646464, 0x4240; prmt.b32 {high}, {bytes}, 0x64646464, 0x4341;"
"""From bytes n of two codes in turn to 1024 + n in fp16: 0x64 above a byte."""


def look_up_16(levels: tuple[int, ...]) -> str:
    """Write PTX from four bytes of two codes each to 1152 + level in fp16: four of the low codes, four of the high.

    PRMT picks four of eight bytes by four selectors of three bits, and codes are selectors: two look-ups of half of the
    levels, and one choice between them by the codes' fourth bits.
    """
    words = _words(levels)
    lines = [
        ".reg .b32 s, t, a, b;",
        "and.b32 s, $4, 0x77777777;",
        "shr.u32 t, $4, 1; and.b32 t, t, 0x44444444; or.b32 t, t, 0x32103210;",
    ]
    for low, high in (("$0", "$2"), ("$1", "$3")):
        if low == "$1":
            lines.append("shr.u32 s, s, 16; shr.u32 t, t, 16;")
        lines += [
            f"prmt.b32 a, {words[0]}, {words[1]}, s;",
            f"prmt.b32 b, {words[2]}, {words[3]}, s;",
            "prmt.b32 a, a, b, t;",
            _ROUNDS.format(low=low, high=high, bytes="a"),
        ]
    return "{ " + " ".join(lines) + " }"


def look_up_8(levels: tuple[int, ...]) -> str:
    """Write PTX from the three bytes of eight codes, four times, to 1152 + level in fp16: four of each code.

    Two bits of codes 0, 2, 4, 6 lie in the first byte, of codes 1, 3, 5, 7 in the second, the third bits in the last.
    Two codes at a time are put side by side into each byte, where they select levels.
    """
    words = _words(levels)
    lines = [".reg .b32 l, h, s, t, a;"]
    for first in (0, 1, 4, 5):
        source, shift, bit = f"${16 + first % 2}", first // 4 * 4, first
        lines += [
            # Bits 0-1 and 2-3 of each byte to bits 0-1 and 4-5.
            f"shr.u32 l, {source}, {shift}; and.b32 s, l, 0x03030303;",
            "shl.b32 t, l, 2; and.b32 t, t, 0x30303030; or.b32 s, s, t;",
            # Bits 0 and 2 to bits 2 and 6.
            f"shr.u32 h, $18, {bit}; shl.b32 t, h, 2; and.b32 t, t, 0x04040404; or.b32 s, s, t;",
            "shl.b32 t, h, 4; and.b32 t, t, 0x40404040; or.b32 s, s, t;",
        ]
        for word in (0, 1):
            low, high = f"${2 * first + word}", f"${2 * (first + 2) + word}"
            if word:
                lines.append("shr.u32 s, s, 16;")
            lines += [f"prmt.b32 a, {words[0]}, {words[1]}, s;", _ROUNDS.format(low=low, high=high, bytes="a")]
    return "{ " + " ".join(lines) + " }"


def _words(levels: tuple[int, ...]) -> list[str]:
    """Levels plus 128 as bytes, four to a word."""
    table = bytes(level + 128 for level in levels)
    return [f"0x{int.from_bytes(table[start : start + 4], 'little'):08x}" for start in range(0, len(table), 4)]
