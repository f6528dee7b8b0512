// Tokens drawn from rows of logits: temperature, then min_p, top_k and top_p, then one number of [0, 1) for each row.
//
// Every filter keeps a beginning of the row in the order (larger logits first, of equal ones the first), and a row is
// never sorted to find it. The largest of each block of numbers, known after one pass, say where to look: for the
// largest, for the `top_k` best, for what is not below a bound. What top_p keeps follows from a second pass, which adds
// the weights up by blocks and by buckets of logits: only the bucket in which the mass is reached, and the one that the
// number falls into, are put in order. So a flat row of which nearly all can be drawn takes two passes too.
//
// Weights are e^((x - largest) / temperature) in float64. A row is one thread's, and depends on nothing but the row.
#include <algorithm>
#include <cfloat>
#include <memory>

#include "export.h"
#include "simd.h"

struct Choice {
  const float* logits;  // [vocab]
  double temperature;   // 0: the largest logit
  double top_p;
  double floor;         // natural logarithm of min_p; minus infinity: none
  double point;         // in [0, 1): where in the mass of the candidates the token lies
  int64_t top_k;        // 0: all
};

struct Sample {
  const Choice* choices;  // [rows]
  int64_t* tokens;        // [rows] what was drawn; -1 where the row holds NaN or its largest number is infinite
  int64_t* found;         // [rows, vocab] candidates in the order in which their weights are added up; or null
  double* weights;        // [rows, vocab] of the candidates, in proportion to their probabilities
  int64_t* counts;        // [rows] how many there are
  int64_t rows, vocab;
};

struct Logprobs {
  const float* logits;    // [rows, vocab], contiguous
  const int64_t* tokens;  // [rows]
  float* logprobs;        // [rows] of the tokens; NaN for a row that has no `Sample::tokens`
  int64_t* best;          // [rows, count] the most likely tokens, count <= vocab
  float* best_logprobs;   // [rows, count]
  int64_t rows, vocab, count;
};

