"""Stored rows as numbers, on the device: one function per code.

Codes become operands of matrix products: integers of at most 8 bits or fp8 numbers, which fp16 and float32 hold
exactly. The scale of a row stays outside: it multiplies a score, or a weight. Only block formats, whose scales lie
inside of a row, are multiplied out: exactly where operands are float32, else in units of the row's largest header, so
that a number is off by at most 2^-10 of its block's largest.

ARCH is the compute capability of an NVIDIA GPU (90 for 9.0) whose instructions may be written down, or 0: then
everything is said in Triton, for the interpreter and for other machines.
"""

# Shape suffixes: N rows of a tile, C columns, J places.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_rows(
    data,
    page_G,
    written_GL,
    page_bytes,
    ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ARCH: tl.constexpr,
    VALUES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    """Return the rows [N, C] of some pages in storage order as operands, and a factor [N] that belongs to each row.

    `data` points to one head of the field in page 0. Rows that are not written are neither read nor meaningful, but
    finite. VALUES says that they are averaged, and not only scored; AHEAD, that they are to be read in words, which the
    compiler brings into shared memory ahead of their turn, where it would keep bytes in a register each.
    """
    # Every page starts at a multiple of 16; the compiler finds out the rest, and reads as wide as it may.
    head_G = tl.multiple_of(data + page_G * page_bytes, [16])
    line_L = tl.arange(0, ROW.page_tokens)
    row_GL1 = (head_G[:, None] + (line_L * ROW.code_bytes)[None, :])[:, :, None]
    N: tl.constexpr = written_GL.shape[0] * written_GL.shape[1]
    factor_N = tl.full([N], 1.0, tl.float32)
    if ROW.scaled:
        scales_G = (head_G + ROW.page_tokens * ROW.code_bytes).to(tl.pointer_type(tl.float16))
        scale_GL = tl.load(scales_G[:, None] + line_L[None, :], mask=written_GL, other=0.0)
        factor_N = tl.reshape(scale_GL.to(tl.float32), [N])
    if ROW.blocks > 0:
        values_NC, factor_N = _block_rows(row_GL1, written_GL, ROW, OPERAND, ARCH)
    elif ROW.code == "kv4":
        values_NC = _kv4_rows(row_GL1, written_GL, ROW, OPERAND, ARCH)
    elif ROW.code == "kv3":
        values_NC = _kv3_rows(row_GL1, written_GL, ROW, OPERAND, ARCH)
    elif ROW.plain:
        values_NC = _plain_rows(row_GL1, written_GL, ROW, OPERAND, ARCH, AHEAD)
    else:
        values_NC = _byte_rows(row_GL1, written_GL, ROW, OPERAND, ARCH, VALUES, AHEAD)
    return values_NC, factor_N


