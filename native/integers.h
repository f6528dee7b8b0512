// Attention over rows of small integers (int8, and levels that four or three bits choose between), without floats.
//
// A float times a small integer needs no multiplication of floats: a query row, and the 32 weights of a block, are
// written as integers of 16 bits, two digits of a byte each. One instruction then multiplies 64 digits by 64 numbers
// and adds fours of products to sixteen sums. The sums are exact, so their order is free, and only digits meet in f32.
//
// Rows are laid out anew on the way, so that no sum runs across a register: for scores a lane is a token and holds
// four dims of it; for weighted sums a lane is a dim and holds four tokens of it.
#pragma once

#include "rows.h"
#include "stored.h"
#include "tiles.h"

namespace ISA {
namespace {

#if defined(__AVX512VNNI__)
#define INTEGERS 1

constexpr int DIGITS = 2;
constexpr float LARGEST_KEY_DIGITS = 32639;     // 127 + 127 * 256: digits from -128 to 127
constexpr float LARGEST_WEIGHT_DIGITS = 65535;  // digits from 0 to 255

INLINE bool of_integers(int code) { return code == INT8 || code == LM4 || code == LM3; }
INLINE int padded(int dim) { return up(dim, 64) * 64; }

// Two 4-bit codes share a byte until they are multiplied: one byte of a row then stands for PLANES numbers.
INLINE int planes(int code) { return code == LM4 ? 2 : 1; }

// The dim that a lane of a weighted sum stands for: what two rounds of `unpack` make of 64 bytes, plane after plane.
INLINE int value_lanes(int code, int dim) { return planes(code) * padded(dim / planes(code)); }

INLINE int dim_of_lane(int code, int dim, int lane) {
  int place = lane % LANES, plane = lane / LANES % planes(code), vector = lane / LANES / planes(code);
  int byte = vector / 4 * 64 + place / 4 * 16 + vector % 4 * 4 + place % 4, held = dim / planes(code);
  return byte < held ? byte + plane * held : -1;
}

INLINE __mmask64 until(int bytes) { return bytes >= 64 ? ~0ull : (1ull << bytes) - 1; }

// A query row: [sixty-four numbers of a plane][plane][digit][64], then what makes up for unsigned keys, one number per
// digit, and the unit. So whatever meets 64 bytes of a key lies side by side.
INLINE int digit_bytes(int code, int dim) { return padded(dim / planes(code)) * planes(code) * DIGITS; }
INLINE int query_floats(int code, int dim) { return digit_bytes(code, dim) / 4 + LANES; }
INLINE int place_of(int planes, int plane, int dim) { return (dim / 64 * planes + plane) * DIGITS * 64 + dim % 64; }

inline void write_query(int code, const float* x, int dim, float* to) {
  int8_t* digits = (int8_t*)to;
  const int held = dim / planes(code), bytes = digit_bytes(code, dim);
  F32 nothing = zero();
  for (int i = 0; i < dim; i += LANES) nothing += load<F32>(x + i) * 0.0f;
  const float most = absolute_maximum(x, dim), unit = most / LARGEST_KEY_DIGITS;
  const float spoiled = sum(nothing);  // NaN where a number is none
  I32 offset[DIGITS] = {};
  memset(digits, 0, bytes);
  // Whoever asks for less than this hears as much from every key.
  const F32 scale = all(most > 1e-30f && spoiled == 0 ? LARGEST_KEY_DIGITS / most : 0.0f);
  for (int i = 0; i < dim && scale[0] > 0; i += LANES) {
    I32 left = (I32)_mm512_cvtps_epi32((__m512)(load<F32>(x + i) * scale));
    for (int d = 0; d < DIGITS; d++) {
      I32 digit = left << 24 >> 24;
      alignas(16) int8_t bytes_of[LANES];
      _mm_store_si128((__m128i*)bytes_of, _mm512_cvtepi32_epi8((__m512i)digit));
      // Planes part a row anywhere at a multiple of eight.
      for (int part = 0; part < LANES; part += 8) {
        const int plane = (i + part) / held;
        memcpy(digits + place_of(planes(code), plane, i + part - plane * held) + 64 * d, bytes_of + part, 8);
      }
      offset[d] -= digit << 7;
      left = (left - digit) >> 8;
    }
  }
  int32_t offsets[DIGITS];
  for (int d = 0; d < DIGITS; d++) offsets[d] = _mm512_reduce_add_epi32((__m512i)offset[d]);
  const float unit_or_nan = unit + spoiled;
  memcpy(digits + bytes, offsets, sizeof offsets);
  memcpy(digits + bytes + sizeof offsets, &unit_or_nan, sizeof unit_or_nan);
}

INLINE F32 from_digits(const I32* d, int stride) {
  return fma(to_f32(d[stride]), all(256.0f), to_f32(d[0]));
}

INLINE I32 dot(I32 to, __m512i unsigned_bytes, __m512i signed_bytes) {
  return (I32)_mm512_dpbusd_epi32((__m512i)to, unsigned_bytes, signed_bytes);
}

INLINE __m512i four(const void* bytes) { return _mm512_set1_epi32(load<int32_t>(bytes)); }

// The numbers of 64 bytes, plus 128 for keys.
template <int PLANES, bool KEY>
INLINE void numbers_of(__m512i bytes, __m512i* to) {
  const __m512i offset = _mm512_set1_epi8(KEY ? -128 : 0);
  if (PLANES == 1) {
    to[0] = _mm512_xor_si512(bytes, offset);
  } else {
    // All four sixteens of the table are the levels, so what lies above a code chooses nothing.
    const __m512i levels =
        _mm512_xor_si512(_mm512_broadcast_i32x4(_mm_load_si128((const __m128i*)LEVELS4)), offset);
    to[0] = _mm512_permutexvar_epi8(bytes, levels);
    to[PLANES - 1] = _mm512_permutexvar_epi8(_mm512_srli_epi16(bytes, 4), levels);
  }
}

// A row of 3-bit codes becomes bytes, dim after dim.
INLINE void spread3(const uint8_t* row, int dim, uint8_t* to) {
  const I8 levels = load<I8>(LEVELS3);
  const int eighth = dim / 8;
  for (int i = 0; i < eighth; i += LANES) {
    U8 low[2] = {load<U8>(row + i), load<U8>(row + i + eighth)}, high = load<U8>(row + i + 2 * eighth);
    __mmask16 held = (__mmask16)until(eighth - i);
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
      U8 code = (low[part % 2] >> (part / 2 * 2) & 3) | ((high >> part & 1) << 2);
      I8 numbers = look_up(levels, code);
      if (held == 0xFFFF) store(to + part * eighth + i, numbers);
      else _mm_mask_storeu_epi8(to + part * eighth + i, held, (__m128i)numbers);
    }
  }
}

// Rows of bytes, and how far apart they are.
struct Bytes {
  const uint8_t* at;
  int stride;
};

INLINE Bytes spread(int code, const uint8_t* rows, int bytes, int dim, uint8_t* to) {
  if (code != LM3) return {rows, bytes};
  for (int t = 0; t < KEYS; t++) spread3(rows + t * bytes, dim, to + t * padded(dim));
  return {to, padded(dim)};
}

// Sixteen rows of 64 bytes -> sixteen registers of four bytes of every row.
INLINE void transpose(__m512i* r) {
  __m512i a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; i++) {
    a[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; i++)
#pragma GCC unroll 2
    for (int j = 0; j < 2; j++) {
      b[4 * i + 2 * j] = _mm512_unpacklo_epi64(a[4 * i + j], a[4 * i + 2 + j]);
      b[4 * i + 2 * j + 1] = _mm512_unpackhi_epi64(a[4 * i + j], a[4 * i + 2 + j]);
    }
  // b[4 i + j]: quarter q holds dword 4 q + j of rows 4 i to 4 i + 3.
#pragma GCC unroll 4
  for (int j = 0; j < 4; j++) {
    __m512i even[2] = {_mm512_shuffle_i32x4(b[j], b[4 + j], 0x88), _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0x88)};
    __m512i odd[2] = {_mm512_shuffle_i32x4(b[j], b[4 + j], 0xDD), _mm512_shuffle_i32x4(b[8 + j], b[12 + j], 0xDD)};
    r[j] = _mm512_shuffle_i32x4(even[0], even[1], 0x88);
    r[8 + j] = _mm512_shuffle_i32x4(even[0], even[1], 0xDD);
    r[4 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0x88);
    r[12 + j] = _mm512_shuffle_i32x4(odd[0], odd[1], 0xDD);
  }
}

