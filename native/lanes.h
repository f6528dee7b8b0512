// Vectors of sixteen numbers, the one width of all kernels, and their arithmetic.
//
// AVX-512 has registers for them. On other machines a vector is an array of registers, and register i of every type
// holds the same lanes. gcc has vectors wider than a register too, but keeps them in memory, and takes their
// comparisons and conversions apart number by number.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__SSE2__)
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace ISA {

constexpr int LANES = 16;

typedef int8_t I8 __attribute__((vector_size(16), aligned(16), may_alias));
typedef uint8_t U8 __attribute__((vector_size(16), aligned(16), may_alias));

#if defined(__AVX512F__)
typedef float F32 __attribute__((vector_size(64), aligned(64), may_alias));
typedef int32_t I32 __attribute__((vector_size(64), aligned(64), may_alias));
typedef uint32_t U32 __attribute__((vector_size(64), aligned(64), may_alias));
typedef uint16_t U16 __attribute__((vector_size(32), aligned(32), may_alias));
typedef int16_t I16 __attribute__((vector_size(32), aligned(32), may_alias));
#else

#if defined(__AVX2__)
constexpr int REGISTERS = 2;
#else
constexpr int REGISTERS = 4;
#endif

template <class T>
struct Lanes {
  static constexpr int HELD = LANES / REGISTERS;
  typedef T Register __attribute__((vector_size(HELD * sizeof(T)), may_alias));
  Register in[REGISTERS];

  // The same bits as numbers of another type.
  template <class S>
  INLINE explicit operator Lanes<S>() const {
    static_assert(sizeof(S) == sizeof(T), "");
    return by_register<Lanes<S>>([](Register x) INLINE_LAMBDA { return (typename Lanes<S>::Register)x; }, *this);
  }
  INLINE T operator[](int lane) const { return in[lane / HELD][lane % HELD]; }

#define OPERATOR(op)                                                                                             \
  friend INLINE Lanes operator op(const Lanes& a, const Lanes& b) {                                              \
    return by_register<Lanes>([](Register x, Register y) INLINE_LAMBDA -> Register { return x op y; }, a, b);    \
  }                                                                                                              \
  friend INLINE Lanes operator op(const Lanes& a, T b) {                                                         \
    return by_register<Lanes>([b](Register x) INLINE_LAMBDA -> Register { return x op b; }, a);                  \
  }                                                                                                              \
  friend INLINE Lanes& operator op##=(Lanes& a, const Lanes& b) { return a = a op b; }
  OPERATOR(+) OPERATOR(-) OPERATOR(*) OPERATOR(/) OPERATOR(&) OPERATOR(|) OPERATOR(<<) OPERATOR(>>)
#undef OPERATOR
  friend INLINE Lanes operator~(const Lanes& a) {
    return by_register<Lanes>([](Register x) INLINE_LAMBDA -> Register { return ~x; }, a);
  }

  // To { op(registers 0), op(registers 1), ... }
  template <class To, class Op, class... From>
  static INLINE To by_register(Op op, const From&... from) {
    return one_by_one<To>(std::make_integer_sequence<int, REGISTERS>(), op, from...);
  }

 private:
  template <class To, int... R, class Op, class... From>
  static INLINE To one_by_one(std::integer_sequence<int, R...>, Op op, const From&... from) {
    return To{{single<R>(op, from...)...}};
  }
  template <int R, class Op, class... From>
  static INLINE auto single(Op op, const From&... from) { return op(from.in[R]...); }
};

typedef Lanes<float> F32;
typedef Lanes<int32_t> I32;
typedef Lanes<uint32_t> U32;
typedef Lanes<uint16_t> U16;
typedef Lanes<int16_t> I16;

template <class To, class Op, class... From>
INLINE To by_register(Op op, const From&... from) { return To::template by_register<To>(op, from...); }
#endif

// At any address. (gcc may move the bytes of a memcpy through general registers.)
template <class V>
struct __attribute__((packed, may_alias)) Loose {
  V v;
};

template <class V>
INLINE V load(const void* from) { return ((const Loose<V>*)from)->v; }

template <class V>
INLINE void store(void* to, V v) { ((Loose<V>*)to)->v = v; }

}  // namespace ISA
