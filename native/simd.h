// Sixteen floats: the one vector type of all kernels, whatever the machine's registers hold.
//
// Every instruction set sums in the order of these sixteen lanes. They differ from one another only where one of them
// has no fused multiply-add. Within one instruction set an operation always rounds alike: contraction is off, and
// `fma` is called by name.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace ISA {

constexpr int LANES = 16;

typedef float F32 __attribute__((vector_size(64), aligned(64), may_alias));
typedef int32_t I32 __attribute__((vector_size(64), aligned(64), may_alias));
typedef uint32_t U32 __attribute__((vector_size(64), aligned(64), may_alias));
typedef uint16_t U16 __attribute__((vector_size(32), aligned(32), may_alias));
typedef int8_t I8 __attribute__((vector_size(16), aligned(16), may_alias));
typedef uint8_t U8 __attribute__((vector_size(16), aligned(16), may_alias));
typedef int16_t I16 __attribute__((vector_size(32), aligned(32), may_alias));
typedef float F32x8 __attribute__((vector_size(32), may_alias));
typedef float F32x4 __attribute__((vector_size(16), may_alias));

template <class V>
INLINE V load(const void* from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}

template <class V>
INLINE void store(void* to, V v) {
  memcpy(to, &v, sizeof v);
}

INLINE F32 all(float x) { return F32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE I32 all(int32_t x) { return I32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE F32 zero() { return F32{}; }

// a * b + c: fused, except on baseline machines, which have no such instruction.
INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  union U { F32 v; __m256 h[2]; } x{a}, y{b}, z{c}, r;
  r.h[0] = _mm256_fmadd_ps(x.h[0], y.h[0], z.h[0]);
  r.h[1] = _mm256_fmadd_ps(x.h[1], y.h[1], z.h[1]);
  return r.v;
#elif defined(__ARM_NEON)
  union U { F32 v; float32x4_t q[4]; } x{a}, y{b}, z{c}, r;
  for (int i = 0; i < 4; i++) r.q[i] = vfmaq_f32(z.q[i], x.q[i], y.q[i]);
  return r.v;
#else
  return a * b + c;
#endif
}

// The same for one number, rounded as a lane of `fma` is.
INLINE float fma(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return __builtin_fmaf(a, b, c);
#else
  return a * b + c;
#endif
}

INLINE F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

INLINE F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#else
  return a < b ? a : b;
#endif
}

// Sum of all lanes, always in this order: halves, quarters, eighths, pairs.
INLINE float sum(F32 a) {
  F32x8 h = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  F32x4 q = __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

INLINE float largest(F32 a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a);
#else
  float m = a[0];
  for (int i = 1; i < LANES; i++) m = a[i] > m ? a[i] : m;
  return m;
#endif
}

// Lane i is `sum(a[i])`, in that very order of additions: sixteen sums for the price of four.
INLINE F32 sums(const F32* a) {
#if defined(__AVX512F__)
  // Each step adds halves of what is left of two sums and packs them into one register. The last two steps work
  // inside quarters, so the sums come out transposed: they go in transposed too.
  __m512 half[8], quarter[4], pair[2];
  for (int i = 0; i < 8; i++) {
    __m512 x = (__m512)a[4 * (2 * i % 4) + 2 * i / 4], y = (__m512)a[4 * ((2 * i + 1) % 4) + (2 * i + 1) / 4];
    half[i] = _mm512_shuffle_f32x4(x, y, 0x44) + _mm512_shuffle_f32x4(x, y, 0xEE);
  }
  for (int i = 0; i < 4; i++) {
    __m512 x = half[2 * i], y = half[2 * i + 1];
    quarter[i] = _mm512_shuffle_f32x4(x, y, 0x88) + _mm512_shuffle_f32x4(x, y, 0xDD);
  }
  for (int i = 0; i < 2; i++) {
    __m512d x = (__m512d)quarter[2 * i], y = (__m512d)quarter[2 * i + 1];
    pair[i] = (__m512)_mm512_unpacklo_pd(x, y) + (__m512)_mm512_unpackhi_pd(x, y);
  }
  return (F32)(_mm512_shuffle_ps(pair[0], pair[1], 0x88) + _mm512_shuffle_ps(pair[0], pair[1], 0xDD));
#elif defined(__AVX2__)
  union U { F32 v; __m256 h[2]; } r;
  for (int part = 0; part < 2; part++) {
    __m256 eighth[8], quarter[4], pair[2];
    for (int i = 0; i < 8; i++) {
      // As above, with four sums in each half of a register.
      U x{a[8 * part + 4 * (i % 2) + i / 2]};
      eighth[i] = x.h[0] + x.h[1];
    }
    for (int i = 0; i < 4; i++) {
      __m256 x = eighth[2 * i], y = eighth[2 * i + 1];
      quarter[i] = _mm256_permute2f128_ps(x, y, 0x20) + _mm256_permute2f128_ps(x, y, 0x31);
    }
    for (int i = 0; i < 2; i++) {
      __m256d x = (__m256d)quarter[2 * i], y = (__m256d)quarter[2 * i + 1];
      pair[i] = (__m256)_mm256_unpacklo_pd(x, y) + (__m256)_mm256_unpackhi_pd(x, y);
    }
    r.h[part] = _mm256_shuffle_ps(pair[0], pair[1], 0x88) + _mm256_shuffle_ps(pair[0], pair[1], 0xDD);
  }
  return r.v;
#else
  F32 r;
  for (int i = 0; i < LANES; i++) r[i] = sum(a[i]);
  return r;
#endif
}

INLINE F32 to_f32(I32 a) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_cvtepi32_ps(0xFFFF, (__m512i)a);
#else
  return __builtin_convertvector(a, F32);
