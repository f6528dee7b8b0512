// A step's tokens as every recurrent rule sees them, and the causal convolution over their channels.
//
// A row's timeline is the accepted drafts of its last step, read from the log, and then its new tokens. The first `kept`
// places are folded into the state; the others are drafts, which only go to the log. Before place 0 lies the tail: the
// last taps - 1 inputs that were folded. Rule and convolution read a place through `at`, so nothing is laid out in memory.
#pragma once

#include <cstdlib>

#include "simd.h"

struct Timeline {
  const int64_t *gather, *count, *certain, *replay, *slot;  // [rows, longest] token of each place, and [rows]
  const void* inputs;                                       // [tokens, channels], stride numbers apart
  const void* weights;                                      // [channels, taps]
  const void* bias;                                         // [channels] or null
  void* tail;                                               // [slots, channels, taps - 1]
  void* log;                                                // [slots, drafts, channels]
  int64_t rows, longest, tokens, stride, channels, taps, drafts;
  int32_t bf16;  // all five are bfloat16, else float32
};

namespace ISA {
namespace {

constexpr int MAX_TAPS = 8;
constexpr int64_t RUN = 32;  // places that go through a head's state before the next head's turn

INLINE int64_t padded(int64_t n) { return (n + LANES - 1) / LANES * LANES; }

INLINE float number(float x) { return x; }
INLINE float number(uint16_t x) { return bf16_to_float(x); }
INLINE F32 sixteen(const float* from) { return load<F32>(from); }
INLINE F32 sixteen(const uint16_t* from) { return load_bf16(from); }

// Up to 16 numbers, the lanes beyond them zero.
template <class T>
INLINE F32 numbers(const T* from, int64_t count) {
  if (count >= LANES) return sixteen(from);
  alignas(64) float lanes[LANES] = {};
  for (int64_t i = 0; i < count; i++) lanes[i] = number(from[i]);
  return load<F32>(lanes);
}

INLINE void put(float* to, F32 v, int64_t count) {
  if (count >= LANES) return store(to, v);
  for (int64_t i = 0; i < count; i++) to[i] = v[i];
}

// One thread's aligned floats for as long as a call lasts.
struct Scratch {
  float* next;
  void* block;
  explicit Scratch(int64_t floats) : block(aligned_alloc(64, (size_t)padded(floats) * sizeof(float))) {
    next = (float*)block;
  }
  ~Scratch() { free(block); }
  Scratch(const Scratch&) = delete;
  float* take(int64_t floats) {
    float* taken = next;
    next += padded(floats);
    return taken;
  }
};

template <class T>
struct Row {
  const Timeline& step;
  const int64_t slot, replay, kept, places;
  const int64_t* token;

  Row(const Timeline& step, int64_t row)
      : step(step), slot(step.slot[row]), replay(step.replay[row]), kept(replay + step.certain[row]),
        places(replay + step.count[row]), token(step.gather + row * step.longest) {}

  int64_t channels() const { return step.channels; }
  T* tail() const { return (T*)step.tail + slot * step.channels * (step.taps - 1); }
  T* log(int64_t entry) const { return (T*)step.log + (slot * step.drafts + entry) * step.channels; }

  // The channels of a place's token.
  const T* at(int64_t place) const {
    if (place < replay) return log(place);
    return (const T*)step.inputs + token[place - replay] * step.stride;
  }

  // What a head's token brings beside its channels: one of inputs [tokens, heads] or log [slots, drafts, heads].
  float at(int64_t place, const float* inputs, const float* log, int64_t heads, int64_t head) const {
    if (place < replay) return log[(slot * step.drafts + place) * heads + head];
    return inputs[token[place - replay] * heads + head];
  }