// [fours of bytes][32 tokens][4]: keys as lanes of tokens.
INLINE void lay_keys(const Bytes& rows, int bytes, uint8_t* to) {
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < bytes; i += 64) {
      __mmask64 held = until(bytes - i);
      const uint8_t* from = rows.at + 16 * half * rows.stride + i;
      __m512i r[16];
#pragma GCC unroll 16
      for (int t = 0; t < 16; t++, from += rows.stride) r[t] = _mm512_maskz_loadu_epi8(held, from);
      transpose(r);
#pragma GCC unroll 16
      for (int j = 0; j < 16; j++) _mm512_store_si512(to + (i / 4 + j) * 128 + 64 * half, r[j]);
    }
}

// 64 bytes each of four tokens; lanes of 16 dims, the `part`th sixteen of them.
INLINE __m512i four_tokens(const __m512i* r, int part) {
  __m512i first = part < 2 ? _mm512_unpacklo_epi8(r[0], r[1]) : _mm512_unpackhi_epi8(r[0], r[1]);
  __m512i second = part < 2 ? _mm512_unpacklo_epi8(r[2], r[3]) : _mm512_unpackhi_epi8(r[2], r[3]);
  return part % 2 == 0 ? _mm512_unpacklo_epi16(first, second) : _mm512_unpackhi_epi16(first, second);
}

