// One field of one layer as it lies in memory, and the frame that its rows are stored in.
//
//     page = ... | head 0 { codes [tokens][row] | scales fp16 [tokens] } | head 1 ... | ...
#pragma once

#include "formats.h"

// Mirrored by truekv.kernels.native.stored.Stored.
struct Stored {
  uint8_t* data;               // this field in page 0
  int64_t page_bytes, head_bytes;
  const float *centre, *scale; // [heads, dim], or null
  const double* signs;         // [dim] of +1 and -1, or null where rows are not rotated
  const double* paley;         // [order, order] of +1 and -1
  int32_t order, code, dim, heads, page_tokens, unused;
};

namespace ISA {
namespace {

constexpr int LONGEST = 1024;  // dims of a row: sums of so many numbers on the grid of `rotated` are exact

INLINE uint8_t* head_in_page(const Stored& s, int64_t page, int64_t head) {
  return s.data + page * s.page_bytes + head * s.head_bytes;
}

// Of n numbers, a multiple of sixteen; what is no number counts as zero.
INLINE float absolute_maximum(const float* x, int n) {
  F32 most = zero();
  for (int i = 0; i < n; i += LANES) most = max((F32)((I32)load<F32>(x + i) & all((int32_t)0x7fffffff)), most);
  return largest(most);
}

// Rounds to multiples of 2^-42 of the largest magnitude or finer, whose sums are exact: see on_grid in formats/planes.py.
INLINE double grid_shift(float largest) { return (double)largest * 4096.0; }
INLINE double on_grid(double x, double shift) { return (x + shift) - shift; }

// Sylvester's matrix of the order `width` times each of `count` consecutive vectors, in place.
INLINE void sylvester(double* x, int count, int width) {
  int half = 1;
  if (width >= 8) {
    // Three rounds at once, without a loop of one to four numbers.
    for (double* at = x; at < x + count * width; at += 8) {
      double a[8], b[8];
      for (int i = 0; i < 8; i += 2) a[i] = at[i] + at[i + 1], a[i + 1] = at[i] - at[i + 1];
      for (int i = 0; i < 8; i++) b[i] = i & 2 ? a[i - 2] - a[i] : a[i] + a[i + 2];
      for (int i = 0; i < 4; i++) at[i] = b[i] + b[i + 4], at[i + 4] = b[i] - b[i + 4];
    }
    half = 8;
  }
  for (; half < width; half *= 2)
    for (int i = 0; i < count * width; i += 2 * half)
      for (int j = i; j < i + half; j++) {
        double a = x[j], b = x[j + half];
        x[j] = a + b, x[j + half] = a - b;
      }
}

// Paley's matrix, or its transpose, times the vectors' numbers at each place: y[p] = sum_q P[p, q] x[q].
INLINE void paley(const Stored& s, bool transposed, const double* x, double* y) {
  int width = s.dim / s.order;
  for (int p = 0; p < s.order; p++)
    for (int i = 0; i < width; i++) {
      double total = 0;
      for (int q = 0; q < s.order; q++)
        total += s.paley[transposed ? q * s.order + p : p * s.order + q] * x[q * width + i];
      y[p * width + i] = total;
    }
}

// x <- H x, or H^T x: every sum is exact, so the bits are those of the matrix product in formats/rotation.py.
inline void rotate(const Stored& s, bool transposed, float* x) {
  alignas(64) double grid[LONGEST], mixed[LONGEST];
  double shift = grid_shift(absolute_maximum(x, s.dim));
  for (int i = 0; i < s.dim; i++) grid[i] = on_grid((double)x[i], shift) * (transposed ? 1.0 : s.signs[i]);
  sylvester(grid, s.order, s.dim / s.order);
  double* y = grid;
  if (s.order > 1) paley(s, transposed, grid, y = mixed);
  double norm = 1.0 / sqrt((double)s.dim);
  // A sum of zeros is +0 in a matrix product, and may be -0 here.
  for (int i = 0; i < s.dim; i++) x[i] = (float)((y[i] * (transposed ? s.signs[i] : 1.0) + 0.0) * norm);
}

INLINE void read_row(const void* from, bool bf16, int64_t at, int dim, float* x) {
  if (bf16) for (int i = 0; i < dim; i++) x[i] = bf16_to_float(((const uint16_t*)from)[at + i]);
  else memcpy(x, (const float*)from + at, dim * sizeof(float));
}

// x <- H((x - c) / s), as it is stored.
inline void into_frame(const Stored& s, int64_t head, float* x) {
  if (s.centre) for (int i = 0; i < s.dim; i++) x[i] -= s.centre[head * s.dim + i];
  if (s.scale) for (int i = 0; i < s.dim; i++) x[i] /= s.scale[head * s.dim + i];
  if (s.signs) rotate(s, false, x);
}

// q <- H(s q), which meets stored keys.
inline void query_into_frame(const Stored& s, int64_t head, float* q) {
  if (s.scale) for (int i = 0; i < s.dim; i++) q[i] *= s.scale[head * s.dim + i];
  if (s.signs) rotate(s, false, q);
}

// o <- c + s H^T o, an average of rows as they were before they were stored.
inline void out_of_frame(const Stored& s, int64_t head, float* o) {
  if (s.signs) rotate(s, true, o);
  if (s.scale) for (int i = 0; i < s.dim; i++) o[i] *= s.scale[head * s.dim + i];
  if (s.centre) for (int i = 0; i < s.dim; i++) o[i] += s.centre[head * s.dim + i];
}

}  // namespace
}  // namespace ISA
