// Linear layers whose rows do not know of each other.
//
// A weight [out, in] is packed once. Its outputs are cut into panels of 64 (the last one as wide as it must be, in
// steps of 16), and a panel lies in memory as it is read:
//
//   float32   [in][64]           one number of x at a time, times 64 weights
//   bfloat16  [in / 2][64][2]    one pair of x at a time, times 64 pairs of weights
//
// Lanes are outputs, so a sum never crosses lanes: it runs over `in` from first to last, one number (or pair, the odd
// one first, as vdpbf16ps does) after the other. That order is the same for every number of rows, tile and thread,
// and so are the bits: decoding, verifying drafts and prefill agree by construction. With tiles (AMX) sixteen pairs go into
// a product at once, whose order inside is the machine's, and a panel is four tiles as it lies.
//
// How bytes move: each thread streams panels of its own from memory, once, from first byte to last, which is all the
// machine's own prefetchers ask for. For many rows a panel is cut into blocks of BLOCK inputs, which stay in the second
// cache while they meet tile after tile of rows; a tile's sums stay in registers within the block and rest in a float32
// scratch between blocks.
#include "export.h"
#include "simd.h"
#include "tiles.h"

struct Linear {
  const void* x;       // [groups, rows, in], the innermost dimension contiguous
  const void* weight;  // [groups] packed matrices
  const float* bias;   // [groups, out], or null
  void* out;           // [groups, rows, out], the innermost dimension contiguous
  const int64_t* starts;   // [groups + 1] or null: group g has rows starts[g] to starts[g + 1] instead of all of them
  const int64_t* sources;  // [rows] or null: where in x a row lies, instead of at its own place
  int64_t rows, in, out_features, groups;
  int64_t x_row, x_group, out_row, out_group;  // strides, in numbers
  int32_t bf16;      // x and weight are bfloat16, else float32
  int32_t out_bf16;  // out is bfloat16, else float32
};

struct Pack {
  const void* weight;  // [out, in], rows `row_stride` apart
  void* packed;        // one packed matrix
  int64_t in, out_features, row_stride;
  int64_t first;       // which output of the packed matrix is the weight's first
  int64_t packed_out;  // how many outputs the packed matrix has
  int32_t bf16;
};

struct Rows {
  const void* packed;
  const int64_t* indices;  // [rows]
  void* out;               // [rows, in]
  int64_t rows, in, out_features;
  int32_t bf16;
};

