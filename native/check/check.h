// What the checks of single operations share: random numbers and a verdict.
//
// They compare an operation with a few lines of double arithmetic, need neither Python nor torch, and so run where
// those do not: cross-compiled under an emulator.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <vector>

typedef std::vector<float> Floats;

inline float random_number() {
  static uint64_t state = 88172645463325252ull;
  state ^= state << 13, state ^= state >> 7, state ^= state << 17;
  return (float)((double)(state >> 11) / 9007199254740992.0 * 2 - 1);
}

inline Floats random_floats(int64_t n) {
  Floats x((size_t)n);
  for (float& v : x) v = random_number();
  return x;
}

// Prints the largest difference as a fraction of the largest number; false beyond 2e-6.
inline bool close(const char* what, const Floats& got, const std::vector<double>& expected) {
  double largest = 0, difference = 0;
  for (const double x : expected) largest = std::fmax(largest, std::fabs(x));
  bool good = true;
  for (size_t i = 0; i < got.size(); i++) {
    const double d = std::fabs(got[i] - expected[i]);
    good = good && d <= 2e-6 * largest;  // false for NaN
    difference = std::fmax(difference, d);
  }
  printf("%-16s %.1e %s\n", what, difference / largest, good ? "ok" : "WRONG");
  return good;
}
