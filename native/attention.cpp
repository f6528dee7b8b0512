// attend: causal attention of a step's queries over stored rows; decode, verify and prefill chunk are one operation.
//
// The order of every sum is fixed by absolute positions, so a row's bits depend on nothing but the row:
//   - a score is a dot product of sixteen running sums over the lanes of the row, then added up as `sum` does,
//     or, where the machine multiplies bytes, a sum of integers, which is exact in any order (integers.h);
//   - keys are taken in blocks of 32 from position 0 on, each with one step of the online softmax;
//   - SPLIT keys make a partial result of their own, and partial results are folded one after the other.
// Who computes which partial result is free. Few rows (a decode step) spread their splits over the threads, and who is
// done with the last one of a tile folds them; many rows (a prefill chunk) go tile by tile, and each block of keys is
// decoded once for all rows of a tile.
//
// Bytes move once, from memory through a decoder into registers: scales of rows are multiplied into scores and
// weights, not into numbers, and the lines that a row needs are fetched AHEAD blocks before it is their turn.
#ifdef _OPENMP
#include <omp.h>
#else
inline int omp_get_max_threads() { return 1; }
inline int omp_get_num_threads() { return 1; }
inline int omp_get_thread_num() { return 0; }
#endif
#include <sched.h>

#include <algorithm>
#include <atomic>
#include <memory>
#include <vector>

#include "export.h"
#include "integers.h"
#include "stored.h"

struct Attend {
  Stored scored[2];        // the fields that queries are scored against
  Stored value;            // the field that is averaged; the same as scored[0] where a row is key and value
  const void* queries[2];  // [tokens, query heads, dim] each
  int64_t token_stride[2], head_stride[2];
  void* out;               // [tokens, query heads, dim of the value]; zero for the tokens after those of the last row
  const int64_t *gather, *position, *count, *pages;  // of the step: [batch, longest], [batch], [batch], [batch, width]
  int64_t batch, longest, width, tokens, heads, group, window;  // window 0: none
  float factor;            // of the scores
  int32_t fields;          // how many are scored
  int32_t latent;          // whether scored[0] is the value as well
  int32_t bf16;            // queries and out are bfloat16, else float32
};

namespace ISA {
namespace {

constexpr int SPLIT = 512;  // keys of one partial result
constexpr int TILE = 64;    // query rows that share a decoded block
constexpr int AHEAD = 2;    // blocks
constexpr int64_t ALONE = 1 << 21;  // products below which waking another thread costs more than it saves
constexpr int FEW = 16;     // query rows of a tile whose partial results are no burden to keep

// What a block of one field is read from.
struct Source {
  const uint8_t *codes, *scales, *ahead;
};

INLINE Source source(const Stored& s, const Shape& shape, int64_t head, const int64_t* pages, int64_t key, int64_t end) {
  int64_t line = key % s.page_tokens, later = key + AHEAD * KEYS;
  const uint8_t* page = head_in_page(s, pages[key / s.page_tokens], head);
  Source from{page + line * shape.bytes, page + s.page_tokens * shape.bytes + 2 * line, nullptr};
  if (later < end) {
    const uint8_t* next = head_in_page(s, pages[later / s.page_tokens], head);
    from.ahead = next + later % s.page_tokens * shape.bytes;
    if (shape.scaled) __builtin_prefetch(next + s.page_tokens * shape.bytes + 2 * (later % s.page_tokens));
  }
  return from;
}

// What rows of a block are multiplied by, 32 of them; lines that nobody wrote may hold anything.
INLINE void scales(const Shape& shape, const Source& from, float factor, F32* to) {
  for (int i = 0; i < 2; i++) {
    F32 unit = all(shape.unit * factor);
    to[i] = shape.scaled ? widen_half(load<U16>(from.scales + 32 * i)) * unit : unit;
  }
}

// Query rows of one sequence and kv head that are attended together, in the order (token, head of the group).
struct Item {
  int64_t sequence, head;
  int64_t first, rows;  // of the rows of this sequence and head
  int64_t split, splits;
};

// Pieces of work that the threads of a region take until none is left. A thread that wakes late has missed nothing: it
// takes of what is left. Neighbours go together, so that the first keys of the next one are at hand, but ever fewer,
// so that all threads end at the same time.
struct Pieces {
  const int64_t count;
  std::atomic<int64_t> next{0}, done{0};

  explicit Pieces(int64_t count) : count(count) {}

