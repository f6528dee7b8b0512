// Operations on single rows: norms, gates, rotary positions.
#include "export.h"
#include "simd.h"

struct RmsNorm {
  const void* x;      // [rows, dim]
  const float* gain;  // [dim]
  void* out;          // [rows, dim]
  int64_t rows, dim, row_stride;  // row_stride of x, in numbers
  float epsilon;
  int32_t bf16;  // x and out are bfloat16, else float32
};

namespace ISA {
namespace {

template <class T> INLINE F32 read(const T* x);
template <> INLINE F32 read(const float* x) { return load<F32>(x); }
template <> INLINE F32 read(const uint16_t* x) { return load_bf16(x); }
INLINE void write(float* to, F32 v) { store(to, v); }
INLINE void write(uint16_t* to, F32 v) { store(to, narrow(v)); }
INLINE float one(float x) { return x; }
INLINE float one(uint16_t x) { return bf16_to_float(x); }
INLINE void put(float* to, float v) { *to = v; }
INLINE void put(uint16_t* to, float v) { *to = float_to_bf16(v); }

template <class T>
void rms_norm(const RmsNorm& a) {
#pragma omp parallel for if (a.rows > 8)
  for (int64_t row = 0; row < a.rows; row++) {
    const T* x = (const T*)a.x + row * a.row_stride;
    T* out = (T*)a.out + row * a.dim;
    F32 squares = zero();
    int64_t i = 0;
    for (; i + LANES <= a.dim; i += LANES) { F32 v = read(x + i); squares = fma(v, v, squares); }
    float total = sum(squares);
    for (int64_t j = i; j < a.dim; j++) total = fma(one(x[j]), one(x[j]), total);
    float factor = 1.0f / sqrtf(total / (float)a.dim + a.epsilon);
    for (i = 0; i + LANES <= a.dim; i += LANES) write(out + i, read(x + i) * factor * load<F32>(a.gain + i));
    for (; i < a.dim; i++) put(out + i, one(x[i]) * factor * a.gain[i]);
  }
}

}  // namespace
}  // namespace ISA

EXPORT(rms_norm, RmsNorm) {
  if (arguments->bf16) ISA::rms_norm<uint16_t>(*arguments);
  else ISA::rms_norm<float>(*arguments);
}
