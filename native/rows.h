// The inner loops of attention over rows of any code: scores, weighted sums and decoding in f32.
#pragma once

#include <algorithm>
#include <type_traits>

#include "formats.h"

namespace ISA {
namespace {

constexpr int KEYS = 32;    // of one block
#if defined(__AVX512F__)
constexpr int SUMS = 16;    // running sums in registers
constexpr int DIRECT = 4;   // rows (but not three) up to which keys and values go from the decoder into sums without being written down
#else
constexpr int SUMS = 4;
constexpr int DIRECT = 0;
#endif

// Rows that will be needed later. Whoever computes fetches a few lines of them at each of its steps.
// Into the second level: in the first, what is fetched and what is in use would push each other out (half the speed).
struct Ahead {
  const uint8_t *at = nullptr, *end = nullptr;
  int step = 64;

  INLINE Ahead in(int64_t steps) const { return {at, end, (int)((end - at + 64 * steps - 1) / (64 * steps)) * 64}; }
  INLINE void fetch() {
    if (at >= end) return;
    for (int i = 0; i < step; i += 64) __builtin_prefetch(at + i, 0, 2);
    at += step;
  }
};

// scores[r][t] = sum over lanes of query r * key t, for ROWS queries and all tokens, in units of the key.
// A few tokens beyond the last one may be scored too, so that sixteen sums are added up at once.
template <class D, int ROWS>
void score(const D& decoder, const uint8_t* keys, int bytes, int units, const float* query, int lanes, int tokens,
           float* scores, Ahead ahead) {
  constexpr int TOKENS = LANES / ROWS, AT_ONCE = std::max(1, SUMS / ROWS);
  ahead = ahead.in((tokens + TOKENS - 1) / TOKENS * std::max(1, TOKENS / AT_ONCE) * units);
  for (int t = 0; t < tokens; t += TOKENS) {
    F32 total[LANES];
#pragma GCC unroll 4
    for (int first = 0; first < TOKENS; first += AT_ONCE) {
      F32 part[ROWS * AT_ONCE];
#pragma GCC unroll 16
      for (int i = 0; i < ROWS * AT_ONCE; i++) part[i] = zero();
      const uint8_t* row = keys + (int64_t)(t + first) * bytes;
      for (int unit = 0; unit < units; unit++) {
        ahead.fetch();
        const float* q = query + unit * D::VECTORS * LANES;
#pragma GCC unroll 16
        for (int i = 0; i < AT_ONCE; i++) {
          F32 key[D::VECTORS];
          decoder.read(row + i * bytes, unit, key);
#pragma GCC unroll 8
          for (int v = 0; v < D::VECTORS; v++)
#pragma GCC unroll 8
            for (int r = 0; r < ROWS; r++)
              part[r * AT_ONCE + i] = fma(key[v], load<F32>(q + r * lanes + v * LANES), part[r * AT_ONCE + i]);
        }
      }
#pragma GCC unroll 16
      for (int i = 0; i < ROWS * AT_ONCE; i++) total[i / AT_ONCE * TOKENS + first + i % AT_ONCE] = part[i];
    }
    alignas(64) float added[LANES];
    store(added, sums(total));
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) memcpy(scores + r * KEYS + t, added + r * TOKENS, TOKENS * sizeof(float));
  }
}

// mean[r] += weights[r][t] * value t, token after token, for ROWS rows and `count` units of lanes from `unit` on.
template <class D, int ROWS, int UNITS>
INLINE void weigh_units(const D& decoder, const uint8_t* values, int bytes, int unit, const float* weights, int tokens,
                        float* mean, int lanes, Ahead& ahead) {
  constexpr int VECTORS = UNITS * D::VECTORS;
  F32 total[ROWS][VECTORS];
  float* at = mean + unit * D::VECTORS * LANES;
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) total[r][v] = load<F32>(at + r * lanes + v * LANES);
  for (int t = 0; t < tokens; t++) {
    ahead.fetch();
    F32 value[VECTORS];
#pragma GCC unroll 8
    for (int u = 0; u < UNITS; u++) decoder.read(values + t * bytes, unit + u, value + u * D::VECTORS);
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      F32 weight = all(weights[r * KEYS + t]);
#pragma GCC unroll 8
      for (int v = 0; v < VECTORS; v++) total[r][v] = fma(weight, value[v], total[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 8
    for (int v = 0; v < VECTORS; v++) store(at + r * lanes + v * LANES, total[r][v]);
}

template <class D, int ROWS>
void weigh(const D& decoder, const uint8_t* values, int bytes, int units, const float* weights, int tokens, float* mean,
           int lanes, Ahead ahead) {
  constexpr int MOST = std::max(1, std::min(8, SUMS / ROWS) / D::VECTORS);
  ahead = ahead.in(tokens * (units / MOST + units % MOST));
  int unit = 0;
  for (; unit + MOST <= units; unit += MOST)
    weigh_units<D, ROWS, MOST>(decoder, values, bytes, unit, weights, tokens, mean, lanes, ahead);
  for (; unit < units; unit++)
    weigh_units<D, ROWS, 1>(decoder, values, bytes, unit, weights, tokens, mean, lanes, ahead);
}

// Writes the numbers of `tokens` rows, in units of their rows, to [tokens, lanes].
template <class D>
void decode(const D& decoder, const uint8_t* rows, int bytes, int units, int tokens, float* to, Ahead ahead) {
  ahead = ahead.in(tokens);
  for (int t = 0; t < tokens; t++) {
    ahead.fetch();
    for (int unit = 0; unit < units; unit++) {
      F32 out[D::VECTORS];
      decoder.read(rows + t * bytes, unit, out);
#pragma GCC unroll 8
      for (int v = 0; v < D::VECTORS; v++, to += LANES) store(to, out[v]);
    }
  }
}

// Runs `op<decoder, 1, 2 or 4 rows>` over any number of rows.
template <class Op>
INLINE void in_fours(int rows, Op op) {
  int r = 0;
  for (; r + 4 <= rows; r += 4) op(r, std::integral_constant<int, 4>());
  if (r + 2 <= rows) op(r, std::integral_constant<int, 2>()), r += 2;
  if (r < rows) op(r, std::integral_constant<int, 1>());
}

}  // namespace
}  // namespace ISA