  template <class Work>
  void work_off(Work work) {
    for (int64_t from = next.load(std::memory_order_relaxed); from < count;) {
      const int64_t run = std::max<int64_t>(1, (count - from) / (2 * omp_get_num_threads()));
      if (!next.compare_exchange_weak(from, from + run, std::memory_order_relaxed)) continue;
      for (int64_t i = from; i < from + run; i++) work(i);
      done.fetch_add(run, std::memory_order_release);
      from = next.load(std::memory_order_relaxed);
    }
  }
  // Until all are done, by whoever took them.
  void wait() const {
    while (done.load(std::memory_order_acquire) < count) sched_yield();
  }
};

// A weighted sum of value rows, the sum of the weights, and the score they are relative to; for `rows` query rows.
struct Partial {
  float *mean, *total, *highest;

  static int64_t size(int64_t rows, int lanes) { return rows * (lanes + 2); }
  Partial(float* at, int64_t rows, int lanes) : mean(at), total(at + rows * lanes), highest(total + rows) {}
  void clear(int64_t rows, int lanes) {
    std::fill_n(mean, rows * (lanes + 1), 0.0f);
    std::fill_n(highest, rows, -INFINITY);
  }
};

// Where lanes are NaN.
INLINE auto no_number(F32 v) { return more((I32)v & all((int32_t)0x7fffffff), all((int32_t)0x7f800000)); }

INLINE float finite_or_zero(float x) { return x == -INFINITY ? 0.0f : x; }
INLINE float exp_of(float x) { return exp(all(x))[0]; }

class Attention {
 public:
  explicit Attention(const Attend& a) : a(a), value(a.value.code, a.value.dim) {
    for (int f = 0; f < a.fields; f++) scored.emplace_back(a.scored[f].code, a.scored[f].dim);
#if INTEGERS
    for (int f = 0; f < a.fields; f++)
      if (of_integers(a.scored[f].code)) scored[f].lanes = query_floats(scored[f].dim);
    if (of_integers(a.value.code)) value.lanes = value_lanes(a.value.code, value.dim);
#endif
    for (int f = 0; f < a.fields; f++) dims[f] = dims_of(a.scored[f], scored[f]);
    dims[2] = dims_of(a.value, value);
    int64_t rows = 0;
    for (int64_t b = 0; b < a.batch; b++) first_row.push_back(rows), rows += a.count[b] * a.group;
    rows_of_head = rows;
    for (int f = 0; f < a.fields; f++) queries.push_back(floats(a.heads * rows * scored[f].lanes));
  }

  void run() {
    const int64_t token_bytes = a.heads * a.group * value.dim * (a.bf16 ? 2 : 4), owned = rows_of_head / a.group;
    if (owned < a.tokens) memset((char*)a.out + owned * token_bytes, 0, (a.tokens - owned) * token_bytes);
    std::vector<Item> tiles = cut();
    int64_t parts = 0, products = 0, most = 0;
    for (const Item& tile : tiles) {
      parts += tile.splits;
      most = std::max(most, tile.rows);
      const int64_t last = position(tile.sequence, tile.first + tile.rows - 1);
      products += (last + 1 - oldest(position(tile.sequence, tile.first))) * tile.rows * 2 * value.dim;
    }
    worthwhile = products > ALONE;
    // Enough tiles for all threads need no second level.
    const int64_t enough = (most > FEW ? 4 : 16) * omp_get_max_threads();
    if ((int64_t)tiles.size() >= enough || parts == (int64_t)tiles.size()) whole(tiles);
    else split(tiles, parts);
  }

 private:
  struct Free { void operator()(float* p) const { operator delete[](p, std::align_val_t(64)); } };
  using Floats = std::unique_ptr<float[], Free>;
  static Floats floats(int64_t count) { return Floats(new (std::align_val_t(64)) float[count]); }

  const Attend& a;
  Shape value;
  std::vector<Shape> scored;
  std::vector<int64_t> first_row;
  int64_t rows_of_head;
  bool worthwhile = true;
  std::vector<int> dims[3];     // of the lanes of scored fields and of the value; -1: none
  std::vector<Floats> queries;  // per field: [kv head][row][lanes], framed, times the factor of scores

  float* query(int field, int64_t head, int64_t row) const {
    return queries[field].get() + (head * rows_of_head + row) * scored[field].lanes;
  }