namespace ISA {
namespace {

constexpr int BLOCK = 64;
constexpr int BUCKETS = 2048;
constexpr int64_t ALONE = 1 << 16;  // numbers below which waking another thread costs more than it saves
constexpr double NOTHING = -708.0;  // e^x is no normal number below it, and counts as zero

INLINE double fma(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_NEON)
  return __builtin_fma(a, b, c);
#else
  return a * b + c;
#endif
}

// e^a within 2 units in the last place, for a <= 0: Cody and Waite's reduction, and Taylor's series.
INLINE double exp_of(double a) {
  constexpr double SHIFT = 6755399441055744.0;  // 1.5 * 2^52: leaves a whole number in the low bits
  const double x = a > NOTHING ? a : NOTHING, shifted = fma(x, 1.4426950408889634, SHIFT), n = shifted - SHIFT;
  const double r = fma(n, -1.9082149292705877e-10, fma(n, -6.93147180369123816490e-1, x));
  double p = 1.0 / 479001600;
  p = fma(p, r, 1.0 / 39916800), p = fma(p, r, 1.0 / 3628800), p = fma(p, r, 1.0 / 362880);
  p = fma(p, r, 1.0 / 40320), p = fma(p, r, 1.0 / 5040), p = fma(p, r, 1.0 / 720), p = fma(p, r, 1.0 / 120);
  p = fma(p, r, 1.0 / 24), p = fma(p, r, 1.0 / 6), p = fma(p, r, 0.5), p = fma(p, r, 1.0), p = fma(p, r, 1.0);
  uint64_t power;
  memcpy(&power, &shifted, 8);
  power = (power + 1023) << 52;
  double scale;
  memcpy(&scale, &power, 8);
  return a > NOTHING ? p * scale : 0.0;
}

// Ascending keys are descending numbers, and of equal ones (zeros of both signs are) ascending places.
INLINE uint64_t key_of(float x, int64_t place) {
  const float number = x + 0.0f;
  uint32_t bits;
  memcpy(&bits, &number, 4);
  return (uint64_t)(bits ^ (bits >> 31 ? 0u : 0x7FFFFFFFu)) << 32 | (uint64_t)place;
}
INLINE int64_t place_of(uint64_t key) { return (int64_t)(uint32_t)key; }

// What one thread needs for a row; memory that a row does not need is not touched.
struct Space {
  template <class T> static std::unique_ptr<T[]> some(int64_t count) { return std::unique_ptr<T[]>(new T[count]); }
  explicit Space(int64_t vocab)
      : peaks(some<float>(vocab / BLOCK + 1)), chosen(some<float>(vocab / BLOCK + 1)), sums(some<double>(vocab / BLOCK + 1)),
        buckets(some<double>(BUCKETS + 1)), keys(some<uint64_t>(vocab + BLOCK)), spare(some<uint64_t>(vocab + BLOCK)),
        weights(some<double>(vocab + BLOCK)) {}
  std::unique_ptr<float[]> peaks, chosen;
  std::unique_ptr<double[]> sums, buckets;
  std::unique_ptr<uint64_t[]> keys, spare;
  std::unique_ptr<double[]> weights;
};

// Sorts keys whose places ascend: few as usual, many digit by digit of eleven bits of the number.
void arrange(uint64_t* keys, uint64_t* spare, int64_t count) {
  if (count <= 512) return std::sort(keys, keys + count);
  constexpr int DIGITS = 3, BITS = 11, VALUES = 1 << BITS;
  std::unique_ptr<int64_t[]> starts(new int64_t[DIGITS * VALUES]());
  auto digit = [](uint64_t key, int d) INLINE_LAMBDA { return key >> (32 + d * BITS) & (VALUES - 1); };
  for (int64_t i = 0; i < count; i++)
    for (int d = 0; d < DIGITS; d++) starts[d * VALUES + digit(keys[i], d)]++;
  uint64_t *from = keys, *to = spare;
  for (int d = 0; d < DIGITS; d++) {
    int64_t* start = starts.get() + d * VALUES;
    if (start[digit(from[0], d)] == count) continue;
    for (int64_t v = 0, before = 0; v < VALUES; v++) before += start[v], start[v] = before - start[v];
    for (int64_t i = 0; i < count; i++) to[start[digit(from[i], d)]++] = from[i];
    std::swap(from, to);
  }
  if (from != keys) memcpy(keys, from, count * sizeof(uint64_t));
}

class Row {
 public:
  // Looks at every number once.
  Row(const float* x, int64_t vocab, Space& space) : x(x), vocab(vocab), blocks((vocab + BLOCK - 1) / BLOCK), space(space) {
    std::fill_n(last, BLOCK, -INFINITY);
    memcpy(last, x + vocab / BLOCK * BLOCK, vocab % BLOCK * sizeof(float));
    I32 broken = {};
    F32 highest = all(-INFINITY);
    for (int64_t b = 0; b < blocks; b++) {
      const float* from = block(b);
      F32 v[BLOCK / LANES];
#pragma GCC unroll 4
      for (int i = 0; i < BLOCK / LANES; i++) v[i] = load<F32>(from + i * LANES), broken |= is_nan(v[i]);
      const F32 most = max(max(v[0], v[1]), max(v[2], v[3]));
      highest = max(highest, most);
      space.peaks[b] = largest(most);
    }
    int32_t found = 0;
    for (int lane = 0; lane < LANES; lane++) found |= broken[lane];
    top = found ? NAN : largest(highest);
  }

  bool sound() const { return top - top == 0.0f; }

  // The first of the largest.
  int64_t first() const {
    int64_t b = 0, i = 0;
    while (space.peaks[b] != top) b++;
    while (block(b)[i] != top) i++;
    return b * BLOCK + i;
  }

  // The logarithm of the sum of e^x.
  double log_sum() {
    inverse = 1.0;
    return (double)top + std::log(add_up(false));
  }

  double number(uint64_t key) const { return (double)x[place_of(key)]; }

