// store: a step's rows into their frame, into codes, and to their lines. Bytes equal those of truekv/formats.
//
// Rows are few and short (some hundred numbers per layer and token), so this is written to be read; the loops
// vectorise as they are.
#include <memory>

#include "export.h"
#include "stored.h"

struct Store {
  Stored field;
  const void* rows;  // [tokens, heads, dim], with these strides in numbers
  int64_t tokens, token_stride, head_stride;
  const int64_t *page, *line;  // [tokens]; a line below zero: nothing is stored
  int64_t* broken;             // out: how many rows are not finite; they are stored as NaN, so that whoever reads them knows
  int32_t bf16, unused;
};

namespace ISA {
namespace {

constexpr float HALF_MAX = 65504.0f;

INLINE float clamp(float x, float low, float high) { return x < low ? low : x > high ? high : x; }
INLINE void put_half(uint8_t* to, uint16_t half) { memcpy(to, &half, 2); }
INLINE uint16_t nearest_half(float x) { return float_to_half(clamp(x, -HALF_MAX, HALF_MAX)); }

// The fp16 number at or below a number that is not negative.
INLINE uint16_t half_below(float x) {
  uint16_t near = nearest_half(x);
  return half_to_float(near) > x ? near - 1 : near;
}

// The sum of terms on the grid of their largest: exact, hence the same in any order.
INLINE float exact_sum(const float* x, int n) {
  double shift = grid_shift(absolute_maximum(x, n)), total = 0;
  for (int i = 0; i < n; i++) total += on_grid((double)x[i], shift);
  return (float)total;
}

template <int MANTISSA, int BIAS>
INLINE uint8_t to_fp8(float x) {
  uint32_t bits;
  memcpy(&bits, &x, 4);
  uint32_t sign = bits >> 24 & 0x80, size = bits & 0x7FFFFFFF;
  constexpr int CUT = 23 - MANTISSA;
  if (size >= (uint32_t)(128 - BIAS) << 23)
    return (uint8_t)(sign | ((size - ((uint32_t)(127 - BIAS) << 23) + ((1u << (CUT - 1)) - 1) + (size >> CUT & 1)) >> CUT));
  // Below the smallest normal number: a number whose last bit is one subnormal step leaves the code in its low bits.
  constexpr uint32_t STEP = (uint32_t)(128 - BIAS + CUT) << 23;
  float magic, small;
  memcpy(&magic, &STEP, 4);
  memcpy(&small, &size, 4);
  small += magic;
  memcpy(&size, &small, 4);
  return (uint8_t)(sign | (size - STEP));
}

void encode_plain(const float* x, int dim, bool half, uint8_t* codes) {
  constexpr float TOP = 3.3895313892515355e38f;
  if (!half) {
    memcpy(codes, x, dim * sizeof(float));
    return;
  }
  for (int i = 0; i < dim; i++) put_half(codes + 2 * i, float_to_bf16(clamp(x[i], -TOP, TOP)));
}

void encode_fp8(const float* x, int dim, bool e5m2, uint8_t* codes) {
  if (e5m2) for (int i = 0; i < dim; i++) codes[i] = to_fp8<2, 15>(clamp(x[i], -57344.0f, 57344.0f));
  else for (int i = 0; i < dim; i++) codes[i] = to_fp8<3, 7>(clamp(x[i], -448.0f, 448.0f));
}

// Codes x / scale with the largest on `top`; a row whose scale is too small for fp16 is stored as zeros.
void encode_scaled(const float* x, int dim, bool fp8, uint8_t* codes, uint8_t* scale) {
  float top = fp8 ? 448.0f : 127.0f;
  uint16_t stored = half_below(absolute_maximum(x, dim) / top);
  put_half(scale, stored);
  float step = half_to_float(stored);
  for (int i = 0; i < dim; i++) {
    float code = step > 0 ? clamp(x[i] / step, -top, top) : 0.0f;
    codes[i] = fp8 ? to_fp8<3, 7>(code) : (uint8_t)(int8_t)(int)((code + 12582912.0f) - 12582912.0f);
  }
}

// See formats/lm.py: codes of the normalised row, and the scale that gives the decoded row the norm of the row.
void encode_lloyd_max(const float* x, int dim, bool four, uint8_t* codes, uint8_t* scale) {
  const int8_t* levels = four ? LEVELS4 : LEVELS3;
  const int count = four ? 16 : 8;
  alignas(64) float unit[LONGEST], square[LONGEST];
  alignas(64) uint8_t code[LONGEST];
  float largest = absolute_maximum(x, dim), by = largest > 0 ? largest : 1.0f;
  for (int i = 0; i < dim; i++) unit[i] = x[i] / by, square[i] = unit[i] * unit[i];
  float norm = sqrtf(exact_sum(square, dim));
  float gain = (float)(sqrt((double)dim) / (four ? 0.02622245 : 0.02444652));
  float factor = 1.0f / (norm < 1.0f ? 1.0f : norm) * gain;
  int32_t squares = 0;
  for (int i = 0; i < dim; i++) {
    float value = unit[i] * factor;
    int chosen = 0;
    for (int k = 1; k < count; k++) chosen += value > 0.5f * (float)(levels[k - 1] + levels[k]);
    code[i] = (uint8_t)chosen;
    squares += levels[chosen] * levels[chosen];
  }
  put_half(scale, nearest_half(largest * (norm / sqrtf((float)squares))));
  if (four) {
    for (int j = 0; j < dim / 2; j++) codes[j] = code[j] | code[j + dim / 2] << 4;
    return;
  }
  int quarter = dim / 4, eighth = dim / 8;
  for (int j = 0; j < quarter; j++) {
    codes[j] = 0;
    for (int part = 0; part < 4; part++) codes[j] |= (code[j + part * quarter] & 3) << 2 * part;
  }
  for (int j = 0; j < eighth; j++) {
    codes[quarter + j] = 0;
    for (int part = 0; part < 8; part++) codes[quarter + j] |= code[j + part * eighth] >> 2 << part;
  }
}

INLINE float inverse(float scale) {
  float r = scale == 0 ? 0.0f : 1.0f / scale;
  return fabsf(r) <= 3.4028234663852886e38f ? r : 0.0f;
}

INLINE float extreme(const float* x) {
  float most = x[0];
  for (int i = 1; i < BLOCK; i++) most = fabsf(x[i]) > fabsf(most) ? x[i] : most;
  return most;
}

// A code from 0 to top; what is no number (the quotient of infinities) is 0.
INLINE uint8_t truncated(float x, int top) { return x >= (float)top ? (uint8_t)top : x > 0 ? (uint8_t)(int)x : 0; }

void pack_block(const uint8_t* code, bool five, uint8_t* to) {
  if (five) {
    uint32_t bits = 0;
    for (int i = 0; i < BLOCK; i++) bits |= (uint32_t)(code[i] >> 4) << i;
    memcpy(to, &bits, 4);
    to += 4;
  }
  for (int j = 0; j < 16; j++) to[j] = (code[j] & 15) | (code[j + 16] & 15) << 4;
}

void encode_q8_0(const float* x, uint8_t* block) {
  float scale = absolute_maximum(x, BLOCK) / 127.0f, by = inverse(scale);
  put_half(block, nearest_half(scale));
  for (int i = 0; i < BLOCK; i++) {
    float value = x[i] * by, size = floorf(fabsf(value));
    size += floorf(2.0f * (fabsf(value) - size));  // halves go away from zero
    block[2 + i] = (uint8_t)(int8_t)(int)(value < 0 ? -size : size);
  }
}

void encode_signed(const float* x, bool five, uint8_t* block) {
  int half = five ? 16 : 8;
  uint8_t code[BLOCK];
  float scale = extreme(x) / (float)-half, by = inverse(scale);
  put_half(block, nearest_half(scale));
  for (int i = 0; i < BLOCK; i++) code[i] = truncated(x[i] * by + ((float)half + 0.5f), 2 * half - 1);
  pack_block(code, five, block + 2);
}

void encode_affine(const float* x, bool five, uint8_t* block) {
  int top = five ? 31 : 15;
  uint8_t code[BLOCK];
  float low = x[0], high = x[0];
  // Of -0 and +0 the later one counts: the zeros that fill up the last block of a row.
  for (int i = 1; i < BLOCK; i++) low = x[i] <= low ? x[i] : low, high = x[i] >= high ? x[i] : high;
  float scale = (high - low) / (float)top, by = inverse(scale);
  put_half(block, nearest_half(scale));
  put_half(block + 2, nearest_half(low));
  for (int i = 0; i < BLOCK; i++) code[i] = truncated((x[i] - low) * by + 0.5f, top);
  pack_block(code, five, block + 4);
}

// The nearest level of a fixed table, then the scale that fits the levels best with weights x^2.
void encode_table(const float* x, uint8_t* block) {
  uint8_t code[BLOCK];
  float products[BLOCK], squares[BLOCK];
  float first = extreme(x) / -127.0f, by = inverse(first);
  for (int i = 0; i < BLOCK; i++) {
    float value = x[i] * by;
    int chosen = 0;
    for (int k = 1; k < 16; k++) chosen += value >= 0.5f * (float)(LEVELS_NL[k - 1] + LEVELS_NL[k]);
    code[i] = (uint8_t)chosen;
    float level = LEVELS_NL[chosen], weight = value * value * level;
    squares[i] = weight * level, products[i] = weight * value;
  }
  float norm = exact_sum(squares, BLOCK);
  put_half(block, nearest_half(first * (exact_sum(products, BLOCK) / (norm > 0 ? norm : 1.0f)) + 0.0f));
  pack_block(code, false, block + 2);
}

void encode_blocks(int code, const float* x, int dim, int bytes, uint8_t* codes) {
  for (int i = 0; i < dim; i += BLOCK) {
    alignas(64) float filled[BLOCK] = {};
    memcpy(filled, x + i, (dim - i < BLOCK ? dim - i : BLOCK) * sizeof(float));
    uint8_t* block = codes + i / BLOCK * (bytes / up(dim, BLOCK));
    switch (code) {
      case Q8_0: encode_q8_0(filled, block); break;
      case Q5_1: encode_affine(filled, true, block); break;
      case Q5_0: encode_signed(filled, true, block); break;
      case Q4_1: encode_affine(filled, false, block); break;
      case Q4_0: encode_signed(filled, false, block); break;
      default: encode_table(filled, block);
    }
  }
}

void encode(int code, const float* x, const Shape& shape, uint8_t* codes, uint8_t* scale) {
  switch (code) {
    case PLAIN32: case PLAIN16: return encode_plain(x, shape.dim, code == PLAIN16, codes);
    case E4M3: case E5M2: return encode_fp8(x, shape.dim, code == E5M2, codes);
    case ROW_E4M3: case INT8: return encode_scaled(x, shape.dim, code == ROW_E4M3, codes, scale);
    case LM4: case LM3: return encode_lloyd_max(x, shape.dim, code == LM4, codes, scale);
    default: return encode_blocks(code, x, shape.dim, shape.bytes, codes);
  }
}

bool finite(const float* x, int dim) {
  uint32_t bad = 0;
  for (int i = 0; i < dim; i++) {
    uint32_t bits;
    memcpy(&bits, x + i, 4);
    bad |= (bits & 0x7F800000) == 0x7F800000;
  }
  return !bad;
}

void store_rows(const Store& a) {
  const Stored& field = a.field;
  const int64_t rows = a.tokens * field.heads;
  const Shape shape(field.code, field.dim);
  int64_t broken = 0;
#pragma omp parallel for schedule(static) reduction(+ : broken) if (rows > 64)
  for (int64_t row = 0; row < rows; row++) {
    int64_t token = row / field.heads, head = row % field.heads;
    if (a.line[token] < 0) continue;
    alignas(64) float x[LONGEST];
    uint8_t* codes = head_in_page(field, a.page[token], head) + a.line[token] * shape.bytes;
    uint8_t* scale = head_in_page(field, a.page[token], head) + field.page_tokens * shape.bytes + a.line[token] * 2;
    read_row(a.rows, a.bf16, token * a.token_stride + head * a.head_stride, field.dim, x);
    into_frame(field, head, x);
    if (finite(x, field.dim)) {
      encode(field.code, x, shape, codes, scale);
    } else {
      broken++;
      memset(codes, 0xFF, shape.bytes);
      if (shape.scaled) memset(scale, 0xFF, 2);
    }
  }
  *a.broken = broken;
}

}  // namespace
}  // namespace ISA

EXPORT(store, Store) { ISA::store_rows(*arguments); }