@triton.jit
def dims(ROW: tl.constexpr):
    """Return the dim of each column [C], and whether it holds a number."""
    column_C = tl.arange(0, ROW.columns)
    place_C, part_C = column_C // ROW.parts, column_C % ROW.parts
    if ROW.blocks > 0 and ROW.parts == 2:
        dim_C = place_C // 16 * 32 + part_C * 16 + place_C % 16
    else:
        dim_C = part_C * (ROW.dim // ROW.parts) + place_C
    return dim_C, (place_C < ROW.places) & (dim_C < ROW.dim)


@triton.jit
def _load(row_GL1, written_GL, place_J, ROW: tl.constexpr):
    """Load what lies at places of every row, [N, J]; 0 where nothing does."""
    mask = written_GL[:, :, None]
    if ROW.padded:
        mask = mask & (place_J < ROW.places)[None, None, :]
    found = tl.load(row_GL1 + place_J[None, None, :], mask=mask, other=0)
    return tl.reshape(found, [found.shape[0] * found.shape[1], found.shape[2]])


@triton.jit
def _load_words(row_GL1, written_GL, WORDS: tl.constexpr, HELD: tl.constexpr):
    """Load words of four bytes, [N, WORDS]."""
    word_J = tl.arange(0, WORDS)
    mask = written_GL[:, :, None]
    if HELD != WORDS:
        mask = mask & (word_J < HELD)[None, None, :]
    found = tl.load(row_GL1.to(tl.pointer_type(tl.uint32)) + word_J[None, None, :], mask=mask, other=0)
    return tl.reshape(found, [found.shape[0] * found.shape[1], found.shape[2]])


@triton.jit
def _load_bytes(row_GL1, written_GL, ROW: tl.constexpr):
    """Load a byte for every column, in words."""
    word_NJ = _load_words(row_GL1, written_GL, ROW.columns // 4, ROW.dim // 4)
    a, b, c, d = word_NJ, word_NJ >> 8, word_NJ >> 16, word_NJ >> 24
    parts = tl.join(tl.join(a.to(tl.uint8), c.to(tl.uint8)), tl.join(b.to(tl.uint8), d.to(tl.uint8)))
    return tl.reshape(parts, [word_NJ.shape[0], 4 * word_NJ.shape[1]])


@triton.jit
def _halves(words, KIND: tl.constexpr):
    """Take the lower and the upper half of every word as numbers of 16 bits."""
    return words.to(tl.uint16).to(KIND, bitcast=True), (words >> 16).to(tl.uint16).to(KIND, bitcast=True)


@triton.jit
def _plain_rows(row_GL1, written_GL, ROW: tl.constexpr, OPERAND: tl.constexpr, ARCH: tl.constexpr, AHEAD: tl.constexpr):
    column_C = tl.arange(0, ROW.columns)
    if ROW.code == "f32":
        values_NC = _load(row_GL1.to(tl.pointer_type(tl.float32)), written_GL, column_C, ROW).to(OPERAND)
    elif OPERAND == tl.bfloat16 and AHEAD and ARCH >= 90:
        low, high = _halves(_load_words(row_GL1, written_GL, ROW.columns // 2, ROW.dim // 2), tl.bfloat16)
        values_NC = _flat(tl.join(low, high))
    elif OPERAND == tl.bfloat16:
        values_NC = _load(row_GL1.to(tl.pointer_type(tl.bfloat16)), written_GL, column_C, ROW)
    else:
        bits_NC = _load(row_GL1.to(tl.pointer_type(tl.uint16)), written_GL, column_C, ROW)
        values_NC = (bits_NC.to(tl.uint32) << 16).to(tl.float32, bitcast=True).to(OPERAND)
    return values_NC


@triton.jit
def _byte_rows(
    row_GL1,
    written_GL,
    ROW: tl.constexpr,
    OPERAND: tl.constexpr,
    ARCH: tl.constexpr,
    VALUES: tl.constexpr,
    AHEAD: tl.constexpr,
):
    if AHEAD:
        codes_NC = _load_bytes(row_GL1, written_GL, ROW)
    else:
        codes_NC = _load(row_GL1, written_GL, tl.arange(0, ROW.columns), ROW)
    if VALUES:
        # Else the compiler would gather single bytes out of shared memory, where it transposes halves.
        codes_NC = tl.reshape(codes_NC, [codes_NC.shape[0], codes_NC.shape[1] // 2, 2])
    if ROW.code == "int8":
        values_NC = _signed(codes_NC, OPERAND, ARCH)
    elif ROW.code == "fp8_e5m2":
        values_NC = _e5m2(codes_NC, OPERAND, ARCH)
    else:
        values_NC = _e4m3(codes_NC, OPERAND, ARCH)
    if VALUES:
        values_NC = _flat(values_NC)
    return values_NC


@triton.jit
def _e5m2(codes, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    """Read codes as the upper bytes of fp16 numbers."""
    if ARCH > 0:
        halves = tl.inline_asm_elementwise(
            "prmt.b32 $0, $2, 0, 0x1404; prmt.b32 $1, $2, 0, 0x3424;",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        return halves.to(OPERAND)
    return (codes.to(tl.uint16) << 8).to(tl.float16, bitcast=True).to(OPERAND)


@triton.jit
def _e4m3(codes, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    if ARCH >= 89:
        return codes.to(tl.float8e4nv, bitcast=True).to(tl.float16).to(OPERAND)
    # The bits of an fp16 number with its exponent 8 too low; and the one code, of either sign, that is no number.
    wide = codes.to(tl.uint16)
    size = wide & 0x7F
    small = (((wide & 0x80) << 8) | (size << 7)).to(tl.float16, bitcast=True)
    return tl.where(size == 0x7F, float("nan"), small.to(tl.float32) * 256.0).to(OPERAND)


@triton.jit
def _signed(codes, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    """Two's complement bytes: 1024 + 128 + n in fp16, without a conversion."""
    if ARCH > 0 and OPERAND == tl.float16:
        shifted = tl.inline_asm_elementwise(
            "{ .reg .b32 x; xor.b32 x, $2, 0x80808080;"
            " prmt.b32 $0, x, 0x64646464, 0x4140; prmt.b32 $1, x, 0x64646464, 0x4342; }",
            "=r,=r,r",
            [codes],
            dtype=tl.float16,
            is_pure=True,
            pack=4,
        )
        return shifted - 1152.0
    return codes.to(tl.int8, bitcast=True).to(OPERAND)


@triton.jit
def _integers(codes, OFFSET: tl.constexpr, OPERAND: tl.constexpr):
    """Codes below 256 minus an offset."""
    if OPERAND == tl.float16:
        return (codes.to(tl.uint16) | 0x6400).to(tl.float16, bitcast=True) - (1024.0 + OFFSET)
    return codes.to(tl.int32).to(OPERAND) - OFFSET


@triton.jit
def _levels(codes, ROW: tl.constexpr, OPERAND: tl.constexpr):
    """Level of each code, as a sum of the steps that lie below it."""
    level = tl.zeros(codes.shape, tl.int32) + ROW.levels[0]
    for code in tl.static_range(1, len(ROW.levels)):
        level += tl.where(codes >= code, ROW.levels[code] - ROW.levels[code - 1], 0)
    return level.to(OPERAND)


@triton.jit
def _pairs(codes, ROW: tl.constexpr, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    """Levels of the low and of the high four bits of every byte."""
    if ARCH > 0 and OPERAND == tl.float16:
        pairs = tl.inline_asm_elementwise(ROW.look_up, "=r,=r,=r,=r,r", [codes], dtype=tl.uint32, is_pure=True, pack=4)
        return _halves(pairs, tl.float16)
    return _levels(codes & 15, ROW, OPERAND), _levels(codes >> 4, ROW, OPERAND)


@triton.jit
def _flat(parts_NJP):
    """Lay the parts of each place side by side as columns."""
    return tl.reshape(parts_NJP, [parts_NJP.shape[0], parts_NJP.shape[1] * parts_NJP.shape[2]])


@triton.jit
def _kv4_rows(row_GL1, written_GL, ROW: tl.constexpr, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    place_J = tl.arange(0, ROW.columns // 2)
    codes_NJ = _load(row_GL1, written_GL, place_J, ROW)
    low_NJ, high_NJ = _pairs(codes_NJ, ROW, OPERAND, ARCH)
    return _flat(tl.join(low_NJ, high_NJ))


@triton.jit
def _kv3_rows(row_GL1, written_GL, ROW: tl.constexpr, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    EIGHTH: tl.constexpr = ROW.dim // 8
    place_J = tl.arange(0, ROW.columns // 8)
    even_NJ = _load(row_GL1, written_GL, place_J, ROW)
    odd_NJ = _load(row_GL1 + EIGHTH, written_GL, place_J, ROW)
    high_NJ = _load(row_GL1 + 2 * EIGHTH, written_GL, place_J, ROW)
    if ARCH > 0 and OPERAND == tl.float16:
        ab, cd, ef, gh = tl.inline_asm_elementwise(
            ROW.look_up,
            "=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,=r,r,r,r",
            [even_NJ, odd_NJ, high_NJ],
            dtype=(tl.uint32, tl.uint32, tl.uint32, tl.uint32),
            is_pure=True,
            pack=4,
        )
        a, b = _halves(ab, tl.float16)
        c, d = _halves(cd, tl.float16)
        e, f = _halves(ef, tl.float16)
        g, h = _halves(gh, tl.float16)
        return _flat(_eight(a, b, c, d, e, f, g, h))
    codes_NJP = _eight(
        (even_NJ & 3) | ((high_NJ & 1) << 2),
        (odd_NJ & 3) | (((high_NJ >> 1) & 1) << 2),
        ((even_NJ >> 2) & 3) | (((high_NJ >> 2) & 1) << 2),
        ((odd_NJ >> 2) & 3) | (((high_NJ >> 3) & 1) << 2),
        ((even_NJ >> 4) & 3) | (((high_NJ >> 4) & 1) << 2),
        ((odd_NJ >> 4) & 3) | (((high_NJ >> 5) & 1) << 2),
        (even_NJ >> 6) | (((high_NJ >> 6) & 1) << 2),
        (odd_NJ >> 6) | ((high_NJ >> 7) << 2),
    )
    return _levels(_flat(codes_NJP), ROW, OPERAND)


@triton.jit
def _eight(a, b, c, d, e, f, g, h):
    """Eight parts [N, J] as [N, J, 8], in their order."""
    parts = tl.join(tl.join(tl.join(a, e), tl.join(c, g)), tl.join(tl.join(b, f), tl.join(d, h)))
    return tl.reshape(parts, [a.shape[0], a.shape[1], 8])


@triton.jit
def _block_rows(row_GL1, written_GL, ROW: tl.constexpr, OPERAND: tl.constexpr, ARCH: tl.constexpr):
    """Blocks of 32 numbers: header * code, and for two headers + the second."""
    WIDTH: tl.constexpr = 32 // ROW.parts
    place_J = tl.arange(0, ROW.columns // ROW.parts)
    start_J = place_J // WIDTH * ROW.block_bytes
    scale_NJ = _header(row_GL1, written_GL, start_J, place_J, ROW)
    least_NJ = tl.zeros_like(scale_NJ)
    if ROW.header_bytes == 4:
        least_NJ = _header(row_GL1, written_GL, start_J + 2, place_J, ROW)
    factor_N = tl.full([scale_NJ.shape[0]], 1.0, tl.float32)
    if OPERAND != tl.float32:
        largest_N = tl.maximum(tl.max(tl.abs(scale_NJ), 1), tl.max(tl.abs(least_NJ), 1) / 16)
        factor_N = tl.where(largest_N > 0, largest_N, 1.0)
        scale_NJ /= factor_N[:, None]
        least_NJ /= factor_N[:, None]
    scale_NJ, least_NJ = scale_NJ.to(OPERAND), least_NJ.to(OPERAND)
    at_J = start_J + (ROW.block_bytes - WIDTH) + place_J % WIDTH
    codes_NJ = _at(row_GL1, written_GL, at_J, place_J, ROW)
    if ROW.code == "q8_0":
        values_NC = _signed(codes_NJ, OPERAND, ARCH) * scale_NJ
    elif ROW.code == "iq4_nl":
        low_NJ, high_NJ = _pairs(codes_NJ, ROW, OPERAND, ARCH)
        values_NC = _flat(tl.join(low_NJ * scale_NJ, high_NJ * scale_NJ))
    else:
        low_NJ, high_NJ = codes_NJ & 15, codes_NJ >> 4
        if ROW.block_bytes - ROW.header_bytes == 20:
            # The fifth bits of 32 numbers stand before them, those of a place two bytes apart.
            bit_J = start_J + ROW.header_bytes + place_J % 16 // 8
            shift_1J = (place_J % 8).to(tl.uint8)[None, :]
            low_NJ |= ((_at(row_GL1, written_GL, bit_J, place_J, ROW) >> shift_1J) & 1) << 4
            high_NJ |= ((_at(row_GL1, written_GL, bit_J + 2, place_J, ROW) >> shift_1J) & 1) << 4
        OFFSET: tl.constexpr = 0 if ROW.header_bytes == 4 else 8 if ROW.block_bytes == 18 else 16
        low_NJ, high_NJ = _integers(low_NJ, OFFSET, OPERAND), _integers(high_NJ, OFFSET, OPERAND)
        values_NC = _flat(tl.join(low_NJ * scale_NJ + least_NJ, high_NJ * scale_NJ + least_NJ))
    return values_NC, factor_N


@triton.jit
def _header(row_GL1, written_GL, at_J, place_J, ROW: tl.constexpr):
    return _at(row_GL1.to(tl.pointer_type(tl.float16)), written_GL, at_J // 2, place_J, ROW).to(tl.float32)


@triton.jit
def _at(row_GL1, written_GL, at_J, place_J, ROW: tl.constexpr):
    """Load what lies somewhere in every row for each place, [N, J]."""
    mask = written_GL[:, :, None] & (place_J < ROW.places)[None, None, :]
    found = tl.load(row_GL1 + at_J[None, None, :], mask=mask, other=0)
    return tl.reshape(found, [found.shape[0] * found.shape[1], found.shape[2]])
