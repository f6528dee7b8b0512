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


def look_up(levels: tuple[int, ...]) -> str:
    """Write PTX from four bytes of two codes each to 1152 + level in fp16: four of the low codes, four of the high.

    PRMT picks four of eight bytes by four selectors of three bits, and codes are selectors. Two look-ups of half of 16
    levels and one choice between them make four bytes; 0x64 above a byte n makes the fp16 number 1024 + n.
    """
    table = bytes(level + 128 for level in levels)
    words = [f"0x{int.from_bytes(table[start : start + 4], 'little'):08x}" for start in range(0, len(levels), 4)]
    lines = [".reg .b32 s, t, a, b;", "and.b32 s, $4, 0x77777777;"]
    if len(levels) == 16:
        lines += ["shr.u32 t, $4, 1;", "and.b32 t, t, 0x44444444;", "or.b32 t, t, 0x32103210;"]
    for first, low, high in ((True, "$0", "$2"), (False, "$1", "$3")):
        if not first:
            lines.append("shr.u32 s, s, 16;")
        lines.append(f"prmt.b32 a, {words[0]}, {words[1]}, s;")
        if len(levels) == 16:
            if not first:
                lines.append("shr.u32 t, t, 16;")
            lines += [f"prmt.b32 b, {words[2]}, {words[3]}, s;", "prmt.b32 a, a, b, t;"]
        lines += [f"prmt.b32 {low}, a, 0x64646464, 0x4240;", f"prmt.b32 {high}, a, 0x64646464, 0x4341;"]
    return "{ " + " ".join(lines) + " }"
