// What kernels do with sixteen floats at a time.
//
// Every instruction set sums in the order of these sixteen lanes. They differ from one another only where one of them
// has no fused multiply-add. Within one instruction set an operation always rounds alike: contraction is off, and
// `fma` is called by name.
#pragma once

#include <cmath>

#include "lanes.h"

namespace ISA {

#if defined(__AVX512F__)
INLINE F32 all(float x) { return F32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
INLINE I32 all(int32_t x) { return I32{x, x, x, x, x, x, x, x, x, x, x, x, x, x, x, x}; }
#else
template <class T>
INLINE Lanes<T> all(T x) {
  // gcc sees one instruction in this, and one for each lane in a loop over lanes. It keeps the sign of zero.
  const typename Lanes<T>::Register r = x - typename Lanes<T>::Register{};
  return by_register<Lanes<T>>([r](auto) INLINE_LAMBDA { return r; }, Lanes<T>{});
}
#endif
INLINE F32 zero() { return F32{}; }

// a * b + c: fused, except on baseline machines, which have no such instruction.
INLINE F32 fma(F32 a, F32 b, F32 c) {
#if defined(__AVX512F__)
  return (F32)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__FMA__)
  return by_register<F32>([](__m256 x, __m256 y, __m256 z) INLINE_LAMBDA { return (F32::Register)_mm256_fmadd_ps(x, y, z); }, a, b, c);
#elif defined(__ARM_NEON)
  return by_register<F32>([](float32x4_t x, float32x4_t y, float32x4_t z) INLINE_LAMBDA { return (F32::Register)vfmaq_f32(z, x, y); }, a, b, c);
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

// Lanes of ones where it holds, of zeros where not.
#if defined(__AVX512F__)
INLINE I32 more(F32 a, F32 b) { return (I32)(a > b); }
INLINE I32 more(I32 a, I32 b) { return (I32)(a > b); }
INLINE I32 same(I32 a, I32 b) { return (I32)(a == b); }
INLINE I32 is_nan(F32 a) { return (I32)(a != a); }
#else
template <class T>
INLINE I32 more(Lanes<T> a, Lanes<T> b) {
  return by_register<I32>([](auto x, auto y) INLINE_LAMBDA { return (I32::Register)(x > y); }, a, b);
}
INLINE I32 same(I32 a, I32 b) {
  return by_register<I32>([](auto x, auto y) INLINE_LAMBDA { return (I32::Register)(x == y); }, a, b);
}
INLINE I32 is_nan(F32 a) {
  return by_register<I32>([](auto x) INLINE_LAMBDA { return (I32::Register)(x != x); }, a);
}
#endif

INLINE F32 choose(I32 condition, F32 yes, F32 no) { return (F32)((condition & (I32)yes) | (~condition & (I32)no)); }

// b where one of them is NaN.
INLINE F32 max(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_max_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return by_register<F32>([](__m256 x, __m256 y) INLINE_LAMBDA { return (F32::Register)_mm256_max_ps(x, y); }, a, b);
#else
  return choose(more(a, b), a, b);
#endif
}

INLINE F32 min(F32 a, F32 b) {
#if defined(__AVX512F__)
  return (F32)_mm512_min_ps((__m512)a, (__m512)b);
#elif defined(__AVX2__)
  return by_register<F32>([](__m256 x, __m256 y) INLINE_LAMBDA { return (F32::Register)_mm256_min_ps(x, y); }, a, b);
#else
  return choose(more(b, a), a, b);
#endif
}

typedef float F32x4 __attribute__((vector_size(16), may_alias));

// Sums of lanes i, i + 4, i + 8 and i + 12: halves first, then quarters.
INLINE F32x4 quarters(F32 a) {
#if defined(__AVX512F__)
  typedef float F32x8 __attribute__((vector_size(32), may_alias));
  F32x8 h = __builtin_shufflevector(a, a, 0, 1, 2, 3, 4, 5, 6, 7) + __builtin_shufflevector(a, a, 8, 9, 10, 11, 12, 13, 14, 15);
  return __builtin_shufflevector(h, h, 0, 1, 2, 3) + __builtin_shufflevector(h, h, 4, 5, 6, 7);
#elif defined(__AVX2__)
  __m256 h = (__m256)(a.in[0] + a.in[1]);
  return (F32x4)_mm256_castps256_ps128(h) + (F32x4)_mm256_extractf128_ps(h, 1);
#else
  return (a.in[0] + a.in[2]) + (a.in[1] + a.in[3]);
#endif
}

// Sum of all lanes, always in this order: halves, quarters, eighths, pairs.
INLINE float sum(F32 a) {
  F32x4 q = quarters(a);
  return (q[0] + q[2]) + (q[1] + q[3]);
}

INLINE float largest(F32 a) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)a);
#else
  float lanes[LANES];
  store(lanes, a);
  for (int width = LANES / 2; width; width /= 2)
    for (int i = 0; i < width; i++) lanes[i] = lanes[i] > lanes[i + width] ? lanes[i] : lanes[i + width];
  return lanes[0];