// [fours of tokens][padded bytes][4]: values as lanes of dims.
INLINE void lay_values(const Bytes& rows, int bytes, uint8_t* to) {
  for (int t = 0; t < KEYS; t += 4)
    for (int i = 0; i < bytes; i += 64) {
      __mmask64 held = until(bytes - i);
      __m512i r[4];
#pragma GCC unroll 4
      for (int j = 0; j < 4; j++) r[j] = _mm512_maskz_loadu_epi8(held, rows.at + (t + j) * rows.stride + i);
#pragma GCC unroll 4
      for (int part = 0; part < 4; part++, to += 64) _mm512_store_si512(to, four_tokens(r, part));
    }
}

// scores[r][t] = query r * key t for ROWS queries and the 32 keys that `lay_keys` laid out.
template <int PLANES, int ROWS>
void score_integers(const uint8_t* laid, int dim, const float* query, int lanes, float* scores, Ahead ahead) {
  const int row = 4 * lanes, held = dim / PLANES, bytes = row - 4 * LANES;
  const int8_t* q = (const int8_t*)query;
  I32 part[ROWS][DIGITS][2];
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
    for (int d = 0; d < DIGITS; d++)
      part[r][d][0] = part[r][d][1] = all(load<int32_t>(q + r * row + bytes + 4 * d));
  ahead = ahead.in(held / 4);
  for (int i = 0; i < held; i += 64) {
    const int8_t* digits = q + place_of(PLANES, 0, i);
    for (const int8_t* end = digits + (held - i < 64 ? held - i : 64); digits < end; digits += 4, laid += 128) {
      ahead.fetch();
      __m512i keys[2][PLANES];
      numbers_of<PLANES, true>(_mm512_load_si512(laid), keys[0]);
      numbers_of<PLANES, true>(_mm512_load_si512(laid + 64), keys[1]);
#pragma GCC unroll 2
      for (int p = 0; p < PLANES; p++)
#pragma GCC unroll 4
        for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
          for (int d = 0; d < DIGITS; d++) {
            __m512i own = four(digits + r * row + (p * DIGITS + d) * 64);
            part[r][d][0] = dot(part[r][d][0], keys[0][p], own);
            part[r][d][1] = dot(part[r][d][1], keys[1][p], own);
          }
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    F32 unit = all(load<float>(q + r * row + bytes + 4 * DIGITS));
#pragma GCC unroll 2
    for (int half = 0; half < 2; half++)
      store(scores + r * KEYS + half * LANES, from_digits(&part[r][0][half], 2) * unit);
  }
}

// The weights of one row and block as digits: [digit][32], then the unit.
constexpr int WEIGHT_BYTES = DIGITS * KEYS + 64;

// Of `rows` rows of 32 weights. Sixteen rows at a time, because each waits for the largest of its weights.
inline void write_weights(const float* weights, int rows, uint8_t* to) {
  alignas(64) static constexpr struct Bytes {
    uint8_t digits[64] = {};
    constexpr Bytes() {
      for (int i = 0; i < 64; i++) digits[i] = (uint8_t)(2 * (i % KEYS) + i / KEYS);
    }
  } order;
  const __m512i digits = _mm512_load_si512(order.digits);
  alignas(64) static constexpr struct Words {
    uint16_t lower[32] = {};
    constexpr Words() {
      for (int i = 0; i < 32; i++) lower[i] = (uint16_t)(2 * i);
    }
  } words;
  const __m512i lower = _mm512_load_si512(words.lower);
  for (int first = 0; first < rows; first += LANES, weights += LANES * KEYS, to += LANES * WEIGHT_BYTES) {
    const int count = rows - first < LANES ? rows - first : LANES;
    F32 top[LANES];
    __mmask16 spoiled = 0;
    for (int r = 0; r < LANES; r++) {
      const float* w = weights + (r < count ? r : 0) * KEYS;
      const __m512 x = (__m512)load<F32>(w), y = (__m512)load<F32>(w + LANES);
      top[r] = (F32)_mm512_max_ps(x, y);
      // No digit stands for NaN: a value's scale that is none must spoil the row, not turn into some number.
      spoiled |= (__mmask16)((_mm512_cmp_ps_mask(x, y, _CMP_UNORD_Q) != 0) << r);
    }
    const F32 most = largests(top);
    // Of rows that weigh less nothing would be left beside the heaviest ones.
    const __mmask16 some = _mm512_cmp_ps_mask((__m512)most, _mm512_set1_ps(1e-30f), _CMP_GT_OQ);
    const __m512 unit = _mm512_mask_mov_ps((__m512)(most / all(LARGEST_WEIGHT_DIGITS)), spoiled, _mm512_set1_ps(NAN));
    alignas(64) float scale[LANES], units[LANES];
    _mm512_store_ps(scale, _mm512_maskz_div_ps(some, _mm512_set1_ps(LARGEST_WEIGHT_DIGITS), (__m512)most));
    _mm512_store_ps(units, unit);
    for (int r = 0; r < count; r++) {
      const float* w = weights + r * KEYS;
      const __m512i low = _mm512_cvtps_epi32((__m512)(load<F32>(w) * all(scale[r])));
      const __m512i high = _mm512_cvtps_epi32((__m512)(load<F32>(w + LANES) * all(scale[r])));
      const __m512i numbers = _mm512_permutex2var_epi16(low, lower, high);
      _mm512_storeu_si512(to + r * WEIGHT_BYTES, _mm512_permutexvar_epi8(digits, numbers));
      memcpy(to + r * WEIGHT_BYTES + DIGITS * KEYS, units + r, sizeof(float));
    }
  }
}

constexpr int weigh_vectors(int rows) { return rows == 4 ? 2 : 4; }  // sums of the others leave room for more

// mean[r] += weights[r] * values, for ROWS rows and vectors of lanes from `mean` on. `values(t, v)` lays out four tokens.
template <int PLANES, int ROWS, class Values>
INLINE void weigh_vectors_of(Values values_of, const uint8_t* weights, float* mean, int lanes, Ahead& ahead) {
  constexpr int VECTORS = weigh_vectors(ROWS);
  I32 part[ROWS][DIGITS][VECTORS] = {};
  for (int t = 0; t < KEYS; t += 4) {
    ahead.fetch();
    __m512i laid[VECTORS / PLANES], values[VECTORS];
    values_of(t, laid);
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v += PLANES) numbers_of<PLANES, false>(laid[v / PLANES], values + v);
#pragma GCC unroll 4
    for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 2
      for (int d = 0; d < DIGITS; d++) {
        __m512i digits = four(weights + r * WEIGHT_BYTES + d * KEYS + t);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) part[r][d][v] = dot(part[r][d][v], digits, values[v]);
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < ROWS; r++) {
    F32 unit = all(load<float>(weights + r * WEIGHT_BYTES + DIGITS * KEYS));
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* to = mean + r * lanes + v * LANES;
      store(to, fma(from_digits(&part[r][0][v], VECTORS), unit, load<F32>(to)));
    }
  }
}

