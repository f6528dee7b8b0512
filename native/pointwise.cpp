// Operations on single rows: norms, gates, rotary positions, the choice of experts.
//
// A row is read in steps of sixteen numbers, the last step filled up with zeros, so that every number goes through the
// same instructions wherever it lies. Rows are shared out to threads once there is enough work to wake them for.
#include "export.h"
#include "simd.h"

struct RmsNorm {
  const void* x;       // [outer, inner, dim]
  const void* change;  // [outer, inner, dim], contiguous, added to x first; or null
  const float* gain;   // [dim], or null for ones
  void* total;         // [outer, inner, dim], contiguous: x + change, if there is a change
  void* out;           // [outer, inner, dim], contiguous
  int64_t outer, inner, dim;
  int64_t x_outer, x_inner;  // strides of x, in numbers
  float epsilon;
  int32_t bf16;  // x and out are bfloat16, else float32
};

struct GatedNorm {
  const float* x;     // [outer, inner, dim], contiguous
  const void* gate;   // [outer, inner * dim]
  const float* gain;  // [inner or 1, dim]
  void* out;          // [outer, inner * dim], contiguous
  int64_t outer, inner, dim;
  int64_t gate_outer;  // stride of gate, in numbers
  int64_t gain_inner;  // stride of gain: dim, or 0
  float epsilon;
  int32_t gate_first;  // rms_norm(x * silu(gate)) instead of rms_norm(x) * silu(gate)
  int32_t bf16;        // gate and out are bfloat16, else float32
};

struct Activate {
  const void* x;  // [rows, 2 * dim] for swiglu, [rows, dim] for relu2
  void* out;      // [rows, dim], contiguous
  int64_t rows, dim, x_row;
  int32_t relu2;
  int32_t bf16;
};

struct Gate {
  const void* x;   // [outer, inner, dim]
  const void* by;  // [outer, inner, dim], or [outer, inner, 1]
  void* out;       // [outer, inner, dim], contiguous
  int64_t outer, inner, dim;
  int64_t x_outer, x_inner, by_outer, by_inner;
  int32_t single;   // one gate for all of dim
  int32_t x_bf16;   // x is bfloat16, else float32
  int32_t by_bf16;  // by and out are
};

struct Softplus {
  const void* x;      // [rows, dim]
  const float* bias;  // [dim]
  float* out;         // [rows, dim], contiguous
  int64_t rows, dim, x_row;
  int32_t bf16;
};

struct DeltaGates {
  const void *b, *a;           // [rows, heads]
  const float *bias, *rate;    // [heads]
  float *beta, *decay;         // [rows, heads], contiguous: sigmoid(b) and rate * softplus(a + bias)
  int64_t rows, heads, b_row, a_row;
  int32_t bf16;
};

struct Angles {
  const int64_t* positions;  // [rows]
  const float* frequencies;  // [planes]
  float* cosine;             // [rows, planes]
  float* sine;
  int64_t rows, planes;
  float amplitude;
};

struct Rotate {
  const void* x;  // [outer, inner, dim]
  const float* cosine;  // [outer, planes]
  const float* sine;
  void* out;  // [outer, inner, dim], contiguous; planes come out as halves
  int64_t outer, inner, dim, planes;
  int64_t x_outer, x_inner;
  int32_t interleaved;  // a plane is (2i, 2i + 1) instead of (i, i + planes)
  int32_t bf16;
};

struct Route {
  const float* logits;  // [rows, experts]
  const float* bias;    // [experts], added to what is chosen by; or null
  float* weights;       // [rows, per_token]
  int64_t* chosen;      // [rows, per_token]
  int64_t rows, experts, per_token, groups, kept_groups;
  float scale;
  int32_t sigmoid;  // scores are sigmoids, and a group is ranked by its best two; else softmax, and its best one
  int32_t normalised;
};