  // The `count` best in order, to the keys of the space.
  int64_t best(int64_t count) {
    float bound = -FLT_MAX;
    if (count < blocks) {
      // A block whose largest number is not among the `count` largest of all blocks holds none of the wanted.
      float* chosen = space.chosen.get();
      std::copy_n(space.peaks.get(), blocks, chosen);
      std::nth_element(chosen, chosen + count - 1, chosen + blocks, std::greater<float>());
      bound = std::max(bound, chosen[count - 1]);
    }
    uint64_t *keys = space.keys.get(), *spare = space.spare.get();
    int64_t found = at_least(bound);
    if (found > count) {
      std::copy_n(keys, found, spare);
      std::nth_element(spare, spare + count - 1, spare + found);
      const uint64_t worst = spare[count - 1];
      found = std::remove_if(keys, keys + found, [=](uint64_t key) { return key > worst; }) - keys;
    }
    arrange(keys, spare, found);
    return found;
  }

  // The token; and all candidates with their weights, where there is room for them.
  int64_t draw(const Choice& c, int64_t* found, double* weights, int64_t* count) {
    if (c.temperature == 0.0 || c.top_k == 1) {
      const int64_t token = first();
      if (found) *found = token, *weights = 1.0, *count = 1;
      return token;
    }
    inverse = std::min(1.0 / c.temperature, DBL_MAX);
    const bool ordered = c.top_k > 0 || c.top_p < 1.0, all_of_them = c.top_k <= 0 || c.top_k >= vocab;
    uint64_t* keys = space.keys.get();
    int64_t held;
    if (!all_of_them) {
      held = best(c.top_k);
      while (!reaches(c, keys[held - 1])) held--;
    } else if (c.floor > -INFINITY) {
      held = at_least(bound_of(c));
      held = std::remove_if(keys, keys + held, [&](uint64_t key) { return !reaches(c, key); }) - keys;
      if (ordered) arrange(keys, space.spare.get(), held);
    } else if (c.top_p < 1.0) {
      return draw_nucleus(c, found, weights, count);
    } else if (ordered || found) {
      held = at_least(-FLT_MAX);
      if (ordered) arrange(keys, space.spare.get(), held);
    } else {
      return draw_any(c.point);
    }
    return draw_listed(c, held, found, weights, count);
  }

 private:
  const float* x;
  const int64_t vocab, blocks;
  Space& space;
  alignas(64) float last[BLOCK];  // the last block, filled up with minus infinity
  float top;
  double inverse;  // of the temperature
  float steps;     // buckets to one unit of a logit

  const float* block(int64_t b) const { return (b + 1) * BLOCK <= vocab ? x + b * BLOCK : last; }

  INLINE void weigh(const float* from, double* to) const {
    const double highest = top;
    for (int i = 0; i < BLOCK; i++) to[i] = exp_of(((double)from[i] - highest) * inverse);
  }

  INLINE void buckets_of(const float* from, int32_t* to) const {
    for (int i = 0; i < BLOCK; i++) {
      const float bucket = (top - from[i]) * steps;
      to[i] = (int32_t)(bucket < (float)BUCKETS ? bucket : (float)BUCKETS);
    }
  }
  int bucket_of(float number) const {
    const float bucket = (top - number) * steps;
    return bucket < (float)BUCKETS ? (int)bucket : BUCKETS;
  }

  // Numbers that are not below a bound, in the order of their places, to the keys of the space.
  int64_t at_least(float bound) {
    uint64_t* keys = space.keys.get();
    int64_t found = 0;
    for (int64_t b = 0; b < blocks; b++) {
      if (space.peaks[b] < bound) continue;
      const float* from = block(b);
      for (int i = 0; i < BLOCK; i++) {
        keys[found] = key_of(from[i], b * BLOCK + i);
        found += from[i] >= bound;
      }
    }
    return found;
  }

  // Whether min_p keeps it; the largest it always keeps, since no floor is above zero.
  bool reaches(const Choice& c, uint64_t key) const { return (number(key) - (double)top) / c.temperature >= c.floor; }