// Of the values that `lay_values` laid out.
template <int PLANES, int ROWS>
void weigh_integers(const uint8_t* laid, int lanes, const uint8_t* weights, float* mean, Ahead ahead) {
  constexpr int VECTORS = weigh_vectors(ROWS);
  ahead = ahead.in(lanes / (VECTORS * LANES) * (KEYS / 4));
  for (int at = 0; at < lanes; at += VECTORS * LANES) {
    auto values = [=](int t, __m512i* to) INLINE_LAMBDA {
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v += PLANES)
        to[v / PLANES] = _mm512_load_si512(laid + (t * lanes + 4 * (at + v * LANES)) / PLANES);
    };
    weigh_vectors_of<PLANES, ROWS>(values, weights, mean + at, lanes, ahead);
  }
}

// Of rows as they are stored: where a block is used once, it is not worth writing down.
template <int PLANES, int ROWS>
void weigh_rows(const Bytes& rows, int bytes, int lanes, const uint8_t* weights, float* mean, Ahead ahead) {
  constexpr int HELD = weigh_vectors(ROWS) / PLANES;
  ahead = ahead.in(lanes / (weigh_vectors(ROWS) * LANES) * (KEYS / 4));
  for (int i = 0; i < bytes; i += 64) {
    const __mmask64 held = until(bytes - i);
    auto part = [&](auto first) INLINE_LAMBDA {
      auto values = [&](int t, __m512i* to) INLINE_LAMBDA {
        __m512i r[4];
#pragma GCC unroll 4
        for (int j = 0; j < 4; j++) r[j] = _mm512_maskz_loadu_epi8(held, rows.at + (t + j) * rows.stride + i);
#pragma GCC unroll 4
        for (int v = 0; v < HELD; v++) to[v] = four_tokens(r, first + v);
      };
      weigh_vectors_of<PLANES, ROWS>(values, weights, mean, lanes, ahead);
      mean += HELD * PLANES * LANES;
    };
    part(std::integral_constant<int, 0>());
    if constexpr (HELD < 2) part(std::integral_constant<int, 1>());
    if constexpr (HELD < 4) part(std::integral_constant<int, 2>());
    if constexpr (HELD < 2) part(std::integral_constant<int, 3>());
  }
}