  // Query rows of one field: [sequence][token][query head].
  int64_t framed_rows() const { return a.fields * rows_of_head * a.heads; }

  // The `index`th of them all, field after field.
  void frame_query(int64_t index) const {
    const int f = (int)(index / (rows_of_head * a.heads));
    const int64_t at = index % (rows_of_head * a.heads), place = at / (a.heads * a.group), head = at % (a.heads * a.group);
    const int64_t b = std::upper_bound(first_row.begin(), first_row.end(), place * a.group) - first_row.begin() - 1;
    const int64_t token = a.gather[b * a.longest + place - first_row[b] / a.group];
    const Stored& field = a.scored[f];
    alignas(64) float x[LONGEST];
    read_row(a.queries[f], a.bf16, token * a.token_stride[f] + head * a.head_stride[f], field.dim, x);
    query_into_frame(field, head / a.group, x);
    float* to = query(f, head / a.group, place * a.group + head % a.group);
#if INTEGERS
    if (of_integers(field.code)) {
      for (int i = 0; i < field.dim; i++) x[i] *= a.factor;
      return write_query(x, field.dim, to);
    }
#endif
    for (int lane = 0; lane < scored[f].lanes; lane++) to[lane] = dims[f][lane] < 0 ? 0.0f : x[dims[f][lane]] * a.factor;
  }

  static std::vector<int> dims_of(const Stored& field, const Shape& shape) {
    std::vector<int> to;
#if INTEGERS
    if (of_integers(field.code)) {
      for (int lane = 0; lane < shape.lanes; lane++) to.push_back(dim_of_lane(field.code, shape.dim, lane));
      return to;
    }
#endif
    with_decoder(field.code, [&](auto type) {
      using D = typename decltype(type)::Decoder;
      for (int unit = 0; unit < shape.units; unit++)
        for (int v = 0; v < D::VECTORS; v++)
          for (int lane = 0; lane < LANES; lane++) to.push_back(D::dim_of(shape.dim, unit, v, lane));
    });
    return to;
  }

  // Position of a row of a sequence, and the first key it sees.
  int64_t position(int64_t sequence, int64_t row) const { return a.position[sequence] + row / a.group; }
  int64_t oldest(int64_t position) const { return a.window && position >= a.window ? position - a.window + 1 : 0; }

  std::vector<Item> cut() const {
    std::vector<Item> tiles;
    for (int64_t b = 0; b < a.batch; b++)
      for (int64_t head = 0; head < a.heads; head++)
        for (int64_t first = 0, rows = a.count[b] * a.group; first < rows; first += TILE) {
          int64_t held = std::min<int64_t>(TILE, rows - first);
          int64_t split = oldest(position(b, first)) / SPLIT;
          tiles.push_back({b, head, first, held, split, position(b, first + held - 1) / SPLIT - split + 1});
        }
    return tiles;
  }

  int64_t workspace(int64_t rows) const {
    int64_t lanes = value.lanes;
    for (const Shape& shape : scored) lanes += shape.lanes;
    return 4 * rows * KEYS + KEYS * lanes;
  }

  void whole(const std::vector<Item>& tiles) const {
    Pieces rows(framed_rows());
#pragma omp parallel if (worthwhile)
    {
      rows.work_off([&](int64_t i) { frame_query(i); });
      rows.wait();
      Floats space = floats(workspace(TILE)), one = floats(Partial::size(TILE, value.lanes)), sum = floats(Partial::size(TILE, value.lanes));
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < (int64_t)tiles.size(); i++) {
        const Item& tile = tiles[i];
        Partial part(one.get(), tile.rows, value.lanes), folded(sum.get(), tile.rows, value.lanes);
        folded.clear(tile.rows, value.lanes);
        for (int64_t s = 0; s < tile.splits; s++) {
          attend_split(tile, tile.split + s, part, space.get());
          fold(folded, part, tile.rows);
        }
        finish(tile, folded);
      }
    }
  }