struct Arrange {
  const int64_t* chosen;  // [tokens * per_token] experts
  int64_t* starts;        // [experts + 1]: where each expert's rows begin, once they are sorted by expert
  int64_t* sources;       // [tokens * per_token]: the token of each sorted row
  int64_t* places;        // [tokens * per_token]: the sorted row of each choice
  int64_t tokens, per_token, experts;
};

struct Combine {
  const float* rows;      // [tokens * per_token, dim]
  const int64_t* places;  // [tokens, per_token]
  const float* weights;   // [tokens, per_token]
  void* out;              // [tokens, dim]
  int64_t tokens, per_token, dim;
  int32_t bf16;
};

// Rows of one of the tensors that `finite` looks at.
struct Part {
  const void* x;  // [rows, dim]
  int64_t dim, x_row;
  int32_t bf16;
};

struct Finite {
  Part parts[4];
  const int64_t* rows;     // [count] rows of every part, or null for the first `count`
  int64_t number, count;   // of parts, and of rows
  mutable int32_t finite;  // the answer
};

struct Largest {
  const void* x;    // [rows, dim]
  int64_t* places;  // [rows]: where each row's largest number is, the first of equal ones; -1 where one is not finite
  int64_t rows, dim, x_row;
  int32_t bf16;
};

namespace ISA {
namespace {

constexpr int64_t ALONE = 1 << 15;       // numbers below which waking another thread costs more than it saves
constexpr int64_t MOST_EXPERTS = 4096;

INLINE float one(const float* x) { return *x; }
INLINE float one(const uint16_t* x) { return bf16_to_float(*x); }
INLINE F32 whole(const float* x) { return load<F32>(x); }
INLINE F32 whole(const uint16_t* x) { return load_bf16(x); }
INLINE void put_whole(float* to, F32 v) { store(to, v); }
INLINE void put_whole(uint16_t* to, F32 v) { store(to, narrow(v)); }

// The first `count` of sixteen numbers, zeros after them.
template <class T>
INLINE F32 read(const T* x, int64_t count) {
  if (count >= LANES) return whole(x);
  T part[LANES] = {};
  if (count > 0) memcpy(part, x, count * sizeof(T));
  return whole(part);
}

template <class T>
INLINE void write(T* to, F32 v, int64_t count) {
  if (count >= LANES) return put_whole(to, v);
  T part[LANES];
  put_whole(part, v);
  if (count > 0) memcpy(to, part, count * sizeof(T));
}

// 1 / (1 + e^-a); no exponential of a positive number, which could overflow. NaN stays NaN.
INLINE F32 sigmoid(F32 a) {
  F32 e = exp((F32)((I32)a | (int32_t)0x80000000));
  F32 s = choose(more(zero(), a), e, all(1.0f)) / (all(1.0f) + e);
  return choose(is_nan(a), a, s);
}

INLINE F32 silu(F32 a) { return a * sigmoid(a); }

template <class T>
void rms_norm(const RmsNorm& a) {
#pragma omp parallel for collapse(2) schedule(static) if (a.outer * a.inner * a.dim > ALONE)
  for (int64_t o = 0; o < a.outer; o++)
    for (int64_t n = 0; n < a.inner; n++) {
      const T* x = (const T*)a.x + o * a.x_outer + n * a.x_inner;
      T* out = (T*)a.out + (o * a.inner + n) * a.dim;
      if (a.change) {
        const T* change = (const T*)a.change + (o * a.inner + n) * a.dim;
        T* total = (T*)a.total + (o * a.inner + n) * a.dim;
        for (int64_t i = 0; i < a.dim; i += LANES)
          write(total + i, read(x + i, a.dim - i) + read(change + i, a.dim - i), a.dim - i);
        x = total;
      }
      F32 squares = zero();
      for (int64_t i = 0; i < a.dim; i += LANES) {
        F32 v = read(x + i, a.dim - i);
        squares = fma(v, v, squares);
      }
      const F32 factor = all(1.0f / sqrtf(sum(squares) / (float)a.dim + a.epsilon));
      for (int64_t i = 0; i < a.dim; i += LANES) {
        F32 v = read(x + i, a.dim - i) * factor;
        write(out + i, a.gain ? v * read(a.gain + i, a.dim - i) : v, a.dim - i);
      }
    }
}

template <class T>
void gated_norm(const GatedNorm& a) {
#pragma omp parallel for collapse(2) schedule(static) if (a.outer * a.inner * a.dim > ALONE)
  for (int64_t o = 0; o < a.outer; o++)
    for (int64_t n = 0; n < a.inner; n++) {
      const float* x = a.x + (o * a.inner + n) * a.dim;
      const T* gate = (const T*)a.gate + o * a.gate_outer + n * a.dim;
      const float* gain = a.gain + n * a.gain_inner;
      T* out = (T*)a.out + (o * a.inner + n) * a.dim;
      F32 squares = zero();
      for (int64_t i = 0; i < a.dim; i += LANES) {
        F32 v = read(x + i, a.dim - i);
        if (a.gate_first) v = v * silu(read(gate + i, a.dim - i));
        squares = fma(v, v, squares);
      }
      const F32 factor = all(1.0f / sqrtf(sum(squares) / (float)a.dim + a.epsilon));
      for (int64_t i = 0; i < a.dim; i += LANES) {
        F32 v = read(x + i, a.dim - i), g = silu(read(gate + i, a.dim - i)), w = read(gain + i, a.dim - i);
        write(out + i, a.gate_first ? v * g * factor * w : v * factor * w * g, a.dim - i);
      }
    }
}

template <class T>
void activate(const Activate& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.dim > ALONE)
  for (int64_t row = 0; row < a.rows; row++) {
    const T* x = (const T*)a.x + row * a.x_row;
    T* out = (T*)a.out + row * a.dim;
    for (int64_t i = 0; i < a.dim; i += LANES) {
      F32 v = read(x + i, a.dim - i);
      if (a.relu2) {
        // A comparison that NaN passes, unlike a maximum.
        F32 positive = choose(more(zero(), v), zero(), v);
        write(out + i, positive * positive, a.dim - i);
      } else {
        write(out + i, silu(v) * read(x + a.dim + i, a.dim - i), a.dim - i);
      }
    }
  }
}

template <class X, class T>
void gate(const Gate& a) {
#pragma omp parallel for collapse(2) schedule(static) if (a.outer * a.inner * a.dim > ALONE)
  for (int64_t o = 0; o < a.outer; o++)
    for (int64_t n = 0; n < a.inner; n++) {
      const X* x = (const X*)a.x + o * a.x_outer + n * a.x_inner;
      const T* by = (const T*)a.by + o * a.by_outer + n * a.by_inner;
      T* out = (T*)a.out + (o * a.inner + n) * a.dim;
      const F32 single = a.single ? sigmoid(all(one(by))) : zero();
      for (int64_t i = 0; i < a.dim; i += LANES) {
        F32 share = a.single ? single : sigmoid(read(by + i, a.dim - i));
        write(out + i, read(x + i, a.dim - i) * share, a.dim - i);
      }
    }
}

INLINE float softplus(float v) { return v > 20.0f ? v : log1pf(expf(v)); }

template <class T>
void softplus(const Softplus& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.dim > ALONE)
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t i = 0; i < a.dim; i++)
      a.out[row * a.dim + i] = softplus(one((const T*)a.x + row * a.x_row + i) + a.bias[i]);
}