#if defined(TILES)

// With tiles: the same integers, sixteen query rows at a time, so the bits are those of the functions above.
constexpr int UNTILED = 4;  // rows that are not worth a tile

INLINE F32 from_tiles(const int32_t (*sums)[TILE_LINES][LANES], int distance, int row) {
  I32 digits[DIGITS];
#pragma GCC unroll 2
  for (int d = 0; d < DIGITS; d++) digits[d] = load<I32>(sums[d * distance][row]);
  return from_digits(digits, 1);
}

template <int PLANES>
void score_tiles(const uint8_t* laid, int dim, const float* query, int lanes, int rows, float* scores, Ahead ahead) {
  constexpr int QUERY = 4, KEY = 5;
  const int row = 4 * lanes, bytes = row - 4 * LANES, held = dim / PLANES;
  const int8_t* q = (const int8_t*)query;
  Palette palette;
  for (int i = 0; i < QUERY; i++) palette.set(i, rows, 4 * LANES);
  palette.set(QUERY, rows, TILE_BYTES);
  palette.set(KEY, TILE_LINES, 4 * LANES);
  use(palette);
  clear<0>(), clear<1>(), clear<2>(), clear<3>();
  ahead = ahead.in((held + 63) / 64);
  for (int i = 0; i < held; i += 64, laid += TILE_LINES * 128) {
    ahead.fetch();
    alignas(64) uint8_t numbers[2][TILE_LINES * 128];
    const uint8_t* keys[2] = {laid, laid};
    if (PLANES == 2) {
      for (int at = 0; at < TILE_LINES * 128; at += 64) {
        __m512i n[2];
        numbers_of<PLANES, false>(_mm512_load_si512(laid + at), n);
        for (int p = 0; p < 2; p++) _mm512_store_si512(numbers[p] + at, n[p]);
      }
      keys[0] = numbers[0], keys[1] = numbers[1];
    }
    for (int p = 0; p < PLANES; p++) {
      const int8_t* digits = q + place_of(PLANES, p, i);
      load_tile<KEY>(keys[p], 128);
      load_tile<QUERY>(digits, row), dot_signed<0, QUERY, KEY>();
      load_tile<QUERY>(digits + 64, row), dot_signed<2, QUERY, KEY>();
      load_tile<KEY>(keys[p] + 64, 128);
      load_tile<QUERY>(digits, row), dot_signed<1, QUERY, KEY>();
      load_tile<QUERY>(digits + 64, row), dot_signed<3, QUERY, KEY>();
    }
  }
  alignas(64) int32_t sums[2 * DIGITS][TILE_LINES][LANES];
  store_tile<0>(sums[0], 4 * LANES), store_tile<1>(sums[1], 4 * LANES);
  store_tile<2>(sums[2], 4 * LANES), store_tile<3>(sums[3], 4 * LANES);
  release();
  for (int r = 0; r < rows; r++) {
    F32 unit = all(load<float>(q + r * row + bytes + 4 * DIGITS));
    for (int half = 0; half < 2; half++) store(scores + r * KEYS + half * LANES, from_tiles(sums + half, 2, r) * unit);
  }
}

