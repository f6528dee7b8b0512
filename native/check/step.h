// A step over four sequences, for the checks of recurrent rules.
#pragma once

#include "../conv.h"
#include "check.h"

// Four sequences: one token after two replayed ones, a prompt longer than a run, one guess of four that is certain, and
// nothing at all.
struct Step {
  static constexpr int64_t ROWS = 4, LONGEST = 37, TOKENS = 42, SLOTS = 5, DRAFTS = 3;
  int64_t count[ROWS] = {1, 37, 4, 0}, certain[ROWS] = {1, 37, 1, 0}, replay[ROWS] = {2, 0, 1, 0}, slot[ROWS] = {2, 0, 4, 1};
  int64_t gather[ROWS][LONGEST];
  int64_t channels, taps;
  Floats inputs, weights, bias, tail, log;

  Step(int64_t channels, int64_t taps)
      : channels(channels), taps(taps), inputs(random_floats(TOKENS * channels)), weights(random_floats(channels * taps)),
        bias(random_floats(channels)), tail(random_floats(SLOTS * channels * (taps - 1))),
        log(random_floats(SLOTS * DRAFTS * channels)) {
    for (int64_t row = 0, start = 0; row < ROWS; start += count[row++])
      for (int64_t q = 0; q < LONGEST; q++) gather[row][q] = start + (q < count[row] ? q : 0);
  }

  int64_t places(int64_t row) const { return replay[row] + count[row]; }
  int64_t kept(int64_t row) const { return replay[row] + certain[row]; }

  // What head `head` of a place's token brings, of inputs [TOKENS, heads] or the log [SLOTS, DRAFTS, heads].
  double at(int64_t row, int64_t place, const Floats& now, const Floats& logged, int64_t heads, int64_t head) const {
    const int64_t entry = slot[row] * DRAFTS + place, token = gather[row][place < replay[row] ? 0 : place - replay[row]];
    return place < replay[row] ? logged[(size_t)(entry * heads + head)] : now[(size_t)(token * heads + head)];
  }

  // Convolution and silu of one channel at one place.
  double mixed(int64_t row, int64_t place, int64_t channel) const {
    double x = bias[(size_t)channel];
    for (int64_t k = 0; k < taps; k++) {
      const int64_t from = place - (taps - 1) + k;
      const double value = from < 0 ? tail[(size_t)((slot[row] * channels + channel) * (taps - 1) + taps - 1 + from)]
                                    : at(row, from, inputs, log, channels, channel);
      x += value * weights[(size_t)(channel * taps + k)];
    }
    return x / (1 + std::exp(-x));
  }

  // Its last two vectors are written to, so give the operation a copy of this one.
  Timeline timeline() {
    return {&gather[0][0], count, certain, replay, slot, inputs.data(), weights.data(), bias.data(), tail.data(), log.data(),
            ROWS, LONGEST, TOKENS, channels, channels, taps, DRAFTS, 0};
  }
};