template <class T>
void delta_gates(const DeltaGates& g) {
#pragma omp parallel for schedule(static) if (g.rows * g.heads > ALONE)
  for (int64_t row = 0; row < g.rows; row++) {
    const T *b = (const T*)g.b + row * g.b_row, *a = (const T*)g.a + row * g.a_row;
    float *beta = g.beta + row * g.heads, *decay = g.decay + row * g.heads;
    for (int64_t i = 0; i < g.heads; i += LANES) write(beta + i, sigmoid(read(b + i, g.heads - i)), g.heads - i);
    for (int64_t i = 0; i < g.heads; i++) decay[i] = g.rate[i] * softplus(one(a + i) + g.bias[i]);
  }
}

void angles(const Angles& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.planes > ALONE / 16)
  for (int64_t row = 0; row < a.rows; row++)
    for (int64_t i = 0; i < a.planes; i++) {
      const float angle = (float)a.positions[row] * a.frequencies[i];
      a.cosine[row * a.planes + i] = cosf(angle) * a.amplitude;
      a.sine[row * a.planes + i] = sinf(angle) * a.amplitude;
    }
}

// Sixteen planes from number `at` on: their first coordinates and their second ones.
template <class T>
INLINE void planes_at(const T* x, int64_t at, int64_t planes, bool interleaved, F32& first, F32& second) {
  const int64_t left = planes - at;
  if (!interleaved) {
    first = read(x + at, left);
    second = read(x + planes + at, left);
    return;
  }
  const F32 low = read(x + 2 * at, 2 * left), high = read(x + 2 * at + LANES, 2 * left - LANES);
  unzip(low, high, first, second);
}

