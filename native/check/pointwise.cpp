// Operations on rows against double arithmetic, at a dim that is no multiple of a vector.
#include "../pointwise.cpp"

#include <algorithm>

#include "check.h"

constexpr int64_t ROWS = 11, DIM = 77;
typedef std::vector<double> Doubles;

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }
double silu(double x) { return x * sigmoid(x); }
double softplus(double x) { return std::log1p(std::exp(x)); }

// Of each row of `dim`, the inverse of its root mean square.
Doubles factors(const Doubles& x, int64_t dim) {
  Doubles found;
  for (size_t row = 0; row < x.size() / dim; row++) {
    double squares = 0;
    for (int64_t i = 0; i < dim; i++) squares += x[row * dim + i] * x[row * dim + i];
    found.push_back(1 / std::sqrt(squares / dim + 1e-6));
  }
  return found;
}

template <class F>
Doubles each(int64_t rows, int64_t dim, F number) {
  Doubles all;
  for (int64_t row = 0; row < rows; row++)
    for (int64_t i = 0; i < dim; i++) all.push_back(number(row, i));
  return all;
}

bool norms() {
  const Floats x = random_floats(ROWS * DIM), change = random_floats(ROWS * DIM), gain = random_floats(DIM), by = random_floats(ROWS * DIM);
  Floats out(x.size()), total(x.size());
  const Doubles plain(x.begin(), x.end());
  Doubles factor = factors(plain, DIM);
  const RmsNorm alone{x.data(), nullptr, gain.data(), nullptr, out.data(), ROWS, 1, DIM, DIM, DIM, 1e-6f, 0};
  JOIN(truekv_, rms_norm, _, ISA)(&alone);
  bool good = close("rms_norm", out, each(ROWS, DIM, [&](int64_t r, int64_t i) { return x[r * DIM + i] * factor[r] * gain[i]; }));

  const Doubles sums = each(ROWS, DIM, [&](int64_t r, int64_t i) { return (double)x[r * DIM + i] + change[r * DIM + i]; });
  factor = factors(sums, DIM);
  const RmsNorm changed{x.data(), change.data(), nullptr, total.data(), out.data(), ROWS, 1, DIM, DIM, DIM, 1e-6f, 0};
  JOIN(truekv_, rms_norm, _, ISA)(&changed);
  good &= close("residual", total, sums);
  good &= close("rms_norm of it", out, each(ROWS, DIM, [&](int64_t r, int64_t i) { return sums[r * DIM + i] * factor[r]; }));

  for (const int32_t first : {0, 1}) {
    const Doubles mixed = each(ROWS, DIM, [&](int64_t r, int64_t i) { return x[r * DIM + i] * (first ? silu(by[r * DIM + i]) : 1); });
    factor = factors(mixed, DIM);
    const GatedNorm gated{x.data(), by.data(), gain.data(), out.data(), ROWS, 1, DIM, DIM, 0, 1e-6f, first, 0};
    JOIN(truekv_, gated_norm, _, ISA)(&gated);
    good &= close(first ? "norm of gated" : "gated norm", out, each(ROWS, DIM, [&](int64_t r, int64_t i) {
                    return mixed[r * DIM + i] * factor[r] * gain[i] * (first ? 1 : silu(by[r * DIM + i]));
                  }));
  }
  return good;
}

