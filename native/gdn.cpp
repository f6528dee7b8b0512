// The gated delta rule: S <- e S; S <- S + k (beta (v - S^T k))^T; out = S^T q.
//
// Columns of S do not know of one another, so a block of columns goes through all tokens of a run while it lies in the
// first cache: one pass reads it, adds the last token's update, writes it and takes the products with the next token's k
// and q. A state is read from memory once and written once per run. Every product sums over the rows of S in order.
#include "conv.h"
#include "export.h"

struct Gdn {
  Timeline step;                  // channels: q, k [key_heads, key_dim], v [heads, value_dim]
  const float *beta, *decay;      // [tokens, heads], decay as a logarithm
  float *beta_log, *decay_log;    // [slots, drafts, heads]
  float* state;                   // [slots, heads, key_dim, value_dim]
  float* out;                     // [tokens, heads, value_dim]
  int64_t heads, key_heads, key_dim, value_dim;
};

namespace ISA {
namespace {

// Vectors of columns that a pass takes along: as many as leave their sums in registers.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int WIDE = 4;
#else
constexpr int WIDE = 2;
#endif
// A single token reads and writes its state once, in memory: longer stretches of it at a time.
constexpr int STREAM = 2 * WIDE;

// One head's tokens of a run.
struct Run {
  int64_t tokens, key_dim, value_dim;
  bool fold;               // the state afterwards is kept
  const float *q, *k, *v;  // [tokens, padded(dim)], q and k normalised
  const float *qk, *keep, *beta;
  float* const* out;  // where each token's output goes, or null
  float* block;       // [key_dim, WIDE vectors]: the state between two tokens
};

// S <- e S + k d^T from one place to another, and the products of the new S with the next token's k and q.
template <int N, bool UPDATE, bool PRODUCTS>
INLINE void pass(int64_t rows, const float* from, int64_t from_stride, float* to, int64_t to_stride, float keep,
                 const float* k, const F32* d, const float* next_k, const float* next_q, F32* sk, F32* sq) {
  F32 a[N] = {}, b[N] = {};
  for (int64_t i = 0; i < rows; i++) {
    for (int j = 0; j < N; j++) {
      F32 s = load<F32>(from + i * from_stride + j * LANES);
      if (UPDATE) {
        s = fma(d[j], all(k[i]), s * keep);
        store(to + i * to_stride + j * LANES, s);
      }
      if (PRODUCTS) {
        a[j] = fma(s, all(next_k[i]), a[j]);
        b[j] = fma(s, all(next_q[i]), b[j]);
      }
    }
  }
  for (int j = 0; PRODUCTS && j < N; j++) sk[j] = a[j], sq[j] = b[j];
}

// N vectors of columns, whose state lies in rows `stride` apart.
template <int N>
void columns_scan(const Run& run, int64_t column, float* state, int64_t stride) {
  const int64_t keys = padded(run.key_dim), values = padded(run.value_dim), rows = run.key_dim;
  const float* from = state;
  int64_t from_stride = stride;
  F32 sk[N], sq[N], d[N];
  pass<N, false, true>(rows, from, from_stride, nullptr, 0, 0, nullptr, nullptr, run.k, run.q, sk, sq);
  for (int64_t t = 0; t < run.tokens; t++) {
    const float *k = run.k + t * keys, *v = run.v + t * values + column;
    for (int j = 0; j < N; j++) {
      d[j] = (load<F32>(v + j * LANES) - sk[j] * run.keep[t]) * run.beta[t];
      // S^T q of the new S, from products with the old one.
      const F32 out = fma(sq[j], all(run.keep[t]), d[j] * run.qk[t]);
      if (run.out[t]) put(run.out[t] + column + j * LANES, out, run.value_dim - column - j * LANES);
    }
    if (t + 1 < run.tokens) {
      pass<N, true, true>(rows, from, from_stride, run.block, N * LANES, run.keep[t], k, d, k + keys, run.q + (t + 1) * keys, sk, sq);
      from = run.block;
      from_stride = N * LANES;
    } else if (run.fold) {
      pass<N, true, false>(rows, from, from_stride, state, stride, run.keep[t], k, d, nullptr, nullptr, nullptr, nullptr);
    }
  }
}

// The last columns, fewer than a vector: scanned in a padded copy.
void ragged_scan(const Run& run, int64_t column, float* state, float* copy) {
  const int64_t count = run.value_dim - column;
  for (int64_t i = 0; i < run.key_dim; i++) store(copy + i * LANES, numbers(state + i * run.value_dim, count));
  columns_scan<1>(run, column, copy, LANES);
  for (int64_t i = 0; run.fold && i < run.key_dim; i++) put(state + i * run.value_dim, load<F32>(copy + i * LANES), count);
}

void head_scan(const Run& run, float* state, float* copy) {
  int64_t column = 0;
  for (; run.tokens == 1 && column + STREAM * LANES <= run.value_dim; column += STREAM * LANES)
    columns_scan<STREAM>(run, column, state + column, run.value_dim);
  for (; column + WIDE * LANES <= run.value_dim; column += WIDE * LANES)
    columns_scan<WIDE>(run, column, state + column, run.value_dim);
  for (; column + LANES <= run.value_dim; column += LANES) columns_scan<1>(run, column, state + column, run.value_dim);
  if (column < run.value_dim) ragged_scan(run, column, state + column, copy);
}

void normalise(float* x, int64_t tokens, int64_t dim, float scale) {
  for (int64_t t = 0; t < tokens; t++, x += padded(dim)) {
    F32 squares = zero();
    for (int64_t i = 0; i < dim; i += LANES) { const F32 v = load<F32>(x + i); squares = fma(v, v, squares); }
    const float factor = scale / sqrtf(sum(squares) + 1e-6f);
    for (int64_t i = 0; i < dim; i += LANES) store(x + i, load<F32>(x + i) * factor);
  }
}

float dot(const float* x, const float* y, int64_t dim) {
  F32 total = zero();
  for (int64_t i = 0; i < dim; i += LANES) total = fma(load<F32>(x + i), load<F32>(y + i), total);
  return sum(total);
}

struct Workspace {
  Scratch floats;
  float *q, *k, *v, *qk, *keep, *beta, *block, *copy;
  float** out;