template <class T>
void rotate(const Rotate& a) {
#pragma omp parallel for collapse(2) schedule(static) if (a.outer * a.inner * a.dim > ALONE)
  for (int64_t o = 0; o < a.outer; o++)
    for (int64_t n = 0; n < a.inner; n++) {
      const T* x = (const T*)a.x + o * a.x_outer + n * a.x_inner;
      T* out = (T*)a.out + (o * a.inner + n) * a.dim;
      for (int64_t i = 0; i < a.planes; i += LANES) {
        const int64_t left = a.planes - i;
        F32 first, second;
        planes_at(x, i, a.planes, a.interleaved, first, second);
        const F32 c = read(a.cosine + o * a.planes + i, left), s = read(a.sine + o * a.planes + i, left);
        write(out + i, first * c - second * s, left);
        write(out + a.planes + i, second * c + first * s, left);
      }
      memcpy(out + 2 * a.planes, x + 2 * a.planes, (a.dim - 2 * a.planes) * sizeof(T));
    }
}

// Of `count` values that are not taken the largest, the first of equals; NaN only where nothing else is left.
int64_t best(const float* values, const bool* taken, int64_t count) {
  int64_t found = -1;
  for (int64_t i = 0; i < count; i++)
    if (!taken[i] && (found < 0 || values[i] > values[found] || values[found] != values[found])) found = i;
  return found;
}

void score(const Route& a, const float* logits, float* scores) {
  float top = -INFINITY;
  for (int64_t i = 0; i < a.experts; i++) top = logits[i] > top ? logits[i] : top;
  const F32 highest = all(top);
  F32 total = zero();
  for (int64_t i = 0; i < a.experts; i += LANES) {
    F32 l = read(logits + i, a.experts - i);
    F32 e = a.sigmoid ? sigmoid(l) : choose(is_nan(l), l, exp(l - highest));
    write(scores + i, e, a.experts - i);
    total = total + read(scores + i, a.experts - i);
  }
  if (a.sigmoid) return;
  const float whole_sum = sum(total);
  for (int64_t i = 0; i < a.experts; i++) scores[i] /= whole_sum;
}

// Mark every expert outside the best groups as taken.
void limit(const Route& a, const float* choice, bool* taken) {
  const int64_t size = a.experts / a.groups;
  float rank[MOST_EXPERTS];
  bool kept[MOST_EXPERTS] = {};
  for (int64_t g = 0; g < a.groups; g++) {
    bool seen[MOST_EXPERTS] = {};
    const int64_t first = best(choice + g * size, seen, size);
    rank[g] = choice[g * size + first];
    if (!a.sigmoid) continue;
    seen[first] = true;
    rank[g] += choice[g * size + best(choice + g * size, seen, size)];
  }
  for (int64_t i = 0; i < a.kept_groups; i++) kept[best(rank, kept, a.groups)] = true;
  for (int64_t i = 0; i < a.experts; i++) taken[i] = !kept[i / size];
}