bool gates() {
  Floats x = random_floats(ROWS * 2 * DIM), bias = random_floats(DIM), rate = random_floats(DIM), out((size_t)(ROWS * DIM)), beta(out.size());
  for (float& v : x) v *= 12;
  const auto at = [&](int64_t r, int64_t i) { return (double)x[(size_t)(r * 2 * DIM + i)]; };
  bool good = true;
  for (const int32_t relu2 : {0, 1}) {
    const Activate activation{x.data(), out.data(), ROWS, DIM, 2 * DIM, relu2, 0};
    JOIN(truekv_, activate, _, ISA)(&activation);
    good &= close(relu2 ? "relu2" : "swiglu", out, each(ROWS, DIM, [&](int64_t r, int64_t i) {
                    return relu2 ? std::pow(std::fmax(at(r, i), 0), 2) : silu(at(r, i)) * at(r, DIM + i);
                  }));
  }
  for (const int32_t single : {0, 1}) {
    const Gate gate{x.data(), x.data() + DIM, out.data(), ROWS, 1, DIM, 2 * DIM, 0, 2 * DIM, 0, single, 0, 0};
    JOIN(truekv_, gate, _, ISA)(&gate);
    good &= close(single ? "single gate" : "gate", out, each(ROWS, DIM, [&](int64_t r, int64_t i) {
                    return at(r, i) * sigmoid(at(r, DIM + (single ? 0 : i)));
                  }));
  }
  const Softplus soft{x.data(), bias.data(), out.data(), ROWS, DIM, 2 * DIM, 0};
  JOIN(truekv_, softplus, _, ISA)(&soft);
  good &= close("softplus", out, each(ROWS, DIM, [&](int64_t r, int64_t i) { return softplus(at(r, i) + bias[(size_t)i]); }));
  const DeltaGates delta{x.data(), x.data() + DIM, bias.data(), rate.data(), beta.data(), out.data(), ROWS, DIM, 2 * DIM, 2 * DIM, 0};
  JOIN(truekv_, delta_gates, _, ISA)(&delta);
  good &= close("delta beta", beta, each(ROWS, DIM, [&](int64_t r, int64_t i) { return sigmoid(at(r, i)); }));
  return good & close("delta decay", out, each(ROWS, DIM, [&](int64_t r, int64_t i) {
           return rate[(size_t)i] * softplus(at(r, DIM + i) + bias[(size_t)i]);
         }));
}

bool positions() {
  constexpr int64_t PLANES = 21;
  const Floats x = random_floats(ROWS * DIM);
  Floats frequencies = random_floats(PLANES), cosine((size_t)(ROWS * PLANES)), sine(cosine.size()), out(x.size());
  std::vector<int64_t> places;
  for (int64_t row = 0; row < ROWS; row++) places.push_back(row * row * 37);
  const Angles turn{places.data(), frequencies.data(), cosine.data(), sine.data(), ROWS, PLANES, 1.25f};
  JOIN(truekv_, angles, _, ISA)(&turn);
  const auto angle = [&](int64_t r, int64_t i) { return (double)((float)places[(size_t)r] * frequencies[(size_t)i]); };
  bool good = close("cosine", cosine, each(ROWS, PLANES, [&](int64_t r, int64_t i) { return 1.25 * std::cos(angle(r, i)); }));
  good &= close("sine", sine, each(ROWS, PLANES, [&](int64_t r, int64_t i) { return 1.25 * std::sin(angle(r, i)); }));
  for (const int32_t interleaved : {0, 1}) {
    const Rotate rotate{x.data(), cosine.data(), sine.data(), out.data(), ROWS, 1, DIM, PLANES, DIM, 0, interleaved, 0};
    JOIN(truekv_, rotate, _, ISA)(&rotate);
    good &= close(interleaved ? "rotate pairs" : "rotate", out, each(ROWS, DIM, [&](int64_t r, int64_t i) {
                    if (i >= 2 * PLANES) return (double)x[(size_t)(r * DIM + i)];
                    const int64_t plane = i % PLANES, step = interleaved ? 1 : PLANES, start = interleaved ? 2 * plane : plane;
                    const double a = x[(size_t)(r * DIM + start)], b = x[(size_t)(r * DIM + start + step)];
                    const double c = cosine[(size_t)(r * PLANES + plane)], s = sine[(size_t)(r * PLANES + plane)];
                    return i < PLANES ? a * c - b * s : b * c + a * s;
                  }));
  }
  return good;
}