namespace ISA {
namespace {

constexpr int64_t PANEL = 64;     // outputs
constexpr int64_t BLOCK = 1024;   // inputs of a panel that are multiplied with all rows of a chunk before the next
constexpr int64_t RUN = 128;      // inputs that are summed on their own: rounding grows with RUN + in / RUN, not with in
constexpr int64_t CHUNK = 192;    // rows whose sums rest in the scratch
constexpr int64_t ALONE = 1 << 18;  // weights below which waking another thread costs more than it saves, and products:
constexpr int64_t ALONE_PRODUCTS = 1 << 21;

#if defined(__AVX512F__)
constexpr int TILE_ROWS = 6, TILE_VECTORS = 4;  // 24 of 32 registers hold sums
#else
constexpr int TILE_ROWS = 3, TILE_VECTORS = 2;  // 12 of 16
#endif

INLINE int64_t up(int64_t n, int64_t multiple) { return (n + multiple - 1) / multiple * multiple; }

// The width of panel p, and where it begins, in numbers. `in` is rounded up to whole pairs for bfloat16.
INLINE int64_t width_of(int64_t panel, int64_t outs) { return up(outs - panel * PANEL < PANEL ? outs - panel * PANEL : PANEL, LANES); }
template <class T> INLINE int64_t depth_of(int64_t in) { return sizeof(T) == 2 ? up(in, 2) : in; }
template <class T> INLINE int64_t size_of(int64_t in, int64_t outs) { return depth_of<T>(in) * up(outs, LANES); }

// Two bfloat16 numbers of x in the order in which they lie.
INLINE uint32_t pair_at(const uint16_t* x) { uint32_t p; memcpy(&p, x, 4); return p; }

// `inputs` of x are multiplied at a time, which are at hand as `Near`: without a product of bfloat16 they are widened
// once for a tile, or every vector of weights would wait for it.
template <class T> struct Step;

template <> struct Step<float> {
  static constexpr int64_t inputs = 1;
  typedef float Near;
  typedef F32 X;
  static INLINE X spread(const float* x, bool) { return all(*x); }
  static INLINE F32 add(F32 sum, const float* w, X x) { return fma(load<F32>(w), x, sum); }
};

template <> struct Step<uint16_t> {
  static constexpr int64_t inputs = 2;
#if defined(__AVX512BF16__)
  typedef uint16_t Near;
  typedef __m512i X;
  static INLINE X spread(const uint16_t* x, bool half) { return _mm512_set1_epi32((int)(half ? *x : pair_at(x))); }
  static INLINE F32 add(F32 sum, const uint16_t* w, X x) {
    return (F32)_mm512_dpbf16_ps((__m512)sum, (__m512bh)load<__m512i>(w), (__m512bh)x);
  }
#else
  typedef float Near;
  struct X { F32 even, odd; };
  static INLINE X spread(const float* x, bool half) { return {all(x[0]), half ? zero() : all(x[1])}; }
  static INLINE F32 add(F32 sum, const uint16_t* w, X x) {
    U32 pairs = load<U32>(w);
    sum = fma((F32)(pairs & 0xFFFF0000u), x.odd, sum);
    return fma((F32)(pairs << 16), x.even, sum);
  }
#endif
};

template <class T> using Near = typename Step<T>::Near;

INLINE const float* near(const float* x, int64_t, float*) { return x; }
#if defined(__AVX512BF16__)
INLINE const uint16_t* near(const uint16_t* x, int64_t, uint16_t*) { return x; }
#else
INLINE const float* near(const uint16_t* x, int64_t count, float* to) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) store(to + i, load_bf16(x + i));
  for (; i < count; i++) to[i] = bf16_to_float(x[i]);
  return to;
}
#endif

// ROWS x VECTORS sums over inputs [begin, end) of a panel `width` wide, from and to `sums` [ROWS][64]; x from `begin` on.
template <class T, int ROWS, int VECTORS>
INLINE void tile(const Near<T>* const* x, const T* w, int64_t width, int64_t begin, int64_t end, float* sums) {
  typedef Step<T> S;
  F32 sum[ROWS][VECTORS];
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) sum[r][v] = zero();
  const int64_t line = width * S::inputs;
  w += begin * width;
  auto advance = [&](int64_t i, bool half) INLINE_LAMBDA {
#pragma GCC unroll 8
    for (int r = 0; r < ROWS; r++) {
      auto one = S::spread(x[r] + (i - begin), half);
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; v++) sum[r][v] = S::add(sum[r][v], w + v * LANES * S::inputs, one);
    }
    w += line;
  };
  int64_t i = begin;
  for (; i + S::inputs <= end; i += S::inputs) advance(i, false);
  if (i < end) advance(i, true);  // the last of an odd number of inputs; its partner's weight is zero
#pragma GCC unroll 8
  for (int r = 0; r < ROWS; r++)
#pragma GCC unroll 4
    for (int v = 0; v < VECTORS; v++) {
      float* at = sums + r * PANEL + v * LANES;
      store(at, begin ? load<F32>(at) + sum[r][v] : sum[r][v]);
    }
}

template <class T, int ROWS>
INLINE void across(const Near<T>* const* x, const T* w, int64_t width, int64_t begin, int64_t end, float* sums) {
  // One row alone streams the whole panel once; several share what the registers can hold.
  constexpr int MOST = ROWS == 1 ? PANEL / LANES : TILE_VECTORS;
  int64_t at = 0;
  for (; at + MOST * LANES <= width; at += MOST * LANES)
    tile<T, ROWS, MOST>(x, w + at * Step<T>::inputs, width, begin, end, sums + at);
  for (; at < width; at += LANES) tile<T, ROWS, 1>(x, w + at * Step<T>::inputs, width, begin, end, sums + at);
}