  void split(const std::vector<Item>& tiles, int64_t parts) const {
    std::vector<std::pair<int64_t, int64_t>> work;  // (tile, split)
    std::vector<int64_t> place;                     // of the first partial result of each tile
    std::unique_ptr<std::atomic<int64_t>[]> missing(new std::atomic<int64_t>[tiles.size()]);
    int64_t size = 0;
    for (int64_t i = 0; i < (int64_t)tiles.size(); i++) {
      place.push_back(size);
      missing[i] = tiles[i].splits;
      for (int64_t s = 0; s < tiles[i].splits; s++) work.emplace_back(i, s);
      size += tiles[i].splits * Partial::size(tiles[i].rows, value.lanes);
    }
    Floats held = floats(size);
    auto partial = [&](int64_t i, int64_t s) {
      return Partial(held.get() + place[i] + s * Partial::size(tiles[i].rows, value.lanes), tiles[i].rows, value.lanes);
    };
    Pieces rows(framed_rows()), pieces(parts);
    std::atomic<int> gone{0};
#pragma omp parallel if (worthwhile)
    {
      rows.work_off([&](int64_t i) { frame_query(i); });
      rows.wait();
      Floats space = floats(workspace(TILE)), sum = floats(Partial::size(TILE, value.lanes));
      pieces.work_off([&](int64_t w) {
        const int64_t i = work[w].first;
        const Item& tile = tiles[i];
        attend_split(tile, tile.split + work[w].second, partial(i, work[w].second), space.get());
        if (missing[i].fetch_sub(1, std::memory_order_acq_rel) > 1) return;
        Partial folded(sum.get(), tile.rows, value.lanes);
        folded.clear(tile.rows, value.lanes);
        for (int64_t s = 0; s < tile.splits; s++) fold(folded, partial(i, s), tile.rows);
        finish(tile, folded);
      });
      // Who sleeps at the end of a region is woken late: the first thread, which goes on from here, comes last.
      if (omp_get_thread_num() > 0) gone.fetch_add(1, std::memory_order_release);
      else while (gone.load(std::memory_order_acquire) < omp_get_num_threads() - 1) sched_yield();
    }
  }

  void fold(Partial& into, const Partial& part, int64_t rows) const {
    for (int64_t r = 0; r < rows; r++) {
      if (part.total[r] == 0.0f) continue;
      float highest = std::max(into.highest[r], part.highest[r]);
      float before = exp_of(into.highest[r] - highest), now = exp_of(part.highest[r] - highest);
      into.highest[r] = highest;
      into.total[r] = into.total[r] * before + part.total[r] * now;
      for (int i = 0; i < value.lanes; i += LANES) {
        float* at = into.mean + r * value.lanes + i;
        store(at, load<F32>(at) * before + load<F32>(part.mean + r * value.lanes + i) * now);
      }
    }
  }

  void finish(const Item& tile, const Partial& folded) const {
    for (int64_t r = 0; r < tile.rows; r++) {
      int64_t row = tile.first + r, token = a.gather[tile.sequence * a.longest + row / a.group];
      int64_t query_head = tile.head * a.group + row % a.group;
      alignas(64) float x[LONGEST];
      const float* mean = folded.mean + r * value.lanes;
      alignas(64) float divided[2 * LONGEST];
      for (int lane = 0; lane < value.lanes; lane += LANES) store(divided + lane, load<F32>(mean + lane) / folded.total[r]);
      for (int lane = 0; lane < value.lanes; lane++) if (dims[2][lane] >= 0) x[dims[2][lane]] = divided[lane];
      out_of_frame(a.value, tile.head, x);
      int64_t at = (token * a.heads * a.group + query_head) * value.dim;
      if (a.bf16) for (int i = 0; i < value.dim; i++) ((uint16_t*)a.out)[at + i] = float_to_bf16(x[i]);
      else memcpy((float*)a.out + at, x, value.dim * sizeof(float));
    }
  }

  // One partial result: the keys of one split, for the rows of one tile.
  void attend_split(const Item& tile, int64_t split, Partial part, float* space) const {
    const int rows = (int)tile.rows;
    float* scores[2] = {space, space + rows * KEYS};
    float *weights = space + 2 * rows * KEYS;
    float* decoded = space + 4 * rows * KEYS;
    float* decoded_value = decoded;
    part.clear(rows, value.lanes);
    const int64_t* pages = a.pages + tile.sequence * a.width;
    int64_t from = std::max(split * SPLIT, oldest(position(tile.sequence, tile.first)) / KEYS * KEYS);
    const int64_t written = position(tile.sequence, tile.first + rows - 1) + 1, end = std::min((split + 1) * SPLIT, written);
    bool direct = rows <= DIRECT && rows != 3;
    for (int64_t key = from; key < end; key += KEYS) {
      int tokens = (int)std::min<int64_t>(KEYS, end - key);
      F32 factor[2][2];
      for (int f = 0; f < a.fields; f++) {
        Source rows_of = source(a.scored[f], scored[f], tile.head, pages, key, written);
        scales(scored[f], rows_of, 1.0f, factor[f]);
        score_field(f, rows_of, tile, tokens, direct && !a.latent, scores[f], decoded);
        if (f == 0 && a.latent) decoded_value = decoded, decoded += KEYS * scored[0].lanes;
      }
      Source values = source(a.value, value, tile.head, pages, key, written);
      F32 unit[2];
      scales(value, values, 1.0f, unit);
      soften(tile, key, scores, factor, unit, part, weights);
      weigh_field(values, rows, tokens, direct && !a.latent, weights, part.mean, decoded_value);
      decoded = decoded_value;
    }
  }