void route(const Route& a) {
#pragma omp parallel for schedule(static) if (a.rows * a.experts > ALONE / 16)
  for (int64_t row = 0; row < a.rows; row++) {
    float scores[MOST_EXPERTS], choice[MOST_EXPERTS];
    bool taken[MOST_EXPERTS] = {};
    score(a, a.logits + row * a.experts, scores);
    for (int64_t i = 0; i < a.experts; i++) choice[i] = a.bias ? scores[i] + a.bias[i] : scores[i];
    if (a.groups > a.kept_groups) limit(a, choice, taken);
    float* weights = a.weights + row * a.per_token;
    float total = 0.0f;
    for (int64_t k = 0; k < a.per_token; k++) {
      const int64_t expert = best(choice, taken, a.experts);
      taken[expert] = true;
      a.chosen[row * a.per_token + k] = expert;
      weights[k] = scores[expert];
      total += scores[expert];
    }
    for (int64_t k = 0; k < a.per_token; k++)
      weights[k] = (a.normalised ? weights[k] / (total + 1e-20f) : weights[k]) * a.scale;
  }
}

void arrange(const Arrange& a) {
  const int64_t choices = a.tokens * a.per_token;
  for (int64_t e = 0; e <= a.experts; e++) a.starts[e] = 0;
  for (int64_t i = 0; i < choices; i++) a.starts[a.chosen[i] + 1]++;
  for (int64_t e = 0; e < a.experts; e++) a.starts[e + 1] += a.starts[e];
  for (int64_t i = 0; i < choices; i++) {
    const int64_t place = a.starts[a.chosen[i]]++;
    a.places[i] = place;
    a.sources[place] = i / a.per_token;
  }
  // Every start has moved to its end, which is where the next one began.
  for (int64_t e = a.experts; e > 0; e--) a.starts[e] = a.starts[e - 1];
  a.starts[0] = 0;
}

template <class T>
void combine(const Combine& a) {
#pragma omp parallel for schedule(static) if (a.tokens * a.per_token * a.dim > ALONE)
  for (int64_t token = 0; token < a.tokens; token++)
    for (int64_t i = 0; i < a.dim; i += LANES) {
      F32 total = zero();
      for (int64_t k = 0; k < a.per_token; k++) {
        const int64_t at = token * a.per_token + k;
        total = fma(read(a.rows + a.places[at] * a.dim + i, a.dim - i), all(a.weights[at]), total);
      }
      write((T*)a.out + token * a.dim + i, total, a.dim - i);
    }
}

// Blocks of a row are looked at side by side: a decoding step has one row of a million numbers.
template <class T>
bool finite(const Part& part, const int64_t* rows, int64_t count) {
  constexpr int64_t block = 1 << 14;
  const int64_t blocks = (part.dim + block - 1) / block;
  int bad = 0;
#pragma omp parallel for collapse(2) schedule(static) reduction(| : bad) if (count * part.dim > ALONE)
  for (int64_t row = 0; row < count; row++)
    for (int64_t b = 0; b < blocks; b++) {
      const T* x = (const T*)part.x + (rows ? rows[row] : row) * part.x_row;
      const int64_t end = (b + 1) * block < part.dim ? (b + 1) * block : part.dim;
      // Infinity and NaN are what has all bits of the exponent.
      I32 found = {};
      for (int64_t i = b * block; i < end; i += LANES)
        found |= same((I32)read(x + i, end - i) & 0x7F800000, all(0x7F800000));
      for (int lane = 0; lane < LANES; lane++) bad |= found[lane];
    }
  return !bad;
}

void finite(const Finite& a) {
  a.finite = 1;
  for (int64_t i = 0; i < a.number && a.finite; i++) {
    const Part& part = a.parts[i];
    a.finite = part.bf16 ? finite<uint16_t>(part, a.rows, a.count) : finite<float>(part, a.rows, a.count);
  }
}

// What a part of a row has: its largest number and where; -1 where one is not finite.
struct Peak {
  float value = -INFINITY;
  int64_t place = 0;