template <class T>
void block(const Near<T>* const* x, int rows, const T* w, int64_t width, int64_t begin, int64_t end, float* sums) {
  switch (rows) {
    case 1: return across<T, 1>(x, w, width, begin, end, sums);
    case 2: return across<T, 2>(x, w, width, begin, end, sums);
    case 3: return across<T, 3>(x, w, width, begin, end, sums);
#if defined(__AVX512F__)
    case 4: return across<T, 4>(x, w, width, begin, end, sums);
    case 5: return across<T, 5>(x, w, width, begin, end, sums);
    case 6: return across<T, 6>(x, w, width, begin, end, sums);
#endif
  }
}

template <class T>
void finish(const Linear& a, int64_t group, int64_t row, int64_t panel, int64_t rows, float* sums) {
  const int64_t first = panel * PANEL, count = a.out_features - first < PANEL ? a.out_features - first : PANEL;
  const float* bias = a.bias ? a.bias + group * a.out_features + first : nullptr;
  for (int64_t r = 0; r < rows; r++) {
    float* sum = sums + r * PANEL;
    const int64_t at = group * a.out_group + (row + r) * a.out_row + first;
    if (bias)
      for (int64_t i = 0; i < count; i++) sum[i] += bias[i];
    if (!a.out_bf16) {
      memcpy((float*)a.out + at, sum, count * sizeof(float));
      continue;
    }
    int64_t i = 0;
    uint16_t* out = (uint16_t*)a.out + at;
    for (; i + LANES <= count; i += LANES) store(out + i, narrow(load<F32>(sum + i)));
    for (; i < count; i++) out[i] = float_to_bf16(sum[i]);
  }
}

// Rows [row, row + rows) of one group, at most CHUNK, times one panel.
template <class T>
void chunk(const Linear& a, int64_t group, int64_t row, int64_t rows, int64_t panel) {
  const int64_t depth = depth_of<T>(a.in), width = width_of(panel, a.out_features);
  const T* w = (const T*)a.weight + group * size_of<T>(a.in, a.out_features) + panel * PANEL * depth;
  const T* from = (const T*)a.x + group * a.x_group;
  const T* x[CHUNK];
  for (int64_t r = 0; r < rows; r++) x[r] = from + (a.sources ? a.sources[row + r] : row + r) * a.x_row;
  alignas(64) float sums[CHUNK * PANEL];
  for (int64_t begin = 0; begin < a.in; begin += BLOCK) {
    const int64_t end = begin + BLOCK < a.in ? begin + BLOCK : a.in;
    for (int64_t r = 0; r < rows; r += TILE_ROWS) {
      const int count = (int)(rows - r < TILE_ROWS ? rows - r : TILE_ROWS);
      alignas(64) Near<T> widened[TILE_ROWS][sizeof(Near<T>) == sizeof(T) ? 1 : BLOCK];
      const Near<T>* tiled[TILE_ROWS];
      for (int k = 0; k < count; k++) tiled[k] = near(x[r + k] + begin, end - begin, widened[k]);
      for (int64_t at = begin; at < end; at += RUN) {
        block<T>(tiled, count, w, width, at, end - at < RUN ? end : at + RUN, sums + r * PANEL);
        for (int k = 0; k < count; k++) tiled[k] += RUN;
      }
    }
  }
  finish<T>(a, group, row, panel, rows, sums);
}

