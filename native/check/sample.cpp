// Candidates, their weights and the token drawn from them against a whole row sorted and added up in double; and
// logarithms of probabilities.
#include "../sample.cpp"

#include <numeric>

#include "check.h"

typedef std::vector<int64_t> Places;

constexpr double NONE = -INFINITY;  // no min_p
// temperature, top_p, ln min_p, point, top_k
constexpr Choice FILTERS[] = {
    {nullptr, 0, 1, NONE, 0.5, 0},    {nullptr, 0.8, 1, NONE, 0.3, 0},      {nullptr, 0.8, 1, NONE, 0.6, 20},
    {nullptr, 1, 0.95, NONE, 0, 700}, {nullptr, 0.8, 0.95, NONE, 0.999, 0}, {nullptr, 3, 0.5, NONE, 0.4, 0},
    {nullptr, 0.8, 1, -3, 0.7, 0},    {nullptr, 1, 0.7, -6, 0.2, 0},        {nullptr, 2, 0.9, -4, 0.8, 50},
    {nullptr, 1e-3, 0.9, NONE, 0.999, 0}, {nullptr, 1, 1, NONE, 0.9, 1},        {nullptr, 1, 1 - 1e-9, NONE, 0.5, 0},
    {nullptr, 1, 1, NONE, 0, 0},      {nullptr, 3, 1, NONE, 0.999, 0},
};
constexpr int64_t ROWS = sizeof FILTERS / sizeof *FILTERS;

// Every candidate of a row, in order, and its weight.
std::vector<double> candidates(const Choice& c, const Floats& x, Places& places) {
  const double top = *std::max_element(x.begin(), x.end());
  const bool greedy = c.temperature == 0;
  const double temperature = greedy ? 1 : c.temperature;
  places.clear();
  for (int64_t i = 0; i < (int64_t)x.size(); i++)
    if (x[(size_t)i] > -INFINITY && (x[(size_t)i] - top) / temperature >= c.floor) places.push_back(i);
  if (greedy || c.top_k > 0 || c.top_p < 1)
    std::stable_sort(places.begin(), places.end(), [&](int64_t a, int64_t b) { return x[(size_t)a] > x[(size_t)b]; });
  const size_t most = greedy ? 1 : c.top_k > 0 ? (size_t)c.top_k : places.size();
  if (most < places.size()) places.resize(most);
  std::vector<double> weights;
  for (const int64_t place : places) weights.push_back(std::exp((x[(size_t)place] - top) / temperature));
  const double mass = c.top_p * std::accumulate(weights.begin(), weights.end(), 0.0);
  size_t kept = 0;
  for (double sum = 0; c.top_p < 1 && kept < weights.size() && sum < mass; kept++) sum += weights[kept];
  if (c.top_p < 1) places.resize(kept), weights.resize(kept);
  return weights;
}

int64_t drawn(const Choice& c, const Places& places, const std::vector<double>& weights) {
  const double point = c.point * std::accumulate(weights.begin(), weights.end(), 0.0);
  double sum = 0;
  for (size_t i = 0; i < places.size(); i++)
    if ((sum += weights[i]) > point) return places[i];
  return -2;  // never: no point is as large as 1
}

