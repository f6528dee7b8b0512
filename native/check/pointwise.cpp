// Row operations against double arithmetic.
#include "../pointwise.cpp"

#include "check.h"

int main() {
  constexpr int64_t ROWS = 11, DIM = 77;
  const Floats x = random_floats(ROWS * DIM), gain = random_floats(DIM);
  Floats out(x.size());
  std::vector<double> expected(x.size());
  for (size_t row = 0; row < ROWS; row++) {
    double squares = 0;
    for (size_t i = 0; i < DIM; i++) squares += (double)x[row * DIM + i] * x[row * DIM + i];
    for (size_t i = 0; i < DIM; i++)
      expected[row * DIM + i] = x[row * DIM + i] / std::sqrt(squares / DIM + 1e-6) * gain[i];
  }
  const RmsNorm arguments{x.data(), nullptr, gain.data(), nullptr, out.data(), ROWS, 1, DIM, DIM, DIM, 1e-6f, 0};
  JOIN(truekv_, rms_norm, _, ISA)(&arguments);
  return !close("rms_norm", out, expected);
}