#endif
}

#if defined(__AVX512F__)
// Lane i is what `op` makes of all lanes of a[i].
template <class Op>
INLINE F32 each_folded(const F32* a, Op op) {
  // Each step folds halves of what is left of two rows and packs them into one register. The last two steps work
  // inside quarters, so the results come out transposed: they go in transposed too.
  __m512 half[8], quarter[4], pair[2];
  for (int i = 0; i < 8; i++) {
    __m512 x = (__m512)a[4 * (2 * i % 4) + 2 * i / 4], y = (__m512)a[4 * ((2 * i + 1) % 4) + (2 * i + 1) / 4];
    half[i] = op(_mm512_shuffle_f32x4(x, y, 0x44), _mm512_shuffle_f32x4(x, y, 0xEE));
  }
  for (int i = 0; i < 4; i++) {
    __m512 x = half[2 * i], y = half[2 * i + 1];
    quarter[i] = op(_mm512_shuffle_f32x4(x, y, 0x88), _mm512_shuffle_f32x4(x, y, 0xDD));
  }
  for (int i = 0; i < 2; i++) {
    __m512d x = (__m512d)quarter[2 * i], y = (__m512d)quarter[2 * i + 1];
    pair[i] = op((__m512)_mm512_unpacklo_pd(x, y), (__m512)_mm512_unpackhi_pd(x, y));
  }
  return (F32)op(_mm512_shuffle_ps(pair[0], pair[1], 0x88), _mm512_shuffle_ps(pair[0], pair[1], 0xDD));
}
#endif

// Lane i is `largest(a[i])`.
INLINE F32 largests(const F32* a) {
#if defined(__AVX512F__)
  return each_folded(a, [](__m512 x, __m512 y) INLINE_LAMBDA { return _mm512_max_ps(x, y); });
#else
  float lanes[LANES];
  for (int i = 0; i < LANES; i++) lanes[i] = largest(a[i]);
  return load<F32>(lanes);
#endif
}

// Lane i is `sum(a[i])`, in that very order of additions: sixteen sums for the price of four.
INLINE F32 sums(const F32* a) {
#if defined(__AVX512F__)
  return each_folded(a, [](__m512 x, __m512 y) INLINE_LAMBDA { return x + y; });
#elif defined(__AVX2__)
  F32 r;
  for (int part = 0; part < 2; part++) {
    __m256 quarter[4], pair[2];
    for (int i = 0; i < 4; i++) {
      // As above, with four sums in each half of a register.
      const F32 &u = a[8 * part + i], &v = a[8 * part + 4 + i];
      __m256 x = (__m256)(u.in[0] + u.in[1]), y = (__m256)(v.in[0] + v.in[1]);
      quarter[i] = _mm256_permute2f128_ps(x, y, 0x20) + _mm256_permute2f128_ps(x, y, 0x31);
    }
    for (int i = 0; i < 2; i++) {
      __m256d x = (__m256d)quarter[2 * i], y = (__m256d)quarter[2 * i + 1];
      pair[i] = (__m256)_mm256_unpacklo_pd(x, y) + (__m256)_mm256_unpackhi_pd(x, y);
    }
    r.in[part] = (F32::Register)(_mm256_shuffle_ps(pair[0], pair[1], 0x88) + _mm256_shuffle_ps(pair[0], pair[1], 0xDD));
  }
  return r;
#else
  F32 r;
  for (int part = 0; part < 4; part++) {
    F32x4 pair[2];
    for (int i = 0; i < 2; i++) {
      F32x4 x = quarters(a[4 * part + 2 * i]), y = quarters(a[4 * part + 2 * i + 1]);
      pair[i] = __builtin_shufflevector(x, y, 0, 1, 4, 5) + __builtin_shufflevector(x, y, 2, 3, 6, 7);
    }
    r.in[part] = __builtin_shufflevector(pair[0], pair[1], 0, 2, 4, 6) + __builtin_shufflevector(pair[0], pair[1], 1, 3, 5, 7);
  }
  return r;
#endif
}

