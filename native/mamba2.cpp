// Mamba-2's selective state space: h <- exp(dt A) h + dt x B; y = C h + D x.
//
// Rows of a head's state do not know of one another, so a few rows go through all tokens of a run while they lie in the
// first cache: one pass decays, adds and takes the product with C. A row's product sums its lanes in order.
#include "conv.h"
#include "export.h"

struct Mamba2 {
  Timeline step;        // channels: x [heads, head_dim], B and C [groups, size]
  const float* dt;      // [tokens, heads]
  float* dt_log;        // [slots, drafts, heads]
  const float *A, *D;   // [heads]
  float* state;         // [slots, heads, head_dim, size]
  float* out;           // [tokens, heads, head_dim]
  int64_t heads, groups, head_dim, size;
};

namespace ISA {
namespace {

constexpr int ROWS = 4;       // rows of a state that share each load of B and C
constexpr int64_t HEADS = 4;  // heads that share one convolution of their group's B and C

// One head's tokens of a run.
struct Run {
  int64_t tokens, head_dim, size;
  const float *x, *b, *c;  // [tokens, padded(dim)]
  const float *dt, *keep;  // [tokens]
  float skip;              // D
  float* const* out;       // where each token's output goes, or null
};

// N rows of the state, [N, padded(size)] side by side, through all tokens.
template <int N>
void rows_scan(const Run& run, int64_t first, float* state) {
  const int64_t size = padded(run.size), width = padded(run.head_dim);
  for (int64_t t = 0; t < run.tokens; t++) {
    const float *x = run.x + t * width + first, *b = run.b + t * size, *c = run.c + t * size;
    F32 y[N] = {};
    for (int64_t i = 0; i < size; i += LANES) {
      const F32 entering = load<F32>(b + i), read = load<F32>(c + i);
      for (int r = 0; r < N; r++) {
        const F32 h = fma(entering, all(x[r] * run.dt[t]), load<F32>(state + r * size + i) * run.keep[t]);
        store(state + r * size + i, h);
        y[r] = fma(h, read, y[r]);
      }
    }
    for (int r = 0; run.out[t] && r < N; r++) run.out[t][first + r] = fma(run.skip, x[r], sum(y[r]));
  }
}

// Drafts leave no trace in the state, and rows of odd length are padded: both are scanned in a copy.
template <int N>
void rows_scan(const Run& run, int64_t first, float* state, bool fold, float* copy) {
  const int64_t size = padded(run.size);
  if (fold && size == run.size) return rows_scan<N>(run, first, state);
  for (int r = 0; r < N; r++)
    for (int64_t i = 0; i < size; i += LANES) store(copy + r * size + i, numbers(state + r * run.size + i, run.size - i));
  rows_scan<N>(run, first, copy);
  for (int r = 0; fold && r < N; r++)
    for (int64_t i = 0; i < size; i += LANES) put(state + r * run.size + i, load<F32>(copy + r * size + i), run.size - i);
}

struct Workspace {
  Scratch floats;
  float *x, *b, *c, *dt, *keep, *copy;
  float** out;

  static int64_t places(const Mamba2& a) { return padded(RUN > a.step.drafts ? RUN : a.step.drafts); }
  explicit Workspace(const Mamba2& a)
      : floats(places(a) * (2 * padded(a.size) + padded(a.head_dim) + 4) + ROWS * padded(a.size)) {
    x = floats.take(places(a) * padded(a.head_dim));
    b = floats.take(places(a) * padded(a.size)), c = floats.take(places(a) * padded(a.size));
    dt = floats.take(places(a)), keep = floats.take(places(a));
    out = (float**)floats.take(2 * places(a));
    copy = floats.take(ROWS * padded(a.size));
  }
};

// The places [first, last) of one head.
template <class T>
void head_run(const Mamba2& a, const Row<T>& row, int64_t head, int64_t first, int64_t last, Workspace& w) {
  const int64_t tokens = last - first;
  convolve(row, head * a.head_dim, a.head_dim, first, last, w.x);
  for (int64_t t = 0; t < padded(tokens); t++) {
    const int64_t place = t < tokens ? first + t : first;
    w.dt[t] = row.at(place, a.dt, a.dt_log, a.heads, head);
    w.out[t] = place < row.replay ? nullptr : a.out + (row.token[place - row.replay] * a.heads + head) * a.head_dim;
  }
  for (int64_t t = 0; t < tokens; t += LANES) store(w.keep + t, exact_exp(load<F32>(w.dt + t) * a.A[head]));
  const Run run{tokens, a.head_dim, a.size, w.x, w.b, w.c, w.dt, w.keep, a.D[head], w.out};
  float* state = a.state + (row.slot * a.heads + head) * a.head_dim * a.size;
  const bool fold = first < row.kept;
  int64_t r = 0;
  for (; r + ROWS <= a.head_dim; r += ROWS) rows_scan<ROWS>(run, r, state + r * a.size, fold, w.copy);
  for (; r < a.head_dim; r++) rows_scan<1>(run, r, state + r * a.size, fold, w.copy);
}

// A few heads of one group.
template <class T>
void heads_scan(const Mamba2& a, const Row<T>& row, int64_t from, int64_t to, Workspace& w) {
  const int64_t b = a.heads * a.head_dim + from * a.groups / a.heads * a.size, c = b + a.groups * a.size;
  for (int64_t first = 0, last; first < row.places; first = last) {
    last = row.run(first);
    convolve(row, b, a.size, first, last, w.b);
    convolve(row, c, a.size, first, last, w.c);
    for (int64_t head = from; head < to; head++) head_run(a, row, head, first, last, w);
  }
  remember(row, from * a.head_dim, (to - from) * a.head_dim);
  for (int64_t head = from; head < to; head++) remember(row, a.dt, a.dt_log, a.heads, head);
}

template <class T>
void mamba2(const Mamba2& a) {
  clear_padding(a.step, a.heads * a.head_dim, a.out);
  const bool worthwhile = a.step.tokens * a.heads * a.head_dim * a.size > 1 << 15;
  const int64_t group = a.heads / a.groups, parts = (group + HEADS - 1) / HEADS;
#pragma omp parallel if (worthwhile)
  {
    Workspace workspace(a);
#pragma omp for collapse(2) schedule(static, 1)
    for (int64_t row = 0; row < a.step.rows; row++) {
      for (int64_t part = 0; part < a.groups * parts; part++) {
        const int64_t from = part / parts * group + part % parts * HEADS, end = (part / parts + 1) * group;
        heads_scan(a, Row<T>(a.step, row), from, from + HEADS < end ? from + HEADS : end, workspace);
      }
    }
    // B and C are read by all heads of a group; only now may their tail and log change.
#pragma omp for
    for (int64_t row = 0; row < a.step.rows; row++)
      remember(Row<T>(a.step, row), a.heads * a.head_dim, 2 * a.groups * a.size);
  }
}

}  // namespace
}  // namespace ISA

EXPORT(mamba2, Mamba2) {
  if (arguments->step.bf16) ISA::mamba2<uint16_t>(*arguments);
  else ISA::mamba2<float>(*arguments);
}