  static int64_t places(const Gdn& a) { return padded(RUN > a.step.drafts ? RUN : a.step.drafts); }
  explicit Workspace(const Gdn& a)
      : floats(places(a) * (2 * padded(a.key_dim) + padded(a.value_dim) + 5) + (WIDE + 1) * LANES * a.key_dim) {
    q = floats.take(places(a) * padded(a.key_dim));
    k = floats.take(places(a) * padded(a.key_dim));
    v = floats.take(places(a) * padded(a.value_dim));
    qk = floats.take(places(a)), keep = floats.take(places(a)), beta = floats.take(places(a));
    out = (float**)floats.take(2 * places(a));
    block = floats.take(WIDE * LANES * a.key_dim);
    copy = floats.take(LANES * a.key_dim);
  }
};

// The places [first, last) of one value head: what its tokens bring is read here, from the log or from the step.
template <class T>
void head_run(const Gdn& a, const Row<T>& row, int64_t head, int64_t first, int64_t last, Workspace& w) {
  const int64_t tokens = last - first, keys = a.key_heads * a.key_dim;
  convolve(row, 2 * keys + head * a.value_dim, a.value_dim, first, last, w.v);
  for (int64_t t = 0; t < padded(tokens); t++) {
    const int64_t place = t < tokens ? first + t : first;
    w.keep[t] = row.at(place, a.decay, a.decay_log, a.heads, head);
    w.beta[t] = row.at(place, a.beta, a.beta_log, a.heads, head);
    w.out[t] = place < row.replay ? nullptr : a.out + (row.token[place - row.replay] * a.heads + head) * a.value_dim;
  }
  for (int64_t t = 0; t < tokens; t += LANES) store(w.keep + t, exact_exp(load<F32>(w.keep + t)));
  const Run run{tokens, a.key_dim, a.value_dim, first < row.kept, w.q, w.k, w.v, w.qk, w.keep, w.beta, w.out, w.block};
  head_scan(run, a.state + (row.slot * a.heads + head) * a.key_dim * a.value_dim, w.copy);
}

// One key head of one sequence and the value heads it serves: nobody else touches their channels, log or state.
template <class T>
void key_head_scan(const Gdn& a, int64_t index, int64_t key_head, Workspace& w) {
  const Row<T> row(a.step, index);
  const int64_t keys = a.key_heads * a.key_dim, group = a.heads / a.key_heads;
  const int64_t query = key_head * a.key_dim, key = keys + query;
  for (int64_t first = 0, last; first < row.places; first = last) {
    last = row.run(first);
    convolve(row, query, a.key_dim, first, last, w.q);
    convolve(row, key, a.key_dim, first, last, w.k);
    normalise(w.q, last - first, a.key_dim, 1.0f / sqrtf((float)a.key_dim));
    normalise(w.k, last - first, a.key_dim, 1.0f);
    for (int64_t t = 0; t < last - first; t++)
      w.qk[t] = dot(w.q + t * padded(a.key_dim), w.k + t * padded(a.key_dim), a.key_dim);
    for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) head_run(a, row, h, first, last, w);
  }
  remember(row, query, a.key_dim);
  remember(row, key, a.key_dim);
  remember(row, 2 * keys + key_head * group * a.value_dim, group * a.value_dim);
  for (int64_t h = key_head * group; h < (key_head + 1) * group; h++) {
    remember(row, a.beta, a.beta_log, a.heads, h);
    remember(row, a.decay, a.decay_log, a.heads, h);
  }
}

// Key heads of one row are dealt out in turn, so a long prompt among short rows is everybody's work.
template <class T>
void gdn(const Gdn& a) {
  clear_padding(a.step, a.heads * a.value_dim, a.out);
  const bool worthwhile = a.step.tokens * a.heads * a.key_dim * a.value_dim > 1 << 15;
#pragma omp parallel if (worthwhile)
  {
    Workspace workspace(a);
#pragma omp for collapse(2) schedule(static, 1)
    for (int64_t row = 0; row < a.step.rows; row++)
      for (int64_t head = 0; head < a.key_heads; head++) key_head_scan<T>(a, row, head, workspace);
  }
}

}  // namespace
}  // namespace ISA

EXPORT(gdn, Gdn) {
  if (arguments->step.bf16) ISA::gdn<uint16_t>(*arguments);
  else ISA::gdn<float>(*arguments);
}