// Routing of sigmoids and softmaxes, the sorting of rows by expert, and their sum.
bool experts() {
  constexpr int64_t EXPERTS = 19, CHOSEN = 3;
  const Floats logits = random_floats(ROWS * EXPERTS);
  bool good = true;
  for (const int32_t sigmoids : {0, 1}) {
    Floats weights((size_t)(ROWS * CHOSEN)), out((size_t)(ROWS * DIM));
    std::vector<int64_t> chosen(weights.size()), starts(EXPERTS + 1), sources(weights.size()), places(weights.size());
    const Route route{logits.data(), nullptr, weights.data(), chosen.data(), ROWS, EXPERTS, CHOSEN, 1, 1, 2.5f, sigmoids, 1};
    JOIN(truekv_, route, _, ISA)(&route);
    Doubles expected;
    bool best = true;
    for (int64_t row = 0; row < ROWS; row++) {
      const float* from = &logits[(size_t)(row * EXPERTS)];
      std::vector<int64_t> order;
      for (int64_t e = 0; e < EXPERTS; e++) order.push_back(e);
      std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return from[a] > from[b]; });
      double total = 0;
      for (int64_t k = 0; k < CHOSEN; k++) total += sigmoids ? sigmoid(from[order[k]]) : std::exp((double)from[order[k]]);
      for (int64_t k = 0; k < CHOSEN; k++) {
        expected.push_back(2.5 * (sigmoids ? sigmoid(from[order[k]]) : std::exp((double)from[order[k]])) / total);
        best = best && chosen[(size_t)(row * CHOSEN + k)] == order[(size_t)k];
      }
    }
    good &= close(sigmoids ? "route sigmoids" : "route softmax", weights, expected) && best;
    const Arrange arrange{chosen.data(), starts.data(), sources.data(), places.data(), ROWS, CHOSEN, EXPERTS};
    JOIN(truekv_, arrange, _, ISA)(&arrange);
    const Floats rows = random_floats(ROWS * CHOSEN * DIM);
    for (size_t i = 0; i < chosen.size(); i++)
      good = good && sources[(size_t)places[i]] == (int64_t)i / CHOSEN && starts[(size_t)chosen[i]] <= places[i] && places[i] < starts[(size_t)chosen[i] + 1];
    const Combine combine{rows.data(), places.data(), weights.data(), out.data(), ROWS, CHOSEN, DIM, 0};
    JOIN(truekv_, combine, _, ISA)(&combine);
    good &= close("combine", out, each(ROWS, DIM, [&](int64_t r, int64_t i) {
                    double sum = 0;
                    for (int64_t k = 0; k < CHOSEN; k++)
                      sum += (double)weights[(size_t)(r * CHOSEN + k)] * rows[(size_t)(places[(size_t)(r * CHOSEN + k)] * DIM + i)];
                    return sum;
                  }));
  }
  return good;
}

// One number that is not finite, wherever it lies, and whichever rows are asked for.
bool finites() {
  bool good = true;
  for (const float bad : {NAN, INFINITY, -INFINITY})
    for (int64_t at = 0; at < DIM; at++) {
      Floats x = random_floats(ROWS * DIM);
      x[(size_t)(4 * DIM + at)] = bad;
      const int64_t without[] = {3, 5, 0}, with[] = {3, 4};
      const Finite all{{{x.data(), DIM, DIM, 0}}, nullptr, 1, ROWS, 0}, some{{{x.data(), DIM, DIM, 0}}, without, 1, 3, 0};
      const Finite those{{{x.data(), DIM, DIM, 0}}, with, 1, 2, 0};
      for (const Finite* asked : {&all, &some, &those}) JOIN(truekv_, finite, _, ISA)(asked);
      good = good && !all.finite && some.finite && !those.finite;
    }
  printf("%-16s %s\n", "finite", good ? "ok" : "WRONG");
  return good;
}

int main() { return !(norms() & gates() & positions() & experts() & finites()); }
