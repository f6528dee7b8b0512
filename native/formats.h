// How rows lie in memory: the layout of every code, and its decoder.
//
// A decoder gives the numbers of a row in `lanes`: vectors of sixteen, in the order in which they fall out of the
// bytes, which is not always the order of the dims (a byte of two 4-bit codes holds dims that lie half a row apart).
// Queries are brought into that order before the loop and outputs out of it after the loop, where it costs nothing.
// Lanes that stand for no dim hold some finite number; a query is zero there, and an output is dropped.
//
// Codes come out in units of the row: a row's number is lane * Shape::unit * its scale, if its code has one.
#pragma once

#include "simd.h"

namespace ISA {
namespace {

// The order is that of CODES in truekv/kernels/native/stored.py.
enum Code : int32_t { PLAIN32, PLAIN16, E4M3, E5M2, ROW_E4M3, INT8, LM4, LM3, Q8_0, Q5_1, Q5_0, Q4_1, Q4_0, IQ4_NL, CODES };

constexpr int BLOCK = 32;  // numbers in a block of llama.cpp's formats

alignas(16) constexpr int8_t LEVELS4[16] = {-104, -79, -62, -48, -36, -25, -15, -5, 5, 15, 25, 36, 48, 62, 79, 104};
alignas(16) constexpr int8_t LEVELS3[16] = {-88, -55, -31, -10, 10, 31, 55, 88, 0, 0, 0, 0, 0, 0, 0, 0};
alignas(16) constexpr int8_t LEVELS_NL[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
alignas(16) constexpr int8_t SIGNED4[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
alignas(16) constexpr int8_t COUNTED[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

INLINE int up(int number, int to) { return (number + to - 1) / to; }

// Sixteen small integers that four bits choose between.
struct Table {
#if defined(__AVX512F__)
  F32 levels;
  explicit Table(const int8_t* from) : levels(to_f32(widen(load<I8>(from)))) {}
  INLINE void both(U8 bytes, F32& low, F32& high) const {
    __m512i wide = _mm512_cvtepu8_epi32((__m128i)bytes);  // vpermps looks at the lowest four bits only
    low = (F32)_mm512_permutexvar_ps(wide, (__m512)levels);
    high = (F32)_mm512_permutexvar_ps(_mm512_srli_epi32(wide, 4), (__m512)levels);
  }
  INLINE F32 pick(U32 index) const { return (F32)_mm512_permutexvar_ps((__m512i)index, (__m512)levels); }
#else
  I8 levels;
  explicit Table(const int8_t* from) : levels(load<I8>(from)) {}
  INLINE void both(U8 bytes, F32& low, F32& high) const {
    low = to_f32(widen(look_up(levels, bytes & 15)));
    high = to_f32(widen(look_up(levels, bytes >> 4)));
  }
#endif
};

// What a decoder makes of one row: `units` times `VECTORS` vectors.
struct Float32 {
  static constexpr int VECTORS = 1;
  explicit Float32(int) {}
  static int bytes(int dim) { return 4 * dim; }
  static int units(int dim) { return dim / LANES; }
  static int dim_of(int, int unit, int, int lane) { return LANES * unit + lane; }
  INLINE void read(const uint8_t* row, int unit, F32* out) const { out[0] = load<F32>(row + 64 * unit); }
};

struct BFloat16 : Float32 {
  using Float32::Float32;
  static int bytes(int dim) { return 2 * dim; }
  INLINE void read(const uint8_t* row, int unit, F32* out) const { out[0] = load_bf16(row + 32 * unit); }
};

struct Int8 : Float32 {
  using Float32::Float32;
  static int bytes(int dim) { return dim; }
  INLINE void read(const uint8_t* row, int unit, F32* out) const { out[0] = to_f32(widen(load<I8>(row + 16 * unit))); }
};

#if defined(__AVX512VBMI__)
// The numbers that the seven bits beside the sign stand for, as bf16, which can hold them all: lower bytes, upper bytes.
template <bool E5M2>
struct Fp8Bytes {
  alignas(64) uint8_t of[2][128] = {};
  constexpr Fp8Bytes() {
    constexpr int MANTISSA = E5M2 ? 2 : 3, BIAS = 15, ONE = 1 << MANTISSA;  // e4m3 is 2^-8 as large as elsewhere: see `Shape`
    for (int code = 0; code < 128; code++) {
      int exponent = code >> MANTISSA, mantissa = code & (ONE - 1);
      const bool endless = E5M2 ? exponent == 31 : code == 127;
      if (exponent == 0 && mantissa != 0) {
        for (exponent = 1; mantissa < ONE; exponent--) mantissa *= 2;
        mantissa -= ONE;
      }
      int bits = code == 0 ? 0 : (endless ? 255 : exponent - BIAS + 127) << 7 | mantissa << (7 - MANTISSA);
      of[0][code] = (uint8_t)(bits & 255), of[1][code] = (uint8_t)(bits >> 8);
    }
  }
};

template <bool E5M2>
struct Fp8 {
  static constexpr int VECTORS = 4;
  int dim;
  __m512i upper[2], lower[2];
  explicit Fp8(int dim) : dim(dim) {
    static constexpr Fp8Bytes<E5M2> table;
    for (int i = 0; i < 2; i++)
      lower[i] = _mm512_load_si512(table.of[0] + 64 * i), upper[i] = _mm512_load_si512(table.of[1] + 64 * i);
  }
  static int bytes(int dim) { return dim; }
  static int units(int dim) { return up(dim, 64); }
  static int dim_of(int dim, int unit, int vector, int lane) {
    int byte = 64 * unit + lane / 4 * 16 + vector / 2 * 8 + lane % 4 * 2 + vector % 2;
    return byte < dim ? byte : -1;
  }
  INLINE void read(const uint8_t* row, int unit, F32* out) const {
    const uint8_t* at = row + 64 * unit;
    const int left = dim - 64 * unit;
    __m512i codes = left >= 64 ? _mm512_loadu_si512(at) : _mm512_maskz_loadu_epi8((1ull << left) - 1, at);
    __m512i low = _mm512_permutex2var_epi8(lower[0], codes, lower[1]);
    __m512i high = _mm512_permutex2var_epi8(upper[0], codes, upper[1]);
    high = _mm512_ternarylogic_epi32(high, codes, _mm512_set1_epi8(-128), 0xF8);  // high | (codes & sign)
    __m512i pairs[2] = {_mm512_unpacklo_epi8(low, high), _mm512_unpackhi_epi8(low, high)};
#pragma GCC unroll 2
    for (int i = 0; i < 2; i++) {
      out[2 * i] = (F32)_mm512_slli_epi32(pairs[i], 16);
      out[2 * i + 1] = (F32)_mm512_and_si512(pairs[i], _mm512_set1_epi32((int)0xFFFF0000));
    }
  }
};
#else
template <bool E5M2>
struct Fp8 : Int8 {
  using Int8::Int8;
  INLINE void read(const uint8_t* row, int unit, F32* out) const {
    const U16 wide = (U16)widen_half_way(load<I8>(row + 16 * unit));
    if (E5M2) {
      out[0] = widen_half(wide << 8);  // the upper half of an fp16 number
    } else {
      // One exponent bit fewer than fp16: shifted into place it is an fp16 number 2^-8 as large. The code of NaN would
      // be one of them; a row that is no number has no other code, so one of sixteen tells.
      out[0] = widen_half(wide << 7 & (uint16_t)0xBFFF);
      if (__builtin_expect(row[16 * unit] == 0xFF, 0)) out[0] = all(NAN);
    }
  }
};
#endif

// Byte j: dim j in bits 0-3, dim j + dim / 2 in bits 4-7.
struct Lm4 {
  static constexpr int VECTORS = 2;
  Table table{LEVELS4};
  explicit Lm4(int) {}
  static int bytes(int dim) { return dim / 2; }
  static int units(int dim) { return up(dim / 2, LANES); }
  static int dim_of(int dim, int unit, int vector, int lane) {
    int byte = LANES * unit + lane;
    return byte < dim / 2 ? byte + vector * dim / 2 : -1;
  }
  INLINE void read(const uint8_t* row, int unit, F32* out) const {
    table.both(load<U8>(row + 16 * unit), out[0], out[1]);
  }
};

// Two low bits of four dims in each of dim / 4 bytes, then the high bit of eight dims in each of dim / 8 bytes.
struct Lm3 {
  static constexpr int VECTORS = 8;
  Table table{LEVELS3};
  int eighth;
  explicit Lm3(int dim) : eighth(dim / 8) {}
  static int bytes(int dim) { return dim / 8 * 3; }
  static int units(int dim) { return up(dim / 8, LANES); }
  static int dim_of(int dim, int unit, int vector, int lane) {
    int byte = LANES * unit + lane;
    return byte < dim / 8 ? byte + vector * (dim / 8) : -1;
  }
  INLINE void read(const uint8_t* row, int unit, F32* out) const {
    const uint8_t* at = row + 16 * unit;
    U8 low[2] = {load<U8>(at), load<U8>(at + eighth)}, high = load<U8>(at + 2 * eighth);
#if defined(__AVX512F__)
    U32 wide[2] = {__builtin_convertvector(low[0], U32), __builtin_convertvector(low[1], U32)};
    U32 bits = __builtin_convertvector(high, U32) << 2;
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++)
      out[part] = table.pick((wide[part % 2] >> (part / 2 * 2) & 3) | (bits >> part & 4));
#else
#pragma GCC unroll 8
    for (int part = 0; part < 8; part++) {
      U8 code = (low[part % 2] >> (part / 2 * 2) & 3) | ((high >> part & 1) << 2);
      out[part] = to_f32(widen(look_up(table.levels, code)));
    }
#endif
  }
};

// A block of llama.cpp: fp16 headers, then codes. Values come out finished, since each block has its own scale.
template <int HEADERS, bool FIFTH>
struct Blocks {
  static constexpr int VECTORS = 2, BYTES = 2 * HEADERS + 4 * FIFTH + 16;
  Table table;
  explicit Blocks(const int8_t* levels) : table(levels) {}
  static int bytes(int dim) { return up(dim, BLOCK) * BYTES; }
  static int units(int dim) { return up(dim, BLOCK); }
  static int dim_of(int dim, int unit, int vector, int lane) {
    int at = BLOCK * unit + LANES * vector + lane;
    return at < dim ? at : -1;
  }
  INLINE void read(const uint8_t* row, int unit, F32* out) const {
    const uint8_t* block = row + BYTES * unit;
    table.both(load<U8>(block + BYTES - 16), out[0], out[1]);
    if (FIFTH) {
      alignas(64) constexpr int32_t bit[LANES] = {1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, 32768};
      int32_t bits = load<int32_t>(block + 2 * HEADERS);
#pragma GCC unroll 2
      for (int half = 0; half < 2; half++) {
        I32 set = same(all(bits >> 16 * half) & load<I32>(bit), load<I32>(bit));
        out[half] += (F32)(set & (I32)all(16.0f));
      }
    }
    F32 scale = all(half_to_float(load<uint16_t>(block)));
    if (HEADERS == 1) {
      out[0] *= scale, out[1] *= scale;
    } else {
      F32 low = all(half_to_float(load<uint16_t>(block + 2)));
      out[0] = out[0] * scale + low, out[1] = out[1] * scale + low;
    }
  }
};

alignas(16) constexpr int8_t SIGNED5[16] = {-16, -15, -14, -13, -12, -11, -10, -9, -8, -7, -6, -5, -4, -3, -2, -1};
struct BlocksQ51 : Blocks<2, true> { explicit BlocksQ51(int) : Blocks(COUNTED) {} };
struct BlocksQ50 : Blocks<1, true> { explicit BlocksQ50(int) : Blocks(SIGNED5) {} };
struct BlocksQ41 : Blocks<2, false> { explicit BlocksQ41(int) : Blocks(COUNTED) {} };
struct BlocksQ40 : Blocks<1, false> { explicit BlocksQ40(int) : Blocks(SIGNED4) {} };
struct BlocksNl : Blocks<1, false> { explicit BlocksNl(int) : Blocks(LEVELS_NL) {} };

struct BlocksQ80 {
  static constexpr int VECTORS = 2, BYTES = 34;
  explicit BlocksQ80(int) {}
  static int bytes(int dim) { return up(dim, BLOCK) * BYTES; }
  static int units(int dim) { return up(dim, BLOCK); }
  static int dim_of(int dim, int unit, int vector, int lane) { return BlocksQ40::dim_of(dim, unit, vector, lane); }
  INLINE void read(const uint8_t* row, int unit, F32* out) const {
    const uint8_t* block = row + BYTES * unit;
    F32 scale = all(half_to_float(load<uint16_t>(block)));
    out[0] = to_f32(widen(load<I8>(block + 2))) * scale;
    out[1] = to_f32(widen(load<I8>(block + 18))) * scale;
  }
};

// Calls `then(decoder type)` for a code; the one place that lists them all.
template <class D> struct Type { using Decoder = D; };
template <class Then>
INLINE auto with_decoder(int code, Then then) {
  switch (code) {
    case PLAIN32: return then(Type<Float32>());
    case PLAIN16: return then(Type<BFloat16>());
    case E4M3: case ROW_E4M3: return then(Type<Fp8<false>>());
    case E5M2: return then(Type<Fp8<true>>());
    case INT8: return then(Type<Int8>());
    case LM4: return then(Type<Lm4>());
    case LM3: return then(Type<Lm3>());
    case Q8_0: return then(Type<BlocksQ80>());
    case Q5_1: return then(Type<BlocksQ51>());
    case Q5_0: return then(Type<BlocksQ50>());
    case Q4_1: return then(Type<BlocksQ41>());
    case Q4_0: return then(Type<BlocksQ40>());
    default: return then(Type<BlocksNl>());
  }
}

// Sizes of the rows of one code and length.
struct Shape {
  int dim, bytes, units, lanes;
  bool scaled;  // an fp16 scale of each row lies behind the codes of the page
  float unit;

  Shape(int code, int dim) : dim(dim), scaled(code == ROW_E4M3 || code == INT8 || code == LM4 || code == LM3) {
    unit = code == E4M3 || code == ROW_E4M3 ? 256.0f : 1.0f;
    with_decoder(code, [&](auto type) {
      using D = typename decltype(type)::Decoder;
      bytes = D::bytes(dim), units = D::units(dim), lanes = units * D::VECTORS * LANES;
    });
  }
};

}  // namespace
}  // namespace ISA