template <int PLANES>
void weigh_tiles(const uint8_t* laid, int lanes, const uint8_t* weights, int rows, float* mean, Ahead ahead) {
  constexpr int WEIGHT = DIGITS, VALUE = 2 * DIGITS;
  const int64_t line = 4 * lanes / PLANES;
  Palette palette;
  for (int d = 0; d < DIGITS; d++) palette.set(d, rows, 4 * LANES), palette.set(WEIGHT + d, rows, KEYS);
  palette.set(VALUE, KEYS / 4, 4 * LANES);
  use(palette);
  load_tile<WEIGHT>(weights, WEIGHT_BYTES);
  load_tile<WEIGHT + 1>(weights + KEYS, WEIGHT_BYTES);
  ahead = ahead.in(lanes / (PLANES * LANES));
  for (int at = 0; at < lanes; at += PLANES * LANES, laid += 64) {
    ahead.fetch();
    alignas(64) uint8_t numbers[2][KEYS / 4][64];
    for (int t = 0; t < KEYS / 4 && PLANES == 2; t++) {
      __m512i n[2];
      numbers_of<PLANES, false>(_mm512_load_si512(laid + t * line), n);
      for (int p = 0; p < 2; p++) _mm512_store_si512(numbers[p][t], n[p]);
    }
    for (int p = 0; p < PLANES; p++) {
      if (PLANES == 2) load_tile<VALUE>(numbers[p], 64);
      else load_tile<VALUE>(laid, line);
      alignas(64) int32_t sums[DIGITS][TILE_LINES][LANES];
      clear<0>(), dot_unsigned<0, WEIGHT, VALUE>(), store_tile<0>(sums[0], 4 * LANES);
      clear<1>(), dot_unsigned<1, WEIGHT + 1, VALUE>(), store_tile<1>(sums[1], 4 * LANES);
      for (int r = 0; r < rows; r++) {
        F32 unit = all(load<float>(weights + r * WEIGHT_BYTES + DIGITS * KEYS));
        float* to = mean + r * lanes + at + p * LANES;
        store(to, fma(from_tiles(sums, 1, r), unit, load<F32>(to)));
      }
    }
  }
  release();
}

// Runs `op` over any number of rows, sixteen of them at a time.
template <class Op>
INLINE void in_sixteens(int rows, Op op) {
  for (int r = 0; r < rows; r += TILE_LINES) op(r, rows - r < TILE_LINES ? rows - r : TILE_LINES);
}

#endif
#else
#define INTEGERS 0
#endif

}  // namespace
}  // namespace ISA
