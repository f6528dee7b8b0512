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

INLINE F32 to_f32(I32 a) { return __builtin_convertvector(a, F32); }

// 16 bfloat16 numbers, widened.
INLINE F32 widen(U16 a) {
  return (F32)(__builtin_convertvector(a, U32) << 16);
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

}  // namespace ISA