  // A number that is not above any that min_p keeps.
  float bound_of(const Choice& c) const {
    const double depth = c.temperature * c.floor;
    const double bound = (double)top + depth - 1e-12 * (std::fabs((double)top) - depth);
    return std::max(-FLT_MAX, std::min(top, std::nextafter((float)std::max(bound, -(double)FLT_MAX), -INFINITY)));
  }

  // The sum of all weights; those of each block stay in the space, those of each bucket too if asked for.
  double add_up(bool by_buckets) {
    if (by_buckets) std::fill_n(space.buckets.get(), BUCKETS + 1, 0.0);
    double total = 0.0;
    for (int64_t b = 0; b < blocks; b++) {
      alignas(64) double weight[BLOCK], part[8] = {};
      const float* from = block(b);
      weigh(from, weight);
      for (int i = 0; i < BLOCK; i += 8)
        for (int j = 0; j < 8; j++) part[j] += weight[i + j];
      space.sums[b] = ((part[0] + part[4]) + (part[2] + part[6])) + ((part[1] + part[5]) + (part[3] + part[7]));
      total += space.sums[b];
      if (!by_buckets || bucket_of(space.peaks[b]) == BUCKETS) continue;
      alignas(64) int32_t bucket[BLOCK];
      buckets_of(from, bucket);
      for (int i = 0; i < BLOCK; i++) space.buckets[bucket[i]] += weight[i];
    }
    return total;
  }

  // The first of `count` weights with which a sum that begins at `sum` exceeds the point, else the last that weighs.
  static int64_t walk(const double* weights, int64_t count, double sum, double point) {
    int64_t heavy = 0;
    for (int64_t i = 0; i < count; i++) {
      sum += weights[i];
      if (weights[i] > 0.0) heavy = i;
      if (sum > point) return i;
    }
    return heavy;
  }

  // All can be drawn, in the order of their places.
  int64_t draw_any(double point) {
    point *= add_up(false);
    double sum = 0.0;
    int64_t chosen = 0;
    for (int64_t b = 0; b < blocks; b++) {
      if (space.sums[b] > 0.0) chosen = b;
      if (sum + space.sums[b] > point) break;
      sum += space.sums[b];
    }
    alignas(64) double weight[BLOCK];
    weigh(block(chosen), weight);
    return chosen * BLOCK + walk(weight, BLOCK, sum, point);
  }

  void weigh_keys(int64_t count) {
    for (int64_t i = 0; i < count; i += BLOCK) {
      alignas(64) float part[BLOCK];
      for (int64_t j = 0; j < BLOCK; j++) part[j] = i + j < count ? x[place_of(space.keys[i + j])] : -INFINITY;
      weigh(part, space.weights.get() + i);
    }
  }

  // How many of `count` weights top_p keeps, the sum of those before them being `sum`, which becomes that of the kept.
  int64_t keep(int64_t count, double target, double& sum) const {
    int64_t kept = 0;
    for (; kept < count && sum < target; kept++) sum += space.weights[kept];
    return kept;
  }

  void report(int64_t count, int64_t* found, double* weights, int64_t* counted) const {
    *counted = count;
    std::copy_n(space.weights.get(), count, weights);
    for (int64_t i = 0; i < count; i++) found[i] = place_of(space.keys[i]);
  }

  // The candidates before top_p are the keys of the space.
  int64_t draw_listed(const Choice& c, int64_t count, int64_t* found, double* weights, int64_t* counted) {
    weigh_keys(count);
    double total = 0.0;
    for (int64_t i = 0; i < count; i++) total += space.weights[i];
    if (c.top_p < 1.0) {
      const double target = c.top_p * total;
      total = 0.0;
      count = keep(count, target, total);
    }
    if (found) report(count, found, weights, counted);
    return place_of(space.keys[walk(space.weights.get(), count, 0.0, c.point * total)]);
  }