  // The end of the run that begins at a place: places are folded RUN by RUN, drafts follow in one go.
  int64_t run(int64_t place) const {
    if (place >= kept) return places;
    return place + RUN < kept ? place + RUN : kept;
  }
};

// Tokens after those of the last row belong to nobody: their output, `width` numbers each, is zero.
INLINE void clear_padding(const Timeline& step, int64_t width, float* out) {
  int64_t owned = 0;
  for (int64_t row = 0; row < step.rows; row++) owned += step.count[row];
  if (owned < step.tokens) memset(out + owned * width, 0, (size_t)((step.tokens - owned) * width) * sizeof(float));
}

// [16 channels, n] as n vectors of 16 channels.
template <class T>
INLINE void columns(const T* from, int64_t n, int64_t count, F32* to) {
  for (int64_t j = 0; j < n; j++) {
    alignas(64) float lanes[LANES] = {};
    for (int64_t i = 0; i < count; i++) lanes[i] = number(from[i * n + j]);
    to[j] = load<F32>(lanes);
  }
}

// The taps of nearly every model: four bfloat16 numbers a channel, which are one lane of 64 bits.
#if defined(__AVX512F__)
INLINE void columns_of_four(const uint16_t* from, F32* to) {
  typedef uint64_t U64 __attribute__((vector_size(128), may_alias));
  const U64 fours = load<U64>(from);
  for (int j = 0; j < 4; j++) to[j] = (F32)(__builtin_convertvector(fours >> (16 * j), U32) << 16);
}
#else
INLINE void columns_of_four(const uint16_t* from, F32* to) { columns(from, 4, LANES, to); }
#endif
INLINE void columns_of_four(const float* from, F32* to) { columns(from, 4, LANES, to); }

INLINE F32 silu(F32 x) { return x / (all(1.0f) + exp(min(zero() - x, all(88.0f)))); }

// 16 channels go down the run together: their taps and the window of their last inputs stay in registers.
template <int TAPS, class T>
INLINE void convolve_lanes(const Row<T>& row, int64_t channel, int64_t count, int64_t first, int64_t last, float* out,
                           int64_t stride) {
  const int64_t taps = TAPS ? TAPS : row.step.taps;
  F32 weight[TAPS ? TAPS : MAX_TAPS], window[TAPS ? TAPS : MAX_TAPS];
  const T* from = (const T*)row.step.weights + channel * taps;
  if (TAPS == 4 && count == LANES) columns_of_four(from, weight);
  else columns(from, taps, count, weight);
  const F32 bias = row.step.bias ? numbers((const T*)row.step.bias + channel, count) : zero();
  if (first < taps - 1) columns(row.tail() + channel * (taps - 1), taps - 1, count, window);
  // The tail's last `first` columns are shifted out by places that are there already.
  for (int64_t j = 0; j < taps - 1; j++) {
    const int64_t place = first - (taps - 1) + j;
    window[j] = place < 0 ? window[j + first] : numbers(row.at(place) + channel, count);
  }
  for (int64_t place = first; place < last; place++, out += stride) {
    window[taps - 1] = numbers(row.at(place) + channel, count);
    F32 mixed = window[0] * weight[0];
    for (int64_t j = 1; j < taps; j++) mixed = fma(window[j], weight[j], mixed);
    store(out, silu(mixed + bias));
    for (int64_t j = 0; j + 1 < taps; j++) window[j] = window[j + 1];
  }
}

// Convolution and silu of `count` channels over the places of a run: out [places, stride], the padding zero.
template <class T>
void convolve(const Row<T>& row, int64_t channel, int64_t count, int64_t first, int64_t last, float* out) {
  const int64_t stride = padded(count);
  for (int64_t c = 0; c < count; c += LANES) {
    const int64_t lanes = count - c < LANES ? count - c : LANES;
    if (row.step.taps == 4) convolve_lanes<4>(row, channel + c, lanes, first, last, out + c, stride);
    else convolve_lanes<0>(row, channel + c, lanes, first, last, out + c, stride);
  }
}

// Afterwards: the tail moves on to the last folded inputs, and the drafts' inputs replace the log.
template <class T>
void remember(const Row<T>& row, int64_t channel, int64_t count) {
  const int64_t width = row.step.taps - 1;
  T* tail = row.tail() + channel * width;
  for (int64_t j = row.kept ? 0 : width; j < width; j++) {
    const int64_t place = row.kept - width + j;
    if (place < 0) {
      for (int64_t c = 0; c < count; c++) tail[c * width + j] = tail[c * width + j + row.kept];
    } else {
      const T* from = row.at(place) + channel;
      for (int64_t c = 0; c < count; c++) tail[c * width + j] = from[c];
    }
  }
  for (int64_t place = row.kept; place < row.places; place++)
    memcpy(row.log(place - row.kept) + channel, row.at(place) + channel, (size_t)count * sizeof(T));
}

// The same for what a head's token brings beside its channels.
template <class T>
void remember(const Row<T>& row, const float* inputs, float* log, int64_t heads, int64_t head) {
  for (int64_t place = row.kept; place < row.places; place++)
    log[(row.slot * row.step.drafts + place - row.kept) * heads + head] = row.at(place, inputs, log, heads, head);
}

}  // namespace
}  // namespace ISA
