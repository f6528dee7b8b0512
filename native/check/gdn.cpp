// The gated delta rule against its recurrence in double.
#include "../gdn.cpp"

#include "step.h"

int main() {
  constexpr int64_t KEY_HEADS = 2, HEADS = 6, D = 20, V = 72, TAPS = 4;
  const Step before(2 * KEY_HEADS * D + HEADS * V, TAPS);
  Floats beta = random_floats(Step::TOKENS * HEADS), decay = random_floats(Step::TOKENS * HEADS);
  Floats beta_log = random_floats(Step::SLOTS * Step::DRAFTS * HEADS), decay_log = random_floats(Step::SLOTS * Step::DRAFTS * HEADS);
  Floats state = random_floats(Step::SLOTS * HEADS * D * V), out((size_t)(Step::TOKENS * HEADS * V));
  std::vector<double> expected(out.size()), expected_state(state.begin(), state.end());

  for (int64_t row = 0; row < Step::ROWS; row++) {
    for (int64_t h = 0; h < HEADS; h++) {
      double* kept = &expected_state[(size_t)((before.slot[row] * HEADS + h) * D * V)];
      std::vector<double> s(kept, kept + D * V);
      for (int64_t place = 0; place < before.places(row); place++) {
        double q[D], k[D], qq = 1e-6, kk = 1e-6;
        for (int64_t i = 0; i < D; i++) {
          q[i] = before.mixed(row, place, h / (HEADS / KEY_HEADS) * D + i), qq += q[i] * q[i];
          k[i] = before.mixed(row, place, (KEY_HEADS + h / (HEADS / KEY_HEADS)) * D + i), kk += k[i] * k[i];
        }
        const double keep = std::exp(before.at(row, place, decay, decay_log, HEADS, h));
        for (int64_t v = 0; v < V; v++) {
          double error = before.mixed(row, place, 2 * KEY_HEADS * D + h * V + v), y = 0;
          for (int64_t i = 0; i < D; i++) error -= (s[(size_t)(i * V + v)] *= keep) * k[i] / std::sqrt(kk);
          error *= before.at(row, place, beta, beta_log, HEADS, h);
          for (int64_t i = 0; i < D; i++) y += (s[(size_t)(i * V + v)] += error * k[i] / std::sqrt(kk)) * q[i];
          if (place >= before.replay[row])
            expected[(size_t)((before.gather[row][place - before.replay[row]] * HEADS + h) * V + v)] = y / std::sqrt(qq * D);
        }
        if (place + 1 == before.kept(row)) std::copy(s.begin(), s.end(), kept);
      }
    }
  }

  Step step = before;
  const Gdn arguments{step.timeline(), beta.data(), decay.data(), beta_log.data(), decay_log.data(), state.data(), out.data(),
                      HEADS, KEY_HEADS, D, V};
  JOIN(truekv_, gdn, _, ISA)(&arguments);
  return !(close("gdn output", out, expected) & close("gdn state", state, expected_state));
}