  void take(float v, int64_t at) {
    if (place < 0 || at < 0) place = -1;
    else if (v > value || (v == value && at < place)) value = v, place = at;
  }
};

template <class T>
Peak peak(const T* x, int64_t start, int64_t end) {
  constexpr int32_t exponent = 0x7F800000;
  Peak found{-INFINITY, start};
  F32 highest = all(-INFINITY);
  I32 steps = {}, bad = {};
  int64_t i = start;
  for (int32_t n = 0; i + LANES <= end; i += LANES, n++) {
    const F32 v = whole(x + i);
    const I32 higher = more(v, highest);
    bad |= same((I32)v & exponent, all(exponent));
    highest = choose(higher, v, highest);
    steps = (higher & n) | (~higher & steps);
  }
  for (int lane = 0; lane < LANES && i > start; lane++)
    found.take(highest[lane], bad[lane] ? -1 : start + (int64_t)steps[lane] * LANES + lane);
  for (; i < end; i++) found.take(one(x + i), std::isfinite(one(x + i)) ? i : -1);
  return found;
}

// Blocks of a row are looked at side by side, as in `finite`.
template <class T>
void largest_of_rows(const Largest& a) {
  constexpr int64_t block = 1 << 14;
#pragma omp parallel for schedule(static) if (a.rows > 1 && a.rows * a.dim > ALONE)
  for (int64_t row = 0; row < a.rows; row++) {
    const T* x = (const T*)a.x + row * a.x_row;
    Peak found{-INFINITY, 0};
#pragma omp parallel for schedule(static) if (a.rows == 1 && a.dim > ALONE)
    for (int64_t start = 0; start < a.dim; start += block) {
      const Peak part = peak(x, start, start + block < a.dim ? start + block : a.dim);
#pragma omp critical(largest)
      found.take(part.value, part.place);
    }
    a.places[row] = found.place;
  }
}

}  // namespace
}  // namespace ISA

EXPORT(rms_norm, RmsNorm) {
  if (arguments->bf16) ISA::rms_norm<uint16_t>(*arguments);
  else ISA::rms_norm<float>(*arguments);
}

EXPORT(gated_norm, GatedNorm) {
  if (arguments->bf16) ISA::gated_norm<uint16_t>(*arguments);
  else ISA::gated_norm<float>(*arguments);
}

EXPORT(activate, Activate) {
  if (arguments->bf16) ISA::activate<uint16_t>(*arguments);
  else ISA::activate<float>(*arguments);
}

EXPORT(gate, Gate) {
  if (arguments->by_bf16) {
    if (arguments->x_bf16) ISA::gate<uint16_t, uint16_t>(*arguments);
    else ISA::gate<float, uint16_t>(*arguments);
  } else {
    if (arguments->x_bf16) ISA::gate<uint16_t, float>(*arguments);
    else ISA::gate<float, float>(*arguments);
  }
}

EXPORT(softplus, Softplus) {
  if (arguments->bf16) ISA::softplus<uint16_t>(*arguments);
  else ISA::softplus<float>(*arguments);
}

EXPORT(delta_gates, DeltaGates) {
  if (arguments->bf16) ISA::delta_gates<uint16_t>(*arguments);
  else ISA::delta_gates<float>(*arguments);
}

EXPORT(angles, Angles) { ISA::angles(*arguments); }

EXPORT(rotate, Rotate) {
  if (arguments->bf16) ISA::rotate<uint16_t>(*arguments);
  else ISA::rotate<float>(*arguments);
}

EXPORT(route, Route) { ISA::route(*arguments); }

EXPORT(arrange, Arrange) { ISA::arrange(*arguments); }

EXPORT(combine, Combine) {
  if (arguments->bf16) ISA::combine<uint16_t>(*arguments);
  else ISA::combine<float>(*arguments);
}

EXPORT(finite, Finite) { ISA::finite(*arguments); }

EXPORT(largest, Largest) {
  if (arguments->bf16) ISA::largest_of_rows<uint16_t>(*arguments);
  else ISA::largest_of_rows<float>(*arguments);
}