  void score_field(int f, const Source& from, const Item& tile, int tokens, bool direct, float* scores, float* decoded) const {
    const Shape& shape = scored[f];
    const float* q = query(f, tile.head, first_row[tile.sequence] + tile.first);
#if INTEGERS
    if (of_integers(a.scored[f].code)) {
      const int code = a.scored[f].code, dim = shape.dim;
      uint8_t *laid = (uint8_t*)decoded, *bytes = laid + KEYS * padded(dim);
      lay_keys(spread(code, from.codes, shape.bytes, dim, bytes), dim / planes(code), laid);
      const int ahead = from.ahead ? up(4 * planes(code) * KEYS * shape.bytes, dim) : 0;
#if defined(TILES)
      if (tile.rows > UNTILED) return in_sixteens((int)tile.rows, [&](int r, int count) {
        auto go = code == LM4 ? score_tiles<2> : score_tiles<1>;
        go(laid, dim, q + r * shape.lanes, count, scores + r * KEYS, from.ahead, r == 0 ? ahead : 0);
      });
#endif
      return in_fours((int)tile.rows, [&](int r, auto count) {
        auto go = code == LM4 ? score_integers<2, count> : score_integers<1, count>;
        go(laid, dim, q + r * shape.lanes, scores + r * KEYS, from.ahead, r == 0 ? ahead : 0);
      });
    }
#endif
    with_decoder(a.scored[f].code, [&](auto type) {
      using D = typename decltype(type)::Decoder;
      D decoder(shape.dim);
      if constexpr (DIRECT > 0) {
        auto go = tile.rows == 1 ? score<D, 1> : tile.rows == 2 ? score<D, 2> : score<D, 4>;
        if (direct) return go(decoder, from.codes, shape.bytes, shape.units, q, shape.lanes, tokens, scores, from.ahead);
      }
      decode(decoder, from.codes, shape.bytes, shape.units, tokens, decoded, from.ahead);
      in_fours((int)tile.rows, [&](int r, auto count) {
        score<Float32, count>(Float32(0), (const uint8_t*)decoded, 4 * shape.lanes, shape.lanes / LANES,
                              q + r * shape.lanes, shape.lanes, tokens, scores + r * KEYS, nullptr);
      });
    });
  }

