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
// Bytes move once, from memory through a decoder into registers: scales of rows are multiplied into scores and weights,
// not into numbers. All heads of a page are read before the next page, so that memory is read from end to end, and lines
// are fetched AHEAD pieces before it is their turn (docs/kernels.md).
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
constexpr int AHEAD = 4;    // pieces of rows, each of one field and head
constexpr int64_t ALONE = 1 << 21;  // products below which waking another thread costs more than it saves
constexpr int FEW = 16;     // query rows of a tile whose partial results are no burden to keep
constexpr int PIECES = 8;   // of work for each thread, if heads have to be parted for it

// What a block of one field and head is read from.
struct Source {
  const uint8_t *codes, *scales;
};

INLINE Source source(const Stored& s, const Shape& shape, int64_t head, const int64_t* pages, int64_t key) {
  const uint32_t line = (uint32_t)key % (uint32_t)s.page_tokens;  // half the time of a division of 64 bits
  const uint8_t* page = head_in_page(s, pages[(uint32_t)key / (uint32_t)s.page_tokens], head);
  return {page + line * shape.bytes, page + s.page_tokens * shape.bytes + 2 * line};
}

// What rows of a block are multiplied by, 32 of them; lines that nobody wrote may hold anything.
INLINE void scales(const Shape& shape, const Source& from, float factor, F32* to) {
  for (int i = 0; i < 2; i++) {
    F32 unit = all(shape.unit * factor);
    to[i] = shape.scaled ? widen_half(load<U16>(from.scales + 32 * i)) * unit : unit;
  }
}

// Query rows of one sequence that are attended together: of consecutive kv heads, the same rows of each, in the order
// (head, token, head of the group). Heads lie side by side in a page, so that memory is read from end to end.
struct Item {
  int64_t sequence, head, heads;
  int64_t first, rows;  // of each head's rows
  int64_t split, splits;

  int64_t all() const { return heads * rows; }
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

  // Sums and scores of sixteen rows are one vector.
  static int64_t vectors(int64_t rows) { return (rows + LANES - 1) / LANES * LANES; }
  static int64_t size(int64_t rows, int lanes) { return rows * lanes + 2 * vectors(rows); }
  Partial(float* at, int64_t rows, int lanes) : mean(at), total(at + rows * lanes), highest(total + vectors(rows)) {}
  void clear(int64_t rows, int lanes) {
    std::fill_n(mean, rows * lanes + vectors(rows), 0.0f);
    std::fill_n(highest, vectors(rows), -INFINITY);
  }
};

INLINE F32 finite_or_zero(F32 x) { return choose(more(x, all(-INFINITY)) | is_nan(x), x, zero()); }
INLINE float exp_of(float x) { return exp(all(x))[0]; }