#endif
}

// 16 bfloat16 numbers, widened.
INLINE F32 widen(U16 a) {
#if defined(__AVX512F__)
  return (F32)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)a), 16);
#else
  return (F32)(__builtin_convertvector(a, U32) << 16);
#endif
}

INLINE F32 load_bf16(const void* from) { return widen(load<U16>(from)); }

// Rounded to the nearest bfloat16, ties to even; NaN stays NaN.
INLINE U16 narrow(F32 a) {
  U32 bits = (U32)a;
  U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  U32 quiet = (bits >> 16) | 0x40;
  I32 nan = (I32)(a != a);
  return __builtin_convertvector((U32)((I32)quiet & nan) | (U32)((I32)rounded & ~nan), U16);
}

INLINE float bf16_to_float(uint16_t a) {
  uint32_t bits = (uint32_t)a << 16;
  float f;
  memcpy(&f, &bits, 4);
  return f;
}

INLINE uint16_t float_to_bf16(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  if (a != a) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16);
}

INLINE I32 widen(I8 a) {
#if defined(__AVX512F__)
  return (I32)_mm512_maskz_cvtepi8_epi32(0xFFFF, (__m128i)a);
#elif defined(__AVX2__)
  union U { I32 v; __m256i h[2]; } r;
  r.h[0] = _mm256_cvtepi8_epi32((__m128i)a);
  r.h[1] = _mm256_cvtepi8_epi32(_mm_srli_si128((__m128i)a, 8));
  return r.v;
#else
  return __builtin_convertvector(a, I32);
#endif
}

// 16 fp16 numbers, widened.
INLINE F32 widen_half(U16 a) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)a);
#elif defined(__F16C__)
  union H { U16 v; __m128i h[2]; } x{a};
  union U { F32 v; __m256 h[2]; } r;
  r.h[0] = _mm256_cvtph_ps(x.h[0]);
  r.h[1] = _mm256_cvtph_ps(x.h[1]);
  return r.v;
#else
  U32 bits = __builtin_convertvector(a, U32);
  // The exponent's bias differs by 112; the product is exact, and subnormal numbers come out right.
  F32 size = (F32)((bits & 0x7FFF) << 13) * all(0x1p112f);
  // Infinity and NaN keep all bits of the exponent.
  U32 endless = (U32)((bits & 0x7C00) == 0x7C00) & 0x7F800000;
  return (F32)((U32)size | endless | ((bits & 0x8000) << 16));
#endif
}

INLINE float half_to_float(uint16_t a) {
#if defined(__F16C__)
  return _cvtsh_ss(a);
#else
  uint32_t bits = (uint32_t)(a & 0x7FFF) << 13, sign = (uint32_t)(a & 0x8000) << 16;
  float size;
  memcpy(&size, &bits, 4);
  size *= 0x1p112f;
  if (bits >= 0x7C00u << 13) size = bits > 0x7C00u << 13 ? NAN : INFINITY;
  return sign ? -size : size;
#endif
}

// Rounded to the nearest fp16 number, ties to even; |a| is at most 65504.
INLINE uint16_t float_to_half(float a) {
  uint32_t bits;
  memcpy(&bits, &a, 4);
  uint32_t sign = bits >> 16 & 0x8000, size = bits & 0x7FFFFFFF;
  if (size >= 0x38800000) return (uint16_t)(sign | (size - 0x38000000 + 0xFFF + (size >> 13 & 1)) >> 13);
  // A subnormal number: adding 1/2 leaves its multiple of 2^-24 in the low bits.
  float rounded;
  memcpy(&rounded, &size, 4);
  rounded += 0.5f;
  memcpy(&size, &rounded, 4);
  return (uint16_t)(sign | (size - 0x3F000000));
}

// table[index] for each byte of index, whose upper four bits are zero.
INLINE I8 look_up(I8 table, U8 index) {
#if defined(__AVX2__)
  return (I8)_mm_shuffle_epi8((__m128i)table, (__m128i)index);
#elif defined(__ARM_NEON)
  return (I8)vqtbl1q_s8((int8x16_t)table, (uint8x16_t)index);
#else
  I8 r;
  for (int i = 0; i < LANES; i++) r[i] = table[index[i]];
  return r;
#endif
}

// e^a within 2 units in the last place; 0 below -87.3, which also takes in minus infinity.
// Cody and Waite's reduction, and the polynomial of Cephes' expf.
INLINE F32 exp(F32 a) {
  F32 x = max(a, all(-88.0f));
  F32 n = fma(x, all(1.44269504088896341f), all(12582912.0f)) - all(12582912.0f);
  F32 r = fma(n, all(-0.693359375f), x);
  r = fma(n, all(2.12194440e-4f), r);
  F32 p = all(1.9875691500e-4f);
  p = fma(p, r, all(1.3981999507e-3f));
  p = fma(p, r, all(8.3334519073e-3f));
  p = fma(p, r, all(4.1665795894e-2f));
  p = fma(p, r, all(1.6666665459e-1f));
  p = fma(p, r, all(5.0000001201e-1f));
  p = fma(p, r * r, r + all(1.0f));
  I32 power = __builtin_convertvector(n, I32);
  F32 result = p * (F32)((power + 127) << 23);
  return (F32)((I32)result & (I32)(a > all(-87.3f)));
}

// e^a, each lane rounded as the C library rounds it: within 0.51 units. For decays, whose errors a state compounds.
INLINE F32 exact_exp(F32 a) {
  for (int i = 0; i < LANES; i++) a[i] = expf(a[i]);
  return a;
}

}  // namespace ISA
