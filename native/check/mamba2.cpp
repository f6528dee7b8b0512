// Mamba-2's rule against its recurrence in double.
#include "../mamba2.cpp"

#include "step.h"

int main() {
  constexpr int64_t HEADS = 9, GROUPS = 1, P = 10, S = 40, TAPS = 4;
  const Step before(HEADS * P + 2 * GROUPS * S, TAPS);
  Floats dt = random_floats(Step::TOKENS * HEADS), dt_log = random_floats(Step::SLOTS * Step::DRAFTS * HEADS);
  Floats a = random_floats(HEADS), d = random_floats(HEADS);
  for (Floats* x : {&dt, &dt_log})
    for (float& v : *x) v = std::fabs(v);
  for (float& v : a) v = -std::fabs(v);
  Floats state = random_floats(Step::SLOTS * HEADS * P * S), out((size_t)(Step::TOKENS * HEADS * P));
  std::vector<double> expected(out.size()), expected_state(state.begin(), state.end());

  for (int64_t row = 0; row < Step::ROWS; row++) {
    for (int64_t h = 0; h < HEADS; h++) {
      double* kept = &expected_state[(size_t)((before.slot[row] * HEADS + h) * P * S)];
      std::vector<double> s(kept, kept + P * S);
      for (int64_t place = 0; place < before.places(row); place++) {
        const double time = before.at(row, place, dt, dt_log, HEADS, h), keep = std::exp(time * a[(size_t)h]);
        for (int64_t p = 0; p < P; p++) {
          const double x = before.mixed(row, place, h * P + p);
          double y = d[(size_t)h] * x;
          for (int64_t i = 0; i < S; i++) {
            double& state_pi = s[(size_t)(p * S + i)];
            state_pi = state_pi * keep + time * x * before.mixed(row, place, HEADS * P + i);
            y += state_pi * before.mixed(row, place, HEADS * P + S + i);
          }
          if (place >= before.replay[row])
            expected[(size_t)((before.gather[row][place - before.replay[row]] * HEADS + h) * P + p)] = y;
        }
        if (place + 1 == before.kept(row)) std::copy(s.begin(), s.end(), kept);
      }
    }
  }

  Step step = before;
  const Mamba2 arguments{step.timeline(), dt.data(), dt_log.data(), a.data(), d.data(), state.data(), out.data(),
                         HEADS, GROUPS, P, S};
  JOIN(truekv_, mamba2, _, ISA)(&arguments);
  return !(close("mamba2 output", out, expected) & close("mamba2 state", state, expected_state));
}