// All filters on one row in one call, with and without room for the candidates.
bool draws(const char* what, const Floats& x) {
  const int64_t vocab = (int64_t)x.size();
  std::vector<Choice> choices(FILTERS, FILTERS + ROWS);
  for (Choice& c : choices) c.logits = x.data();
  Places tokens((size_t)ROWS), alone((size_t)ROWS), found((size_t)(ROWS * vocab)), counts((size_t)ROWS), places;
  std::vector<double> weights((size_t)(ROWS * vocab), NAN);
  const Sample listed{choices.data(), tokens.data(), found.data(), weights.data(), counts.data(), ROWS, vocab};
  const Sample plain{choices.data(), alone.data(), nullptr, nullptr, nullptr, ROWS, vocab};
  JOIN(truekv_, sample, _, ISA)(&listed);
  JOIN(truekv_, sample, _, ISA)(&plain);
  bool good = true;
  double difference = 0;
  for (int64_t r = 0; r < ROWS; r++) {
    const Choice& c = choices[(size_t)r];
    const std::vector<double> expected = candidates(c, x, places);
    const int64_t token = drawn(c, places, expected), *order = &found[(size_t)(r * vocab)];
    good = good && tokens[(size_t)r] == token && alone[(size_t)r] == token;
    good = good && counts[(size_t)r] == (int64_t)places.size() && std::equal(places.begin(), places.end(), order);
    for (size_t i = 0; good && i < expected.size(); i++) {
      const double d = std::fabs(weights[(size_t)(r * vocab) + i] - expected[i]) / std::fmax(expected[i], 1e-300);
      good = good && d <= 2e-12;  // false for NaN
      difference = std::fmax(difference, d);
    }
  }
  printf("%5lld numbers %-16s %.1e %s\n", (long long)vocab, what, difference, good ? "ok" : "WRONG");
  return good;
}

bool logarithms(const Floats& x, int64_t rows, int64_t count) {
  const int64_t vocab = (int64_t)x.size() / rows;
  Places tokens, best((size_t)(rows * count));
  for (int64_t r = 0; r < rows; r++) tokens.push_back(r * 7 % vocab);
  Floats chosen((size_t)rows), largest(best.size());
  const Logprobs arguments{x.data(), tokens.data(), chosen.data(), best.data(), largest.data(), rows, vocab, count};
  JOIN(truekv_, logprobs, _, ISA)(&arguments);
  std::vector<double> expected, expected_largest;
  bool good = true;
  for (int64_t r = 0; r < rows; r++) {
    const float* from = &x[(size_t)(r * vocab)];
    double sum = 0;
    for (int64_t i = 0; i < vocab; i++) sum += std::exp((double)from[i]);
    Places order((size_t)vocab);
    std::iota(order.begin(), order.end(), 0);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return from[a] > from[b]; });
    expected.push_back(from[tokens[(size_t)r]] - std::log(sum));
    for (int64_t i = 0; i < count; i++) expected_largest.push_back(from[order[(size_t)i]] - std::log(sum));
    good = good && std::equal(order.begin(), order.begin() + count, &best[(size_t)(r * count)]);
  }
  if (!good) printf("the most likely tokens are others: WRONG\n");
  return good & close("logprobs", chosen, expected) & close("best logprobs", largest, expected_largest);
}

// A row that holds NaN, or nothing finite at its top, has no token.
bool refusals() {
  bool good = true;
  for (const float bad : {NAN, INFINITY, -INFINITY}) {
    Floats x = random_floats(130);
    if (bad < 0) std::fill(x.begin(), x.end(), bad);
    else x[77] = bad;
    std::vector<Choice> choices(FILTERS, FILTERS + ROWS);
    for (Choice& c : choices) c.logits = x.data();
    Places tokens((size_t)ROWS);
    const Sample arguments{choices.data(), tokens.data(), nullptr, nullptr, nullptr, ROWS, (int64_t)x.size()};
    JOIN(truekv_, sample, _, ISA)(&arguments);
    for (const int64_t token : tokens) good = good && token == -1;
  }
  printf("%-16s %s\n", "no token", good ? "ok" : "WRONG");
  return good;
}

int main() {
  bool good = true;
  for (const int64_t vocab : {1, 64, 65, 1000, 5003}) {
    Floats flat = random_floats(vocab), steep = flat, even = flat, masked = flat;
    for (float& v : steep) v *= 12;
    for (float& v : even) v = std::round(4 * v);  // many are equal, zeros of both signs among them
    for (float& v : masked) v = v < 0.8f ? -INFINITY : 8 * v;
    masked.back() = 7;
    good &= draws("flat", flat) & draws("steep", steep) & draws("even", even) & draws("masked", masked);
  }
  return !(good & logarithms(random_floats(3 * 5003), 3, 20) & logarithms(random_floats(3 * 21), 3, 21) & refusals());
}