  // The numbers of one bucket in order, to the keys of the space, and their weights.
  int64_t list_bucket(int wanted) {
    uint64_t* keys = space.keys.get();
    int64_t found = 0;
    for (int64_t b = 0; b < blocks; b++) {
      if (bucket_of(space.peaks[b]) > wanted) continue;
      alignas(64) int32_t bucket[BLOCK];
      const float* from = block(b);
      buckets_of(from, bucket);
      int32_t any = 0;
      for (int i = 0; i < BLOCK; i++) any |= bucket[i] == wanted;
      for (int i = 0; any && i < BLOCK; i++) {
        keys[found] = key_of(from[i], b * BLOCK + i);
        found += bucket[i] == wanted;
      }
    }
    arrange(keys, space.spare.get(), found);
    weigh_keys(found);
    return found;
  }

  // Of all numbers the smallest set with the mass top_p. What is lighter than an equal share of the rest cannot be needed:
  // below e^(1 - depth) all numbers together weigh less than what top_p leaves of the largest alone.
  int64_t draw_nucleus(const Choice& c, int64_t* found, double* weights, int64_t* counted) {
    const double depth = 1.0 + std::log((double)vocab / (1.0 - c.top_p));
    steps = (float)std::min(BUCKETS * inverse / depth, 1e30);
    const double target = c.top_p * add_up(true);
    const double* mass = space.buckets.get();
    double before = 0.0;
    int edge = 0;
    for (int i = 0; i < BUCKETS; i++) {
      if (mass[i] == 0.0) continue;
      if (edge != i) before += mass[edge];
      edge = i;
      if (before + mass[i] >= target) break;
    }
    double total = before;
    const int64_t kept = keep(list_bucket(edge), target, total);
    const uint64_t worst = space.keys[kept - 1];
    int64_t token;
    const double point = c.point * total;
    if (point >= before) {
      token = place_of(space.keys[walk(space.weights.get(), kept, before, point)]);
    } else {
      double sum = 0.0;
      int chosen = 0;
      for (int i = 0; i < edge; i++) {
        if (mass[i] > 0.0) chosen = i;
        if (sum + mass[i] > point) break;
        sum += mass[i];
      }
      const int64_t listed = list_bucket(chosen);
      token = place_of(space.keys[walk(space.weights.get(), listed, sum, point)]);
    }
    if (found) {
      uint64_t* keys = space.keys.get();
      int64_t held = at_least(x[place_of(worst)]);
      held = std::remove_if(keys, keys + held, [=](uint64_t key) { return key > worst; }) - keys;
      arrange(keys, space.spare.get(), held);
      weigh_keys(held);
      report(held, found, weights, counted);
    }
    return token;
  }
};

void sample(const Sample& a) {
#pragma omp parallel if (a.rows > 1 && a.rows * a.vocab > ALONE)
  {
    Space space(a.vocab);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < a.rows; r++) {
      const int64_t at = r * a.vocab;
      Row row(a.choices[r].logits, a.vocab, space);
      if (a.found) a.counts[r] = 0;
      a.tokens[r] = !row.sound() ? -1
                    : a.found    ? row.draw(a.choices[r], a.found + at, a.weights + at, a.counts + r)
                                 : row.draw(a.choices[r], nullptr, nullptr, nullptr);
    }
  }
}

void logprobs(const Logprobs& a) {
#pragma omp parallel if (a.rows > 1 && a.rows * a.vocab > ALONE)
  {
    Space space(a.vocab);
#pragma omp for schedule(dynamic)
    for (int64_t r = 0; r < a.rows; r++) {
      const float* x = a.logits + r * a.vocab;
      Row row(x, a.vocab, space);
      const double all_of_them = row.sound() ? row.log_sum() : NAN;
      a.logprobs[r] = (float)((double)x[a.tokens[r]] - all_of_them);
      const int64_t found = row.sound() && a.count ? row.best(a.count) : 0;
      for (int64_t i = 0; i < a.count; i++) {
        a.best[r * a.count + i] = i < found ? place_of(space.keys[i]) : -1;
        a.best_logprobs[r * a.count + i] = i < found ? (float)(row.number(space.keys[i]) - all_of_them) : NAN;
      }
    }
  }
}

}  // namespace
}  // namespace ISA

EXPORT(sample, Sample) { ISA::sample(*arguments); }

EXPORT(logprobs, Logprobs) { ISA::logprobs(*arguments); }