#if defined(TILES)
// The same with tiles. Sixteen rows are multiplied at a time, fewer have fewer lines; a line does not depend on the others.
template <>
void chunk<uint16_t>(const Linear& a, int64_t group, int64_t row, int64_t rows, int64_t panel) {
  constexpr int64_t inputs = TILE_BYTES / 2;
  constexpr int X = 4, W = 5;  // tiles; those before are sums
  const int64_t depth = depth_of<uint16_t>(a.in), width = width_of(panel, a.out_features);
  const uint16_t* w = (const uint16_t*)a.weight + group * size_of<uint16_t>(a.in, a.out_features) + panel * PANEL * depth;
  const uint16_t* from = (const uint16_t*)a.x + group * a.x_group;
  const int64_t whole = a.in / inputs * inputs;
  alignas(64) uint16_t last_w[inputs * PANEL] = {};  // what is left of the inputs, filled up with zeros
  memcpy(last_w, w + whole * width, sizeof(uint16_t) * (depth - whole) * width);
  alignas(64) float sums[CHUNK * PANEL];
  int64_t lines = 0;
  for (int64_t begin = 0; begin < a.in; begin += BLOCK) {
    const int64_t end = begin + BLOCK < a.in ? begin + BLOCK : a.in;
    for (int64_t r = 0; r < rows; r += TILE_LINES) {
      const int64_t count = rows - r < TILE_LINES ? rows - r : TILE_LINES;
      if (count != lines) {
        Palette palette;
        for (int i = 0; i < X; i++) palette.set(i, count, TILE_BYTES);
        palette.set(X, count, TILE_BYTES);
        for (int i = W; i < 8; i++) palette.set(i, TILE_LINES, TILE_BYTES);
        use(palette);
        lines = count;
      }
      auto place = [&](int64_t k) { return from + (a.sources ? a.sources[row + r + k] : row + r + k) * a.x_row; };
      const uint16_t* x = place(0) + begin;
      int64_t stride = a.x_row;
      alignas(64) uint16_t gathered[TILE_LINES][BLOCK], last_x[TILE_LINES][inputs];
      if (a.sources) {
        for (int64_t k = 0; k < count; k++) memcpy(gathered[k], place(k) + begin, sizeof(uint16_t) * (end - begin));
        x = gathered[0], stride = BLOCK;
      }
      const int64_t full = (end - begin) / inputs * inputs;
      if (full < end - begin) {
        memset(last_x, 0, sizeof last_x);
        for (int64_t k = 0; k < count; k++) memcpy(last_x[k], x + k * stride + full, sizeof(uint16_t) * (end - begin - full));
      }
      auto across = [&](auto vectors) INLINE_LAMBDA {
        float* at = sums + r * PANEL;
        auto each = [&](auto then) INLINE_LAMBDA {
          then(std::integral_constant<int, 0>());
          if constexpr (vectors > 1) then(std::integral_constant<int, 1>());
          if constexpr (vectors > 2) then(std::integral_constant<int, 2>());
          if constexpr (vectors > 3) then(std::integral_constant<int, 3>());
        };
        auto advance = [&](const uint16_t* rows_of, int64_t distance, const uint16_t* weights) INLINE_LAMBDA {
          load_tile<X>(rows_of, 2 * distance);
          each([&](auto v) INLINE_LAMBDA {
            load_tile<W + v % 3>(weights + v * LANES * 2, 4 * width);
            dot_bf16<v, X, W + v % 3>();
          });
        };
        each([&](auto v) INLINE_LAMBDA {
          if (begin) load_tile<v>(at + v * LANES, 4 * PANEL);
          else clear<v>();
        });
        for (int64_t i = 0; i < full; i += inputs) advance(x + i, stride, w + (begin + i) * width);
        if (full < end - begin) advance(last_x[0], inputs, last_w);
        each([&](auto v) INLINE_LAMBDA { store_tile<v>(at + v * LANES, 4 * PANEL); });
      };
      switch (width / LANES) {
        case 1: across(std::integral_constant<int, 1>()); break;
        case 2: across(std::integral_constant<int, 2>()); break;
        case 3: across(std::integral_constant<int, 3>()); break;
        case 4: across(std::integral_constant<int, 4>()); break;
      }
    }
  }
  release();
  finish<uint16_t>(a, group, row, panel, rows, sums);
}
#endif