class Attention {
 public:
  explicit Attention(const Attend& a) : a(a), value(a.value.code, a.value.dim) {
    for (int f = 0; f < a.fields; f++) scored.emplace_back(a.scored[f].code, a.scored[f].dim);
#if INTEGERS
    for (int f = 0; f < a.fields; f++)
      if (of_integers(a.scored[f].code)) scored[f].lanes = query_floats(a.scored[f].code, scored[f].dim);
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
    std::vector<Item> tiles = cut(a.heads);
    // Of few pieces the last one would be waited for.
    for (int64_t heads = a.heads; heads > 1 && pieces_of(tiles) < PIECES * omp_get_max_threads();)
      tiles = cut(heads = (heads + 1) / 2);
    int64_t products = 0, most = 0;
    for (const Item& tile : tiles) {
      most = std::max(most, tile.rows);
      const int64_t last = position(tile.sequence, tile.first + tile.rows - 1);
      products += (last + 1 - oldest(position(tile.sequence, tile.first))) * tile.all() * 2 * value.dim;
    }
    worthwhile = products > ALONE;
    const int64_t parts = pieces_of(tiles);
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
      return write_query(field.code, x, field.dim, to);
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

  // With at most so many heads in a tile, where their rows are few.
  std::vector<Item> cut(int64_t most) const {
    std::vector<Item> tiles;
    for (int64_t b = 0; b < a.batch; b++) {
      const int64_t rows = a.count[b] * a.group, together = rows > FEW ? 1 : std::min(most, TILE / std::max<int64_t>(rows, 1));
      for (int64_t head = 0; head < a.heads; head += together)
        for (int64_t first = 0; first < rows; first += TILE) {
          int64_t held = std::min<int64_t>(TILE, rows - first);
          int64_t split = oldest(position(b, first)) / SPLIT;
          tiles.push_back({b, head, std::min(together, a.heads - head), first, held, split,
                           position(b, first + held - 1) / SPLIT - split + 1});
        }
    }
    return tiles;
  }

  static int64_t pieces_of(const std::vector<Item>& tiles) {
    int64_t count = 0;
    for (const Item& tile : tiles) count += tile.splits;
    return count;
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
        Partial part(one.get(), tile.all(), value.lanes), folded(sum.get(), tile.all(), value.lanes);
        folded.clear(tile.all(), value.lanes);
        for (int64_t s = 0; s < tile.splits; s++) {
          attend_split(tile, tile.split + s, part, space.get());
          fold(folded, part, tile.all());
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
      size += tiles[i].splits * Partial::size(tiles[i].all(), value.lanes);
    }
    Floats held = floats(size);
    auto partial = [&](int64_t i, int64_t s) {
      return Partial(held.get() + place[i] + s * Partial::size(tiles[i].all(), value.lanes), tiles[i].all(), value.lanes);
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
        Partial folded(sum.get(), tile.all(), value.lanes);
        folded.clear(tile.all(), value.lanes);
        for (int64_t s = 0; s < tile.splits; s++) fold(folded, partial(i, s), tile.all());
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
    for (int64_t r = 0; r < tile.all(); r++) {
      const int64_t head = tile.head + r / tile.rows, row = tile.first + r % tile.rows;
      const int64_t token = a.gather[tile.sequence * a.longest + row / a.group], query_head = head * a.group + row % a.group;
      alignas(64) float x[LONGEST];
      const float* mean = folded.mean + r * value.lanes;
      alignas(64) float divided[2 * LONGEST];
      for (int lane = 0; lane < value.lanes; lane += LANES) store(divided + lane, load<F32>(mean + lane) / folded.total[r]);
      for (int lane = 0; lane < value.lanes; lane++) if (dims[2][lane] >= 0) x[dims[2][lane]] = divided[lane];
      out_of_frame(a.value, head, x);
      int64_t at = (token * a.heads * a.group + query_head) * value.dim;
      if (a.bf16) for (int i = 0; i < value.dim; i++) ((uint16_t*)a.out)[at + i] = float_to_bf16(x[i]);
      else memcpy((float*)a.out + at, x, value.dim * sizeof(float));
    }
  }

  // Fields as they are read: the scored ones, then the value, if it is not one of them.
  int read_fields() const { return a.fields + (a.latent ? 0 : 1); }
  const Stored& field(int f) const { return f < a.fields ? a.scored[f] : a.value; }
  const Shape& shape(int f) const { return f < a.fields ? scored[f] : value; }

  // What is read AHEAD pieces later, up to the key `end`: block after block, of each field head after head.
  Ahead ahead(const Item& tile, int f, int64_t head, int64_t key, int64_t end) const {
    const int heads = (int)tile.heads, block = read_fields() * heads;
    int place = f * heads + (int)head + AHEAD;
    for (; place >= block; place -= block) key += KEYS;
    if (key >= end) return {};
    for (f = 0; place >= heads; place -= heads) f++;
    const Source later = source(field(f), shape(f), tile.head + place, a.pages + tile.sequence * a.width, key);
    if (shape(f).scaled) __builtin_prefetch(later.scales);
    return {later.codes, later.codes + std::min<int64_t>(KEYS, end - key) * shape(f).bytes};
  }

  // One partial result: the keys of one split, for the rows of one tile.
  void attend_split(const Item& tile, int64_t split, Partial part, float* space) const {
    const int rows = (int)tile.rows, all = (int)tile.all();
    float* scores[2] = {space, space + all * KEYS};
    float *weights = space + 2 * all * KEYS, *decoded = space + 4 * all * KEYS;
    part.clear(all, value.lanes);
    const int64_t* pages = a.pages + tile.sequence * a.width;
    int64_t from = std::max(split * SPLIT, oldest(position(tile.sequence, tile.first)) / KEYS * KEYS);
    const int64_t written = position(tile.sequence, tile.first + rows - 1) + 1, end = std::min((split + 1) * SPLIT, written);
    const bool direct = rows <= DIRECT && rows != 3 && !a.latent;
    for (int64_t key = from; key < end; key += KEYS) {
      const int tokens = (int)std::min<int64_t>(KEYS, end - key);
      for (int f = 0; f < a.fields; f++)
        for (int64_t h = 0; h < tile.heads; h++) {
          const int64_t head = tile.head + h;
          const Source keys = source(a.scored[f], scored[f], head, pages, key);
          // Latent rows stay decoded, because they are the values too.
          float* to = decoded + (f > 0 && a.latent ? KEYS * scored[0].lanes : 0);
          const float* q = query(f, head, first_row[tile.sequence] + tile.first);
          score_field(f, keys, q, rows, tokens, direct, scores[f] + h * rows * KEYS, to, ahead(tile, f, h, key, written));
        }
      soften(tile, key, pages, scores, part, weights);
      const float* used = weights;
#if INTEGERS
      static_assert(WEIGHT_BYTES == KEYS * sizeof(float), "digits and weights of a row are as long");
      if (of_integers(a.value.code)) write_weights(weights, all, (uint8_t*)(weights + all * KEYS)), used = weights + all * KEYS;
#endif
      for (int64_t h = 0; h < tile.heads; h++) {
        const Source values = source(a.value, value, tile.head + h, pages, key);
        const Ahead later = a.latent ? Ahead() : ahead(tile, a.fields, h, key, written);
        weigh_field(values, rows, tokens, direct, used + h * rows * KEYS, part.mean + h * rows * value.lanes, decoded, later);
      }
    }
  }

  void score_field(int f, const Source& from, const float* q, int rows, int tokens, bool direct, float* scores, float* decoded,
                   Ahead ahead) const {
    const Shape& shape = scored[f];
#if INTEGERS
    if (of_integers(a.scored[f].code)) {
      const int code = a.scored[f].code, dim = shape.dim;
      uint8_t *laid = (uint8_t*)decoded, *bytes = laid + KEYS * padded(dim);
      lay_keys(spread(code, from.codes, shape.bytes, dim, bytes), dim / planes(code), laid);
#if defined(TILES)
      if (rows > UNTILED) return in_sixteens(rows, [&](int r, int count) {
        auto go = code == LM4 ? score_tiles<2> : score_tiles<1>;
        go(laid, dim, q + r * shape.lanes, shape.lanes, count, scores + r * KEYS, r == 0 ? ahead : Ahead());
      });
#endif
      return in_fours(rows, [&](int r, auto count) {
        auto go = code == LM4 ? score_integers<2, count> : score_integers<1, count>;
        go(laid, dim, q + r * shape.lanes, shape.lanes, scores + r * KEYS, r == 0 ? ahead : Ahead());
      });
    }
#endif
    with_decoder(a.scored[f].code, [&](auto type) {
      using D = typename decltype(type)::Decoder;
      D decoder(shape.dim);
      if constexpr (DIRECT > 0) {
        auto go = rows == 1 ? score<D, 1> : rows == 2 ? score<D, 2> : score<D, 4>;
        if (direct) return go(decoder, from.codes, shape.bytes, shape.units, q, shape.lanes, tokens, scores, ahead);
      }
      decode(decoder, from.codes, shape.bytes, shape.units, tokens, decoded, ahead);
      in_fours(rows, [&](int r, auto count) {
        score<Float32, count>(Float32(0), (const uint8_t*)decoded, 4 * shape.lanes, shape.lanes / LANES,
                              q + r * shape.lanes, shape.lanes, tokens, scores + r * KEYS, Ahead());
      });
    });
  }

  // `weights` is what `soften` wrote; of integers, their digits.
  void weigh_field(const Source& from, int rows, int tokens, bool direct, const float* weights, float* mean, float* decoded,
                   Ahead ahead) const {
#if INTEGERS
    if (of_integers(a.value.code)) {
      const int code = a.value.code;
      uint8_t *laid = (uint8_t*)decoded, *bytes = laid + KEYS * padded(value.dim);
      const Bytes stored = spread(code, from.codes, value.bytes, value.dim, bytes);
      const int held = value.dim / planes(code);
      if (rows > 4) lay_values(stored, held, laid);
#if defined(TILES)
      if (rows > UNTILED) return in_sixteens(rows, [&](int r, int count) {
        auto go = code == LM4 ? weigh_tiles<2> : weigh_tiles<1>;
        go(laid, value.lanes, (const uint8_t*)weights + r * WEIGHT_BYTES, count, mean + r * value.lanes, r == 0 ? ahead : Ahead());
      });
#endif
      return in_fours(rows, [&](int r, auto count) {
        const Ahead later = r == 0 ? ahead : Ahead();
        const uint8_t* weights_of = (const uint8_t*)weights + r * WEIGHT_BYTES;
        float* to = mean + r * value.lanes;
        if (rows > 4) {
          auto go = code == LM4 ? weigh_integers<2, count> : weigh_integers<1, count>;
          go(laid, value.lanes, weights_of, to, later);
        } else {
          auto go = code == LM4 ? weigh_rows<2, count> : weigh_rows<1, count>;
          go(stored, held, value.lanes, weights_of, to, later);
        }
      });
    }
#endif
    with_decoder(a.value.code, [&](auto type) {
      using D = typename decltype(type)::Decoder;
      D decoder(value.dim);
      if constexpr (DIRECT > 0) {
        auto go = rows == 1 ? weigh<D, 1> : rows == 2 ? weigh<D, 2> : weigh<D, 4>;
        if (direct) return go(decoder, from.codes, value.bytes, value.units, weights, tokens, mean, value.lanes, ahead);
      }
      if (!a.latent) decode(decoder, from.codes, value.bytes, value.units, tokens, decoded, ahead);
      in_fours(rows, [&](int r, auto count) {
        weigh<Float32, count>(Float32(0), (const uint8_t*)decoded, 4 * value.lanes, value.lanes / LANES,
                              weights + r * KEYS, tokens, mean + r * value.lanes, value.lanes, Ahead());
      });
    });
  }

  // One step of the online softmax over one block: weights (times the values' scales) from scores. Sixteen rows at a
  // time, because each waits for the largest of its scores and for their sum.
  void soften(const Item& tile, int64_t key, const int64_t* pages, float* const* scores, Partial& part, float* weights) const {
    alignas(64) constexpr int32_t counted[LANES] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    const I32 counts[2] = {load<I32>(counted), load<I32>(counted) + all((int32_t)LANES)};
    const int64_t first = position(tile.sequence, tile.first), final = position(tile.sequence, tile.first + tile.rows - 1);
    const bool seen = key + KEYS - 1 <= first && oldest(final) <= key;  // all keys by all rows
    const int rows = (int)tile.rows, all_rows = (int)tile.all();
    // The first and the last key of the block that a row sees.
    auto bounds = [&](int row, I32& low, I32& high) INLINE_LAMBDA {
      const int64_t at = position(tile.sequence, tile.first + row);
      low = all((int32_t)std::max<int64_t>(oldest(at) - key, 0)), high = all((int32_t)std::min<int64_t>(at - key, KEYS - 1));
    };
    for (int start = 0; start < all_rows; start += LANES) {
      const int count = std::min(LANES, all_rows - start);
      F32 top[LANES], unit[2], factor[2][2];
      for (int i = 0, row = start % rows, head = start / rows; i < count; i++) {
        if (i == 0 || row == 0)
          for (int f = 0; f < a.fields; f++)
            scales(scored[f], source(a.scored[f], scored[f], tile.head + head, pages, key), 1.0f, factor[f]);
        float* own = scores[0] + (start + i) * KEYS;
        F32 s[2];
        for (int half = 0; half < 2; half++) {
          s[half] = load<F32>(own + half * LANES) * factor[0][half];
          if (a.fields > 1) s[half] = fma(load<F32>(scores[1] + (start + i) * KEYS + half * LANES), factor[1][half], s[half]);
        }
        if (!seen) {
          I32 low, high;
          bounds(row, low, high);
          // Chosen, not multiplied: what lies in unwritten lines may be NaN.
          for (int half = 0; half < 2; half++)
            s[half] = choose(more(low, counts[half]) | more(counts[half], high), all(-INFINITY), s[half]);
        }
        store(own, s[0]), store(own + LANES, s[1]);
        top[i] = max(s[0], s[1]);
        if (++row == rows) row = 0, head++;
      }
      for (int i = count; i < LANES; i++) top[i] = all(-INFINITY);
      const F32 before = load<F32>(part.highest + start), highest = max(before, largests(top));
      const F32 relative = finite_or_zero(highest), shrunk = exp(before - relative);
      alignas(64) float base[LANES], shrink[LANES];
      store(part.highest + start, highest), store(base, relative), store(shrink, shrunk);
      for (int i = 0, row = start % rows, head = start / rows; i < count; i++) {
        if (i == 0 || row == 0) scales(value, source(a.value, value, tile.head + head, pages, key), 1.0f, unit);
        const float* own = scores[0] + (start + i) * KEYS;
        // A key that is no number must not pass for one of no weight: e^NaN is NaN.
        const F32 p[2] = {exp(load<F32>(own) - all(base[i])), exp(load<F32>(own + LANES) - all(base[i]))};
        top[i] = p[0] + p[1];
        F32 weight[2] = {p[0] * unit[0], p[1] * unit[1]};
        if (!seen) {
          I32 low, high;
          bounds(row, low, high);
          for (int half = 0; half < 2; half++) weight[half] = choose(more(counts[half], high), zero(), weight[half]);
        }
        store(weights + (start + i) * KEYS, weight[0]), store(weights + (start + i) * KEYS + LANES, weight[1]);
        if (shrink[i] != 1.0f)
          for (float* at = part.mean + (start + i) * value.lanes; at < part.mean + (start + i + 1) * value.lanes; at += LANES)
            store(at, load<F32>(at) * all(shrink[i]));
        if (++row == rows) row = 0, head++;
      }
      for (int i = count; i < LANES; i++) top[i] = zero();
      store(part.total + start, load<F32>(part.total + start) * shrunk + sums(top));
    }
  }
};

}  // namespace
}  // namespace ISA

EXPORT(attend, Attend) { ISA::Attention(*arguments).run(); }