INLINE F32 to_f32(I32 a) {
#if defined(__AVX512F__)
  return (F32)_mm512_maskz_cvtepi32_ps(0xFFFF, (__m512i)a);
#else
  return by_register<F32>([](auto x) INLINE_LAMBDA { return __builtin_convertvector(x, F32::Register); }, a);
#endif
}

// Towards zero.
INLINE I32 to_i32(F32 a) {
#if defined(__AVX512F__)
  return __builtin_convertvector(a, I32);
#else
  return by_register<I32>([](auto x) INLINE_LAMBDA { return __builtin_convertvector(x, I32::Register); }, a);
#endif
}

INLINE U32 widen_bits(U16 a) {
#if defined(__AVX512F__)
  return (U32)_mm512_cvtepu16_epi32((__m256i)a);
#elif defined(__AVX2__)
  return by_register<U32>([](auto x) INLINE_LAMBDA { return (U32::Register)_mm256_cvtepu16_epi32((__m128i)x); }, a);
#else
  return by_register<U32>([](auto x) INLINE_LAMBDA { return __builtin_convertvector(x, U32::Register); }, a);
#endif
}

// The lower halves of numbers that have no upper ones.
INLINE U16 narrow_bits(U32 a) {
#if defined(__AVX512F__)
  return __builtin_convertvector(a, U16);
#elif defined(__AVX2__)
  return by_register<U16>([](auto x) INLINE_LAMBDA {
    __m256i y = (__m256i)x;
    return (U16::Register)_mm_packus_epi32(_mm256_castsi256_si128(y), _mm256_extracti128_si256(y, 1));
  }, a);
#else
  return by_register<U16>([](auto x) INLINE_LAMBDA { return __builtin_convertvector(x, U16::Register); }, a);
#endif
}

// 16 bfloat16 numbers, widened.
INLINE F32 widen(U16 a) { return (F32)(widen_bits(a) << 16); }

INLINE F32 load_bf16(const void* from) { return widen(load<U16>(from)); }

// Rounded to the nearest bfloat16, ties to even; NaN stays NaN.
INLINE U16 narrow(F32 a) {
  U32 bits = (U32)a;
  U32 rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16;
  U32 quiet = (bits >> 16) | 0x40;
  return narrow_bits((U32)choose(is_nan(a), (F32)quiet, (F32)rounded));
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
  __m128i low = (__m128i)a, high = _mm_srli_si128(low, 8);
  return I32{{(I32::Register)_mm256_cvtepi8_epi32(low), (I32::Register)_mm256_cvtepi8_epi32(high)}};
#elif defined(__SSE2__)
  __m128i x = (__m128i)a, low = _mm_unpacklo_epi8(x, x), high = _mm_unpackhi_epi8(x, x);
  I32 r{{(I32::Register)_mm_unpacklo_epi16(low, low), (I32::Register)_mm_unpackhi_epi16(low, low),
         (I32::Register)_mm_unpacklo_epi16(high, high), (I32::Register)_mm_unpackhi_epi16(high, high)}};
  return r >> 24;
#elif defined(__ARM_NEON)
  int16x8_t low = vmovl_s8(vget_low_s8((int8x16_t)a)), high = vmovl_high_s8((int8x16_t)a);
  return I32{{(I32::Register)vmovl_s16(vget_low_s16(low)), (I32::Register)vmovl_high_s16(low),
              (I32::Register)vmovl_s16(vget_low_s16(high)), (I32::Register)vmovl_high_s16(high)}};
#else
  int32_t wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = a[i];
  return load<I32>(wide);
#endif
}

