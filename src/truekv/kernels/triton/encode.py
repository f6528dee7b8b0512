"""New rows into their frame, into codes and to their lines, in one launch. Bytes equal those of truekv/formats.

Every step is the reference's, in its order: float32 products, quotients and roots rounded one by one, and sums of
float64 numbers on a grid where no order of addition changes them. Few numbers pass through here, so this is written
to be read.
"""

# Shape suffixes: R rows of a tile (one token and head each), D dims, C columns in storage order, J places, P parts,
# B blocks, I numbers of a block.

from __future__ import annotations

import triton
import triton.language as tl

from truekv.kernels.triton.codes import dims

HALF_MAX = tl.constexpr(65504.0)


@triton.jit(do_not_specialize=["tokens"], do_not_specialize_on_alignment=["page", "line"])
def store_kernel(
    data,
    rows,  # [T, K, D] with these strides
    centre,  # float32 [K, D], or None
    scale,  # float32 [K, D], or None
    rotation,  # int8 [D, C], or None; see layout.rotation
    page_bytes,
    token_stride,
    head_stride,
    data2,  # another field, or None
    rows2,
    centre2,
    scale2,
    rotation2,
    page_bytes2,
    token_stride2,
    head_stride2,
    page,
    line,  # a line below zero: nothing is stored
    broken,  # out: int32 [1] counts the rows that are not finite; None where nobody asks
    tokens,
    ROW: tl.constexpr,
    ROW2: tl.constexpr,
    HEADS: tl.constexpr,
    HEADS2: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store rows of one field or two; one that is not finite is stored as NaN, all bits set.

    Grid: (tiles of the one field's rows, and then of the other's).
    """
    tile = tl.program_id(0)
    tiles = tl.cdiv(tokens * HEADS, BLOCK_R)
    if tile < tiles:
        _store(
            *(tile, data, rows, centre, scale, rotation, page_bytes, token_stride, head_stride),
            *(page, line, broken, tokens * HEADS, ROW, HEADS, BLOCK_R),
        )
    elif data2 is not None:
        _store(
            *(tile - tiles, data2, rows2, centre2, scale2, rotation2, page_bytes2, token_stride2, head_stride2),
            *(page, line, broken, tokens * HEADS2, ROW2, HEADS2, BLOCK_R),
        )


@triton.jit
def _store(
    tile,
    data,
    rows,
    centre,
    scale,
    rotation,
    page_bytes,
    token_stride,
    head_stride,
    page,
    line,
    broken,
    number,
    ROW: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    """Store a tile of one field's rows."""
    row_R = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside_R = row_R < number
    token_R, head_R = (row_R // HEADS).to(tl.int64), (row_R % HEADS).to(tl.int64)
    line_R = tl.load(line + token_R, mask=inside_R, other=-1)
    kept_R = line_R >= 0
    start_R = token_R * token_stride + head_R * head_stride
    if rotation is None:
        dim_C, holds_C = dims(ROW)
        x_RC = _framed(rows, centre, scale, start_R, head_R, kept_R, dim_C, holds_C, ROW)
    else:
        x_RC = _rotated(rows, centre, scale, rotation, start_R, head_R, kept_R, ROW)
    wrong_R = tl.sum((tl.abs(x_RC) < float("inf")).to(tl.int32), 1) < ROW.columns
    if broken is not None:
        tl.atomic_add(broken, tl.sum(wrong_R.to(tl.int32), 0))
    x_RC = tl.where(wrong_R[:, None], 0.0, x_RC)
    head_of_R = data + tl.load(page + token_R, mask=kept_R, other=0) * page_bytes + head_R * ROW.head_bytes
    code_R = head_of_R + line_R * ROW.code_bytes
    if ROW.code == "f32":
        _put(code_R.to(tl.pointer_type(tl.uint32)), x_RC.to(tl.uint32, bitcast=True), 0xFFFFFFFF, wrong_R, kept_R, ROW)
    elif ROW.code == "bf16":
        _put(code_R.to(tl.pointer_type(tl.uint16)), _bf16(x_RC), 0xFFFF, wrong_R, kept_R, ROW)
    elif ROW.code == "fp8_e4m3":
        _put(code_R, _fp8(_clamp(x_RC, 448.0), 3, 7), 0xFF, wrong_R, kept_R, ROW)
    elif ROW.code == "fp8_e5m2":
        _put(code_R, _fp8(_clamp(x_RC, 57344.0), 2, 15), 0xFF, wrong_R, kept_R, ROW)
    elif ROW.blocks > 0:
        _store_blocks(code_R, x_RC, wrong_R, kept_R, ROW)
    else:
        scale_R = (head_of_R + ROW.page_tokens * ROW.code_bytes).to(tl.pointer_type(tl.uint16)) + line_R
        if ROW.code == "kv4":
            code_RC, bits_R = _lloyd_max(x_RC, ROW)
            _put_kv4(code_R, code_RC, wrong_R, kept_R, ROW)
        elif ROW.code == "kv3":
            code_RC, bits_R = _lloyd_max(x_RC, ROW)
            _put_kv3(code_R, code_RC, wrong_R, kept_R, ROW)
        else:
            code_RC, bits_R = _scaled(x_RC, ROW)
            _put(code_R, code_RC, 0xFF, wrong_R, kept_R, ROW)
        tl.store(scale_R, tl.where(wrong_R, 0xFFFF, bits_R.to(tl.int32)).to(tl.uint16), mask=kept_R)


@triton.jit
def _framed(rows, centre, scale, start_R, head_R, kept_R, dim_C, holds_C, ROW: tl.constexpr):
    """Return some columns (x - centre) / scale of the rows; 0 where nothing is held."""
    held_RC = kept_R[:, None] & holds_C[None, :]
    x_RC = tl.load(rows + start_R[:, None] + dim_C[None, :], mask=held_RC, other=0.0).to(tl.float32)
    frame_RC = head_R[:, None] * ROW.dim + dim_C[None, :]
    if centre is not None:
        x_RC = x_RC - tl.load(centre + frame_RC, mask=held_RC, other=0.0)
    if scale is not None:
        x_RC = tl.div_rn(x_RC, tl.load(scale + frame_RC, mask=held_RC, other=1.0))
    return x_RC


@triton.jit
def _rotated(rows, centre, scale, rotation, start_R, head_R, kept_R, ROW: tl.constexpr):
    """H x of the rows, in storage order: exact before its last rounding."""
    WIDTH: tl.constexpr = 16
    column_C = tl.arange(0, ROW.columns)
    largest_R = tl.zeros(kept_R.shape, tl.float32)
    for dim in range(0, ROW.dim, WIDTH):
        dim_D = dim + tl.arange(0, WIDTH)
        x_RD = _framed(rows, centre, scale, start_R, head_R, kept_R, dim_D, dim_D < ROW.dim, ROW)
        # A row that is not finite must not lose that in a maximum.
        largest_R = tl.maximum(largest_R, tl.max(tl.where(tl.abs(x_RD) < float("inf"), tl.abs(x_RD), float("inf")), 1))
    shift_R = largest_R.to(tl.float64) * 4096.0
    sum_RC = tl.zeros([kept_R.shape[0], column_C.shape[0]], tl.float64)
    for dim in range(0, ROW.dim, WIDTH):
        dim_D = dim + tl.arange(0, WIDTH)
        x_RD = _framed(rows, centre, scale, start_R, head_R, kept_R, dim_D, dim_D < ROW.dim, ROW)
        grid_RD = (x_RD.to(tl.float64) + shift_R[:, None]) - shift_R[:, None]
        signs_DC = tl.load(rotation + dim_D[:, None] * ROW.columns + column_C[None, :]).to(tl.float64)
        sum_RC += tl.sum(grid_RD[:, :, None] * signs_DC[None, :, :], 1)
    # A sum of zeros is +0.
    return ((sum_RC + 0.0) * tl.full([1, 1], ROW.unit, tl.float64)).to(tl.float32)


@triton.jit
def _put(code_R, codes_RC, MISSING: tl.constexpr, wrong_R, kept_R, ROW: tl.constexpr):
    """Store one code per column, in order."""
    column_C = tl.arange(0, ROW.columns)
    codes_RC = tl.where(wrong_R[:, None], MISSING, codes_RC.to(tl.uint32)).to(code_R.dtype.element_ty)
    tl.store(code_R[:, None] + column_C[None, :], codes_RC, mask=kept_R[:, None] & (column_C < ROW.dim)[None, :])


@triton.jit
def _clamp(x, TOP: tl.constexpr):
    return tl.minimum(tl.maximum(x, -TOP), TOP)


@triton.jit
def _bf16(x):
    """Bits of the nearest bfloat16, ties to even; numbers beyond its largest saturate."""
    bits = _clamp(x, 3.3895313892515355e38).to(tl.uint32, bitcast=True)
    return (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16


@triton.jit
def _fp8(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr):
    """Bits of the nearest fp8 number, ties to even, of numbers within its range."""
    CUT: tl.constexpr = 23 - MANTISSA
    STEP: tl.constexpr = (128 - BIAS + CUT) << 23
    bits = x.to(tl.int32, bitcast=True)
    sign, size = (bits >> 24) & 0x80, bits & 0x7FFFFFFF
    normal = (size - ((127 - BIAS) << 23) + ((1 << (CUT - 1)) - 1) + ((size >> CUT) & 1)) >> CUT
    # Below the smallest normal number: a number whose last bit is one subnormal step leaves the code in its low bits.
    magic = tl.full(x.shape, STEP, tl.int32).to(tl.float32, bitcast=True)
    small = (size.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - STEP
    return sign | tl.where(size >= ((128 - BIAS) << 23), normal, small)


@triton.jit
def _half_bits(x):
    """Bits of the nearest fp16 number; those beyond its range saturate."""
    return _clamp(x, HALF_MAX).to(tl.float16).to(tl.uint16, bitcast=True)


@triton.jit
def _scaled(x_RC, ROW: tl.constexpr):
    """int8 or fp8 codes of x / scale, and the scale, which puts the largest number on the largest code."""
    TOP: tl.constexpr = 127.0 if ROW.code == "int8" else 448.0
    ratio_R = tl.div_rn(tl.max(tl.abs(x_RC), 1), TOP)
    near_R = _half_bits(ratio_R).to(tl.int32)
    # Down, to the fp16 number at or below.
    bits_R = tl.where(near_R.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) > ratio_R, near_R - 1, near_R)
    step_R = bits_R.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    step_RC = tl.where(step_R > 0, step_R, 1.0)[:, None]
    code_RC = _clamp(tl.where(step_R[:, None] > 0, tl.div_rn(x_RC, tl.broadcast_to(step_RC, x_RC.shape)), 0.0), TOP)
    if ROW.code == "int8":
        # To the nearest integer, ties to even: adding 1.5 * 2^23 leaves float32 no other bits.
        return ((code_RC + 12582912.0) - 12582912.0).to(tl.int32) & 0xFF, bits_R
    return _fp8(code_RC, 3, 7), bits_R


@triton.jit
def _exact_sum(x, AXIS: tl.constexpr):
    """Sum on the grid of the largest term, where no order of addition changes it."""
    shift = tl.expand_dims(tl.max(tl.abs(x), AXIS).to(tl.float64) * 4096.0, AXIS)
    return tl.sum((x.to(tl.float64) + shift) - shift, AXIS).to(tl.float32)


@triton.jit
def _lloyd_max(x_RC, ROW: tl.constexpr):
    """Codes of the normalised row, and the scale that gives the decoded row the norm of the row."""
    _, holds_C = dims(ROW)
    largest_R = tl.max(tl.abs(x_RC), 1)
    by_R = tl.where(largest_R > 0, largest_R, 1.0)
    unit_RC = tl.div_rn(x_RC, tl.broadcast_to(by_R[:, None], x_RC.shape))
    norm_R = tl.sqrt_rn(_exact_sum(unit_RC * unit_RC, 1))
    inverse_R = tl.div_rn(tl.full(norm_R.shape, 1.0, tl.float32), tl.maximum(norm_R, 1.0))
    value_RC = unit_RC * (inverse_R * tl.full(norm_R.shape, ROW.gain, tl.float32))[:, None]
    code_RC = tl.zeros(x_RC.shape, tl.int32)
    level_RC = tl.zeros(x_RC.shape, tl.int32) + ROW.levels[0]
    for code in tl.static_range(1, len(ROW.levels)):
        above_RC = value_RC > (ROW.levels[code - 1] + ROW.levels[code]) / 2
        code_RC += above_RC.to(tl.int32)
        level_RC += tl.where(above_RC, ROW.levels[code] - ROW.levels[code - 1], 0)
    level_RC = tl.where(holds_C[None, :], level_RC, 0)
    levels_R = tl.sqrt_rn(tl.sum(level_RC * level_RC, 1).to(tl.float32))
    return code_RC, _half_bits(largest_R * tl.div_rn(norm_R, levels_R))


@triton.jit
def _put_kv4(code_R, code_RC, wrong_R, kept_R, ROW: tl.constexpr):
    place_J = tl.arange(0, ROW.columns // 2)
    code_RJP = tl.reshape(code_RC, [code_RC.shape[0], code_RC.shape[1] // 2, 2])
    byte_RJ = tl.sum(code_RJP << (4 * tl.arange(0, 2))[None, None, :], 2)
    byte_RJ = tl.where(wrong_R[:, None], 0xFF, byte_RJ)
    tl.store(
        code_R[:, None] + place_J[None, :],
        byte_RJ.to(tl.uint8),
        mask=kept_R[:, None] & (place_J < ROW.places)[None, :],
    )


@triton.jit
def _put_kv3(code_R, code_RC, wrong_R, kept_R, ROW: tl.constexpr):
    EIGHTH: tl.constexpr = ROW.dim // 8
    place_J = tl.arange(0, ROW.columns // 8)
    mask_RJ = kept_R[:, None] & (place_J < ROW.places)[None, :]
    part_P = tl.arange(0, 8)
    code_RJP = tl.reshape(code_RC, [code_RC.shape[0], code_RC.shape[1] // 8, 8])
    # Two bits of even parts in one byte, of odd parts in another; the third bits of all eight in a third.
    two_RJP = (code_RJP & 3) << (part_P // 2 * 2)[None, None, :]
    even_RJ = tl.sum(tl.where((part_P % 2 == 0)[None, None, :], two_RJP, 0), 2)
    odd_RJ = tl.sum(tl.where((part_P % 2 == 1)[None, None, :], two_RJP, 0), 2)
    high_RJ = tl.sum((code_RJP >> 2) << part_P[None, None, :], 2)
    at_RJ = code_R[:, None] + place_J[None, :]
    tl.store(at_RJ, tl.where(wrong_R[:, None], 0xFF, even_RJ).to(tl.uint8), mask=mask_RJ)
    tl.store(at_RJ + EIGHTH, tl.where(wrong_R[:, None], 0xFF, odd_RJ).to(tl.uint8), mask=mask_RJ)
    tl.store(at_RJ + 2 * EIGHTH, tl.where(wrong_R[:, None], 0xFF, high_RJ).to(tl.uint8), mask=mask_RJ)


@triton.jit
def _inverse(x):
    """1 / x, and 0 where x is 0 or too small to have an inverse."""
    found = tl.div_rn(tl.full(x.shape, 1.0, tl.float32), tl.where(x == 0, 1.0, x))
    return tl.where((x == 0) | (tl.abs(found) == float("inf")), 0.0, found)


@triton.jit
def _truncated(x, TOP: tl.constexpr):
    """Codes from 0 to TOP; what is no number (the quotient of infinities) is 0."""
    return tl.where(x >= TOP, TOP, tl.where(x > 0, x, 0.0)).to(tl.int32)


@triton.jit
def _extreme(x_RBI, place_I):
    """Return the number of largest magnitude of each block, with its sign; of equals the first."""
    size_RBI = tl.abs(x_RBI)
    most_RB1 = tl.expand_dims(tl.max(size_RBI, 2), 2)
    first_RB1 = tl.expand_dims(tl.min(tl.where(size_RBI == most_RB1, place_I[None, None, :], 32), 2), 2)
    # As bits, which keep the sign of zero.
    bits_RBI = tl.where(place_I[None, None, :] == first_RB1, x_RBI.to(tl.int32, bitcast=True), 0)
    return tl.sum(bits_RBI, 2).to(tl.float32, bitcast=True)


@triton.jit
def _store_blocks(code_R, x_RC, wrong_R, kept_R, ROW: tl.constexpr):
    """Blocks of 32 numbers: headers, high bits, codes."""
    BLOCKS: tl.constexpr = ROW.columns // 32
    number_I = tl.arange(0, 32)
    # Storage order inside of a block: place and part. Its own order: part and place.
    place_I = number_I if ROW.parts == 1 else number_I % 2 * 16 + number_I // 2
    x_RBI = tl.reshape(x_RC, [x_RC.shape[0], BLOCKS, 32])
    block_B = tl.arange(0, BLOCKS)
    held_RB = kept_R[:, None] & (block_B < ROW.blocks)[None, :]
    block_RB = code_R[:, None] + (block_B * ROW.block_bytes)[None, :]
    if ROW.code == "q8_0":
        scale_RB, code_RBI = _q8_0(x_RBI)
        _put_header(block_RB, scale_RB, wrong_R, held_RB)
        code_RBI = tl.where(wrong_R[:, None, None], 0xFF, code_RBI)
        tl.store(block_RB[:, :, None] + 2 + number_I[None, None, :], code_RBI.to(tl.uint8), mask=held_RB[:, :, None])
        return
    if ROW.code == "iq4_nl":
        scale_RB, code_RBI = _table(x_RBI, place_I, ROW)
    elif ROW.header_bytes == 4:
        scale_RB, low_RB, code_RBI = _affine(x_RBI, place_I, 15 if ROW.code == "q4_1" else 31)
        _put_header(block_RB + 2, low_RB, wrong_R, held_RB)
    else:
        scale_RB, code_RBI = _signed(x_RBI, place_I, 8 if ROW.code == "q4_0" else 16)
    _put_header(block_RB, scale_RB, wrong_R, held_RB)
    if ROW.block_bytes - ROW.header_bytes == 20:
        # The fifth bits of all 32 numbers, in two halves of 16.
        bits_RB = tl.sum(((code_RBI >> 4).to(tl.uint32)) << place_I.to(tl.uint32)[None, None, :], 2)
        half_RB = (block_RB + ROW.header_bytes).to(tl.pointer_type(tl.uint16))
        bits_RB = tl.where(wrong_R[:, None], 0xFFFFFFFF, bits_RB.to(tl.int64))
        tl.store(half_RB, (bits_RB & 0xFFFF).to(tl.uint16), mask=held_RB)
        tl.store(half_RB + 1, (bits_RB >> 16).to(tl.uint16), mask=held_RB)
    code_RBJP = tl.reshape(code_RBI & 15, [x_RC.shape[0], BLOCKS, 16, 2])
    byte_RBJ = tl.sum(code_RBJP << (4 * tl.arange(0, 2))[None, None, None, :], 3)
    byte_RBJ = tl.where(wrong_R[:, None, None], 0xFF, byte_RBJ)
    at_RBJ = (block_RB + (ROW.block_bytes - 16))[:, :, None] + tl.arange(0, 16)[None, None, :]
    tl.store(at_RBJ, byte_RBJ.to(tl.uint8), mask=held_RB[:, :, None])


@triton.jit
def _put_header(block_RB, header_RB, wrong_R, held_RB):
    bits_RB = tl.where(wrong_R[:, None], 0xFFFF, _half_bits(header_RB).to(tl.int32))
    tl.store(block_RB.to(tl.pointer_type(tl.uint16)), bits_RB.to(tl.uint16), mask=held_RB)


@triton.jit
def _q8_0(x_RBI):
    """Take steps of amax / 127; halves are rounded away from zero."""
    scale_RB = tl.div_rn(tl.max(tl.abs(x_RBI), 2), 127.0)
    value_RBI = x_RBI * _inverse(scale_RB)[:, :, None]
    size_RBI = tl.floor(tl.abs(value_RBI))
    size_RBI += tl.floor(2.0 * (tl.abs(value_RBI) - size_RBI))
    return scale_RB, tl.where(value_RBI < 0, -size_RBI, size_RBI).to(tl.int32) & 0xFF


@triton.jit
def _signed(x_RBI, place_I, HALF: tl.constexpr):
    """Equal steps; the number of largest magnitude sits on the lowest code."""
    scale_RB = tl.div_rn(_extreme(x_RBI, place_I), -1.0 * HALF)
    return scale_RB, _truncated(x_RBI * _inverse(scale_RB)[:, :, None] + (HALF + 0.5), 2.0 * HALF - 1.0)


@triton.jit
def _affine(x_RBI, place_I, TOP: tl.constexpr):
    """Equal steps from the block's minimum to its maximum."""
    # Of -0 and +0 the later one counts.
    zero_RBI = x_RBI == 0
    last_RB1 = tl.expand_dims(tl.max(tl.where(zero_RBI, place_I[None, None, :], -1), 2), 2)
    bits_RBI = tl.where(place_I[None, None, :] == last_RB1, x_RBI.to(tl.int32, bitcast=True), 0)
    zero_RB = tl.sum(bits_RBI, 2).to(tl.float32, bitcast=True)
    low_RB, high_RB = tl.min(x_RBI, 2), tl.max(x_RBI, 2)
    low_RB, high_RB = tl.where(low_RB == 0, zero_RB, low_RB), tl.where(high_RB == 0, zero_RB, high_RB)
    scale_RB = tl.div_rn(high_RB - low_RB, 1.0 * TOP)
    value_RBI = (x_RBI - low_RB[:, :, None]) * _inverse(scale_RB)[:, :, None] + 0.5
    return scale_RB, low_RB, _truncated(value_RBI, 1.0 * TOP)


@triton.jit
def _table(x_RBI, place_I, ROW: tl.constexpr):
    """Choose the nearest level of a fixed table, then the scale that fits the levels best with weights x^2."""
    first_RB = tl.div_rn(_extreme(x_RBI, place_I), -127.0)
    value_RBI = x_RBI * _inverse(first_RB)[:, :, None]
    code_RBI = tl.zeros(x_RBI.shape, tl.int32)
    level_RBI = tl.zeros(x_RBI.shape, tl.int32) + ROW.levels[0]
    for code in tl.static_range(1, 16):
        # A number exactly between two levels takes the upper one.
        above_RBI = value_RBI >= (ROW.levels[code - 1] + ROW.levels[code]) / 2
        code_RBI += above_RBI.to(tl.int32)
        level_RBI += tl.where(above_RBI, ROW.levels[code] - ROW.levels[code - 1], 0)
    level_RBI = level_RBI.to(tl.float32)
    weight_RBI = value_RBI * value_RBI * level_RBI
    norm_RB = _exact_sum(weight_RBI * level_RBI, 2)
    fit_RB = tl.div_rn(_exact_sum(weight_RBI * value_RBI, 2), tl.where(norm_RB > 0, norm_RB, 1.0))
    # A block of zeros has the scale +0, and not 0 / -127 = -0.
    return first_RB * fit_RB + 0.0, code_RBI