  void weigh_field(const Source& from, int rows, int tokens, bool direct, const float* weights, float* mean, float* decoded) const {
#if INTEGERS
    if (of_integers(a.value.code)) {
      const int code = a.value.code;
      uint8_t *laid = (uint8_t*)decoded, *bytes = laid + KEYS * padded(value.dim);
      uint8_t* digits = (uint8_t*)(weights + rows * KEYS);
      const Bytes stored = spread(code, from.codes, value.bytes, value.dim, bytes);
      const int held = value.dim / planes(code);
      if (rows > 4) lay_values(stored, held, laid);
      for (int r = 0; r < rows; r++) write_weights(weights + r * KEYS, digits + r * WEIGHT_BYTES);
#if defined(TILES)
      if (rows > UNTILED) return in_sixteens(rows, [&](int r, int count) {
        const int ahead = from.ahead && !a.latent && r == 0 ? up(KEYS * value.bytes, value.lanes / (planes(code) * LANES)) : 0;
        auto go = code == LM4 ? weigh_tiles<2> : weigh_tiles<1>;
        go(laid, value.lanes, digits + r * WEIGHT_BYTES, count, mean + r * value.lanes, from.ahead, ahead);
      });
#endif
      return in_fours(rows, [&](int r, auto count) {
        const bool fetches = from.ahead && !a.latent && r == 0;
        const int ahead = fetches ? up(KEYS * value.bytes, weigh_steps(count, value.lanes)) : 0;
        const uint8_t* weights_of = digits + r * WEIGHT_BYTES;
        float* to = mean + r * value.lanes;
        if (rows > 4) {
          auto go = code == LM4 ? weigh_integers<2, count> : weigh_integers<1, count>;
          go(laid, value.lanes, weights_of, to, from.ahead, ahead);
        } else {
          auto go = code == LM4 ? weigh_rows<2, count> : weigh_rows<1, count>;
          go(stored, held, value.lanes, weights_of, to, from.ahead, ahead);
        }
      });
    }
#endif
    with_decoder(a.value.code, [&](auto type) {
      using D = typename decltype(type)::Decoder;
      D decoder(value.dim);
      if constexpr (DIRECT > 0) {
        auto go = rows == 1 ? weigh<D, 1> : rows == 2 ? weigh<D, 2> : weigh<D, 4>;
        if (direct) return go(decoder, from.codes, value.bytes, value.units, weights, tokens, mean, value.lanes, from.ahead);
      }
      if (!a.latent) decode(decoder, from.codes, value.bytes, value.units, tokens, decoded, from.ahead);
      in_fours(rows, [&](int r, auto count) {
        weigh<Float32, count>(Float32(0), (const uint8_t*)decoded, 4 * value.lanes, value.lanes / LANES,
                              weights + r * KEYS, tokens, mean + r * value.lanes, value.lanes, nullptr);
      });
    });
  }

  // One step of the online softmax over one block: weights (times the values' scales) from scores. Row after row is
  // begun before the first one is done, since each waits for the largest of its scores and for their sum.
  void soften(const Item& tile, int64_t key, float* const* scores, const F32 (*factor)[2], const F32* unit, Partial& part,
              float* weights) const {
    alignas(64) constexpr int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I32 count = load<I32>(counted);
    const int rows = (int)tile.rows;
    float before[TILE];
    int32_t last[TILE];  // the last key of the block that a row sees
    for (int r = 0; r < rows; r++) {
      const int64_t at = position(tile.sequence, tile.first + r);
      const int32_t low = (int32_t)std::max<int64_t>(oldest(at) - key, 0), high = (int32_t)std::min<int64_t>(at - key, KEYS - 1);
      F32 s[2];
      for (int i = 0; i < 2; i++) {
        s[i] = load<F32>(scores[0] + r * KEYS + i * LANES) * factor[0][i];
        if (a.fields > 1) s[i] = fma(load<F32>(scores[1] + r * KEYS + i * LANES), factor[1][i], s[i]);
        if (low > 0 || high < KEYS - 1) {
          I32 place = count + all((int32_t)(i * LANES));
          // Chosen, not multiplied: what lies in unwritten lines may be NaN.
          s[i] = choose(more(all(low), place) | more(place, all(high)), all(-INFINITY), s[i]);
        }
        store(scores[0] + r * KEYS + i * LANES, s[i]);
      }
      const float highest = std::max(part.highest[r], largest(max(s[0], s[1])));
      before[r] = highest == part.highest[r] ? 1.0f : exp_of(part.highest[r] - finite_or_zero(highest));
      part.highest[r] = highest;
      last[r] = high;
    }
    for (int r = 0; r < rows; r++) {
      const F32 relative = all(finite_or_zero(part.highest[r]));
      F32 p[2];
      for (int i = 0; i < 2; i++) {
        const F32 s = load<F32>(scores[0] + r * KEYS + i * LANES);
        // A key that is no number must not pass for one of no weight.
        p[i] = choose(no_number(s), s, exp(s - relative));
      }
      part.total[r] = part.total[r] * before[r] + sum(p[0] + p[1]);
      for (int i = 0; i < 2; i++) {
        F32 weight = p[i] * unit[i];
        if (last[r] < KEYS - 1) weight = choose(more(count + all((int32_t)(i * LANES)), all(last[r])), zero(), weight);
        store(weights + r * KEYS + i * LANES, weight);
      }
      if (before[r] != 1.0f)
        for (int i = 0; i < value.lanes; i += LANES) {
          float* at = part.mean + r * value.lanes + i;
          store(at, load<F32>(at) * before[r]);
        }
    }
  }
};

}  // namespace
}  // namespace ISA

EXPORT(attend, Attend) { ISA::Attention(*arguments).run(); }
