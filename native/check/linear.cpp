// Linear maps, one and one per expert, against sums in double; a row among others against the row alone, bit by bit.
#include "../linear.cpp"

#include "check.h"

inline float value(float x) { return x; }
inline float value(uint16_t x) { return ISA::bf16_to_float(x); }
inline void put(float x, float& to) { to = x; }
inline void put(float x, uint16_t& to) { to = ISA::float_to_bf16(x); }

template <class T>
std::vector<T> numbers(int64_t n) {
  std::vector<T> x((size_t)n);
  for (T& v : x) put(random_number(), v);
  return x;
}

// GROUPS weights [outs, in]; group g has the rows from starts[g] on, each from its place in x.
template <class T>
bool check(const char* name, int64_t rows, int64_t in, int64_t outs) {
  constexpr int64_t GROUPS = 2;
  constexpr int32_t bf16 = sizeof(T) == 2;
  const std::vector<T> x = numbers<T>(rows * in), weight = numbers<T>(GROUPS * outs * in);
  const Floats bias = random_floats(GROUPS * outs);
  const int64_t size = ISA::size_of<T>(in, outs), starts[] = {0, rows / 3, rows};
  // An aligned address, as torch's are.
  std::vector<T> held((size_t)(GROUPS * size + 64));
  T* packed = (T*)(((uintptr_t)held.data() + 63) & ~(uintptr_t)63);
  for (int64_t g = 0; g < GROUPS; g++)
    for (int64_t first = 0; first < outs; first += 40) {  // in parts, which are no multiple of a vector
      const Pack part{&weight[(size_t)((g * outs + first) * in)], packed + g * size, in, outs - first < 40 ? outs - first : 40, in,
                      first, outs, bf16};
      JOIN(truekv_, pack, _, ISA)(&part);
    }
  std::vector<int64_t> sources;
  for (int64_t r = 0; r < rows; r++) sources.push_back(rows - 1 - r);
  Floats out((size_t)(rows * outs)), alone((size_t)outs);
  const Linear whole{x.data(), packed, bias.data(), out.data(), starts, sources.data(), rows, in, outs, GROUPS, in, 0, outs, 0, bf16, 0};
  JOIN(truekv_, linear, _, ISA)(&whole);

  bool same = true;
  std::vector<double> expected;
  for (int64_t r = 0; r < rows; r++) {
    const int64_t g = r >= starts[1];
    const T* from = &x[(size_t)(sources[(size_t)r] * in)];
    for (int64_t n = 0; n < outs; n++) {
      double sum = bias[(size_t)(g * outs + n)];
      for (int64_t i = 0; i < in; i++) sum += (double)value(from[i]) * value(weight[(size_t)((g * outs + n) * in + i)]);
      expected.push_back(sum);
    }
    const Linear one{from, packed + g * size, &bias[(size_t)(g * outs)], alone.data(), nullptr, nullptr, 1, in, outs, 1, in, 0, outs, 0, bf16, 0};
    JOIN(truekv_, linear, _, ISA)(&one);
    same = same && !memcmp(alone.data(), &out[(size_t)(r * outs)], sizeof(float) * (size_t)outs);
  }
  if (!same) printf("a row among others differs from the row alone: WRONG\n");

  const int64_t indices[] = {outs - 1, 0, outs / 2};
  std::vector<T> read((size_t)(3 * in));
  const Rows taken{packed, indices, read.data(), 3, in, outs, bf16};
  JOIN(truekv_, rows, _, ISA)(&taken);
  bool kept = true;
  for (int64_t r = 0; r < 3; r++) kept = kept && !memcmp(&read[(size_t)(r * in)], &weight[(size_t)(indices[r] * in)], sizeof(T) * (size_t)in);
  if (!kept) printf("rows of the weight come back changed: WRONG\n");
  printf("%3lld rows of %4lld to %3lld ", (long long)rows, (long long)in, (long long)outs);
  return close(name, out, expected) && same && kept;
}

int main() {
  bool good = true;
  for (const int64_t rows : {1, 5, 40})
    for (const int64_t in : {96, 1155}) {
      good &= check<float>("float32", rows, in, 77);
      good &= check<uint16_t>("bfloat16", rows, in, 128);
    }
  good &= check<uint16_t>("bfloat16", 200, 64, 16);  // more rows than rest in the scratch
  return !good;
}