template <class T>
void linear(const Linear& a) {
  const int64_t panels = (a.out_features + PANEL - 1) / PANEL;
  const int64_t weights = a.in * a.out_features * a.groups, products = a.rows * a.in * a.out_features * (a.starts ? 1 : a.groups);
#pragma omp parallel for collapse(2) schedule(static) if (weights > ALONE || products > ALONE_PRODUCTS)
  for (int64_t group = 0; group < a.groups; group++)
    for (int64_t panel = 0; panel < panels; panel++) {
      const int64_t last = a.starts ? a.starts[group + 1] : a.rows;
      for (int64_t row = a.starts ? a.starts[group] : 0; row < last; row += CHUNK)
        chunk<T>(a, group, row, last - row < CHUNK ? last - row : CHUNK, panel);
    }
}

// A line of a panel is four bytes per output: one float or one pair, the pair's missing half zero. Sixteen lines are
// gathered at a time: every weight comes from memory in whole cache lines, whatever the distance of its rows.
template <class T>
void pack(const Pack& a) {
  constexpr int64_t step = Step<T>::inputs, inputs = 16 * step;
  const int64_t depth = depth_of<T>(a.in), last = a.first + a.out_features;
  // What fills the packed matrix up to whole vectors is zero.
  const int64_t end = last == a.packed_out ? up(last, LANES) : last;
#pragma omp parallel for schedule(static)
  for (int64_t panel = a.first / PANEL; panel < (end + PANEL - 1) / PANEL; panel++) {
    const int64_t begin = panel * PANEL, width = width_of(panel, a.packed_out);
    const int64_t from = begin > a.first ? begin : a.first, to = begin + width < end ? begin + width : end;
    uint32_t* line = (uint32_t*)((T*)a.packed + begin * depth);
    for (int64_t i = 0; i < a.in; i += inputs) {
      uint32_t words[PANEL][16] = {};
      const int64_t count = a.in - i < inputs ? a.in - i : inputs;
      for (int64_t n = from; n < to && n < last; n++)
        memcpy(words[n - from], (const T*)a.weight + (n - a.first) * a.row_stride + i, count * sizeof(T));
      for (int64_t k = 0; k * step < count; k++, line += width)
        for (int64_t n = from; n < to; n++) line[n - begin] = words[n - from][k];
    }
  }
}

template <class T> INLINE T nan_of();
template <> INLINE float nan_of() { return NAN; }
template <> INLINE uint16_t nan_of() { return 0x7FC0; }

// An index without a row gives NaN, which no step lets pass.
template <class T>
void rows(const Rows& a) {
  constexpr int64_t step = Step<T>::inputs;
#pragma omp parallel for schedule(static) if (a.rows > 16)
  for (int64_t row = 0; row < a.rows; row++) {
    const int64_t n = a.indices[row], panel = n / PANEL, width = width_of(panel, a.out_features);
    const bool there = n >= 0 && n < a.out_features;
    const T* packed = (const T*)a.packed + panel * PANEL * depth_of<T>(a.in) + (n - panel * PANEL) * step;
    T* out = (T*)a.out + row * a.in;
    for (int64_t i = 0; i < a.in; i++) out[i] = there ? packed[i / step * step * width + i % step] : nan_of<T>();
  }
}

}  // namespace
}  // namespace ISA

EXPORT(linear, Linear) {
  if (arguments->bf16) ISA::linear<uint16_t>(*arguments);
  else ISA::linear<float>(*arguments);
}

EXPORT(pack, Pack) {
  if (arguments->bf16) ISA::pack<uint16_t>(*arguments);
  else ISA::pack<float>(*arguments);
}

EXPORT(rows, Rows) {
  if (arguments->bf16) ISA::rows<uint16_t>(*arguments);
  else ISA::rows<float>(*arguments);
}