// Sign-extended.
INLINE I16 widen_half_way(I8 a) {
#if defined(__AVX512F__)
  return (I16)_mm256_cvtepi8_epi16((__m128i)a);
#elif defined(__AVX2__)
  __m128i low = (__m128i)a, high = _mm_srli_si128(low, 8);
  return I16{{(I16::Register)_mm_cvtepi8_epi16(low), (I16::Register)_mm_cvtepi8_epi16(high)}};
#elif defined(__ARM_NEON)
  int16x8_t low = vmovl_s8(vget_low_s8((int8x16_t)a)), high = vmovl_high_s8((int8x16_t)a);
  return I16{{(I16::Register)vget_low_s16(low), (I16::Register)vget_high_s16(low), (I16::Register)vget_low_s16(high),
              (I16::Register)vget_high_s16(high)}};
#else
  int16_t wide[LANES];
  for (int i = 0; i < LANES; i++) wide[i] = a[i];
  return load<I16>(wide);
#endif
}

// 16 fp16 numbers, widened.
INLINE F32 widen_half(U16 a) {
#if defined(__AVX512F__)
  return (F32)_mm512_cvtph_ps((__m256i)a);
#elif defined(__F16C__)
  return by_register<F32>([](auto x) INLINE_LAMBDA { return (F32::Register)_mm256_cvtph_ps((__m128i)x); }, a);
#elif defined(__ARM_NEON)
  return by_register<F32>([](auto x) INLINE_LAMBDA { return (F32::Register)vcvt_f32_f16((float16x4_t)x); }, a);
#else
  U32 bits = widen_bits(a);
  // The exponent's bias differs by 112; the product is exact, and subnormal numbers come out right.
  F32 size = (F32)((bits & 0x7FFF) << 13) * all(0x1p112f);
  // Infinity and NaN keep all bits of the exponent.
  U32 endless = (U32)more((I32)(bits & 0x7C00), all((int32_t)0x7BFF)) & 0x7F800000;
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

// e^a within 2 units in the last place; 0 below -87.3, which also takes in minus infinity; NaN stays NaN.
// Cody and Waite's reduction, and the polynomial of Cephes' expf.
INLINE F32 exp(F32 a) {
  F32 x = max(all(-88.0f), a);
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
#if defined(__AVX512F__)
  const __mmask16 kept = _mm512_cmp_ps_mask((__m512)a, _mm512_set1_ps(-87.3f), _CMP_NLE_UQ);
  return (F32)_mm512_maskz_scalef_ps(kept, (__m512)p, (__m512)n);
#else
  I32 power = to_i32(n);
  F32 result = p * (F32)((power + 127) << 23);
  return choose(is_nan(a), a, (F32)((I32)result & more(a, all(-87.3f))));
#endif
}

// e^a, each lane rounded as the C library rounds it: within 0.51 units. For decays, whose errors a state compounds.
INLINE F32 exact_exp(F32 a) {
  float lanes[LANES];
  store(lanes, a);
  for (float& x : lanes) x = expf(x);
  return load<F32>(lanes);
}

// Lanes of even and of odd places in a row of 32 numbers.
INLINE void unzip(F32 low, F32 high, F32& even, F32& odd) {
#if defined(__AVX512F__)
  even = __builtin_shufflevector(low, high, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  odd = __builtin_shufflevector(low, high, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
#else
  for (int r = 0; r < REGISTERS; r++) {
    const F32& from = r < REGISTERS / 2 ? low : high;
    const int at = 2 * r % REGISTERS;
#if defined(__AVX2__)
    even.in[r] = __builtin_shufflevector(from.in[at], from.in[at + 1], 0, 2, 4, 6, 8, 10, 12, 14);
    odd.in[r] = __builtin_shufflevector(from.in[at], from.in[at + 1], 1, 3, 5, 7, 9, 11, 13, 15);
#else
    even.in[r] = __builtin_shufflevector(from.in[at], from.in[at + 1], 0, 2, 4, 6);
    odd.in[r] = __builtin_shufflevector(from.in[at], from.in[at + 1], 1, 3, 5, 7);
#endif
  }
#endif
}

}  // namespace ISA
