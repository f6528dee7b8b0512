// AMX: eight registers that are tiles of up to 16 rows of 64 bytes, and products of whole tiles.
//
//   sums [rows][16] += left [rows][groups of four bytes] x right [groups of four bytes][16][four bytes]
//
// Few machines have them. Built with -DTILES=emulated (`make amx`) they are arrays, so that what is computed with them
// can be tested on any machine with AVX-512; and they can be broken, so that the trial of the real ones can be tested.
#pragma once

#include "simd.h"

#if defined(TILES) && TILES == 2
#include <unistd.h>

extern "C" int truekv_broken_tiles;
#endif

namespace ISA {
namespace {

#if defined(TILES)

constexpr int TILE_LINES = 16;
constexpr int64_t TILE_BYTES = 64;  // of a line

// How many lines, and bytes of each, the eight tiles have: Intel's palette 1, as ldtilecfg reads it.
struct alignas(64) Palette {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t lines[16] = {};

  void set(int tile, int64_t of_lines, int64_t of_bytes) {
    lines[tile] = (uint8_t)of_lines;
    bytes[tile] = (uint16_t)of_bytes;
  }
};

#if TILES == 2

struct Emulated {
  Palette palette;
  alignas(64) uint8_t bytes[8][TILE_LINES][TILE_BYTES];
};
inline thread_local Emulated emulated;

enum Broken { NOTHING, PAIRS, SIGNED, UNSIGNED, THREADS, LINES, CLEARED };
INLINE bool broken(Broken what) { return truekv_broken_tiles == what; }

// Broken, it does nothing but in the first thread of the process.
INLINE void use(const Palette& palette) {
  if (broken(THREADS) && gettid() != getpid()) return;
  emulated.palette = palette;
  memset(emulated.bytes, 0, sizeof emulated.bytes);
}

INLINE void release() { emulated.palette = Palette(); }

template <int TO>
INLINE void clear() {
  if (!broken(CLEARED)) memset(emulated.bytes[TO], 0, sizeof emulated.bytes[TO]);
}

// Broken, it forgets the last of sixteen lines.
template <int TO>
INLINE void load_tile(const void* from, int64_t stride) {
  memset(emulated.bytes[TO], 0, sizeof emulated.bytes[TO]);
  const int64_t lines = emulated.palette.lines[TO] - (broken(LINES) && emulated.palette.lines[TO] == TILE_LINES);
  for (int64_t i = 0; i < lines; i++)
    memcpy(emulated.bytes[TO][i], (const uint8_t*)from + i * stride, emulated.palette.bytes[TO]);
}

template <int FROM>
INLINE void store_tile(void* to, int64_t stride) {
  for (int64_t i = 0; i < emulated.palette.lines[FROM]; i++)
    memcpy((uint8_t*)to + i * stride, emulated.bytes[FROM][i], emulated.palette.bytes[FROM]);
}

// For every sum: what `add` makes of the groups of four bytes that meet there. Shapes that do not fit end the program,
// as they do on the machine.
template <class Sum, class Add>
INLINE void each_sum(int sums, int left, int right, Add add) {
  const Palette& p = emulated.palette;
  if (p.lines[sums] != p.lines[left] || p.bytes[sums] != p.bytes[right] || p.bytes[left] != 4 * p.lines[right]) __builtin_trap();
  for (int i = 0; i < p.lines[sums]; i++)
    for (int j = 0; j < p.bytes[sums] / 4; j++) {
      Sum* sum = (Sum*)emulated.bytes[sums][i] + j;
      *sum = add(*sum, p.lines[right], [=](int k) { return emulated.bytes[left][i] + 4 * k; },
                 [=](int k) { return emulated.bytes[right][k] + 4 * j; });
    }
}

// As TDPBF16PS does it: even and odd products are summed apart, and both sums are added to what was there. Broken, the
// numbers of a pair meet crosswise.
template <int SUMS, int LEFT, int RIGHT>
void dot_bf16() {
  each_sum<float>(SUMS, LEFT, RIGHT, [](float sum, int groups, auto x, auto w) {
    float part[2] = {0, 0};
    for (int k = 0; k < groups; k++)
      for (int odd = 0; odd < 2; odd++) {
        uint16_t a, b;
        memcpy(&a, x(k) + 2 * odd, 2);
        memcpy(&b, w(k) + 2 * (odd ^ broken(PAIRS)), 2);
        part[odd] = __builtin_fmaf(bf16_to_float(a), bf16_to_float(b), part[odd]);
      }
    return sum + (part[0] + part[1]);
  });
}

template <int SUMS, int LEFT, int RIGHT, class Left>
void dot_bytes() {
  each_sum<int32_t>(SUMS, LEFT, RIGHT, [](int32_t sum, int groups, auto x, auto w) {
    for (int k = 0; k < groups; k++)
      for (int i = 0; i < 4; i++) sum += (int32_t)(Left)x(k)[i] * (int8_t)w(k)[i];
    return sum;
  });
}

// Broken, they take the bytes on the left for the other kind.
template <int SUMS, int LEFT, int RIGHT>
void dot_signed() {
  broken(SIGNED) ? dot_bytes<SUMS, LEFT, RIGHT, uint8_t>() : dot_bytes<SUMS, LEFT, RIGHT, int8_t>();
}
template <int SUMS, int LEFT, int RIGHT>
void dot_unsigned() {
  broken(UNSIGNED) ? dot_bytes<SUMS, LEFT, RIGHT, int8_t>() : dot_bytes<SUMS, LEFT, RIGHT, uint8_t>();
}

#else

// In assembly, because gcc's own names of these instructions take no template's number. gcc knows no tile registers, so
// the order of these statements is that of the source.
INLINE void use(const Palette& palette) { asm volatile("ldtilecfg %0" ::"m"(palette)); }
INLINE void release() { asm volatile("tilerelease" ::: "memory"); }

template <int TO> INLINE void clear() { asm volatile("tilezero %%tmm%c0" ::"i"(TO)); }

template <int TO>
INLINE void load_tile(const void* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" ::"r"(from), "r"(stride), "i"(TO) : "memory");
}

template <int FROM>
INLINE void store_tile(void* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" ::"r"(to), "r"(stride), "i"(FROM) : "memory");
}

// AT&T order: the right factor comes first.
#define PRODUCT(name, instruction)                                                                     \
  template <int SUMS, int LEFT, int RIGHT>                                                             \
  INLINE void name() {                                                                                 \
    asm volatile(instruction " %%tmm%c2, %%tmm%c1, %%tmm%c0" ::"i"(SUMS), "i"(LEFT), "i"(RIGHT));      \
  }
PRODUCT(dot_bf16, "tdpbf16ps")
PRODUCT(dot_signed, "tdpbssd")
PRODUCT(dot_unsigned, "tdpbusd")  // left unsigned, right signed
#undef PRODUCT

#endif
#endif

}  // namespace
}  // namespace ISA
