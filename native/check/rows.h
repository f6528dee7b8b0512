// Stored rows, and what they hold in double, for the checks of storing and of attention.
#pragma once

#include "../encode.cpp"
#include "check.h"

struct Coded {
  const char* name;
  int code;
  double error;  // that stored numbers keep below, as a fraction of their root mean square
};
constexpr Coded FORMATS[] = {
    {"f32", ISA::PLAIN32, 1e-6},  {"bf16", ISA::PLAIN16, 2e-3},       {"fp8_e4m3", ISA::E4M3, 0.03}, {"fp8_e5m2", ISA::E5M2, 0.06},
    {"fp8 rows", ISA::ROW_E4M3, 0.03}, {"int8", ISA::INT8, 7e-3},     {"kv4", ISA::LM4, 0.1},        {"kv3", ISA::LM3, 0.2},
    {"q8_0", ISA::Q8_0, 6e-3},    {"q5_1", ISA::Q5_1, 0.045},         {"q5_0", ISA::Q5_0, 0.05},     {"q4_1", ISA::Q4_1, 0.09},
    {"q4_0", ISA::Q4_0, 0.1},     {"iq4_nl", ISA::IQ4_NL, 0.1},
};

inline double small_float(unsigned bits, int exponent_bits, int mantissa_bits) {
  const int bias = (1 << (exponent_bits - 1)) - 1, mantissa = bits & ((1 << mantissa_bits) - 1);
  const int exponent = bits >> mantissa_bits & ((1 << exponent_bits) - 1);
  const double size = std::ldexp(mantissa + (exponent ? 1 << mantissa_bits : 0), (exponent ? exponent : 1) - bias - mantissa_bits);
  return bits >> (exponent_bits + mantissa_bits) & 1 ? -size : size;
}

inline double half(const uint8_t* at) { return small_float(at[0] | at[1] << 8, 5, 10); }

// Number i of a row of `dim` in a code, whose scale, if it has one, lies at `scale`.
inline double number(int code, const uint8_t* row, const uint8_t* scale, int dim, int i) {
  switch (code) {
    case ISA::PLAIN32: return ISA::load<float>(row + 4 * i);
    case ISA::PLAIN16: return ISA::bf16_to_float(ISA::load<uint16_t>(row + 2 * i));
    case ISA::E4M3: return small_float(row[i], 4, 3);
    case ISA::E5M2: return small_float(row[i], 5, 2);
    case ISA::ROW_E4M3: return small_float(row[i], 4, 3) * half(scale);
    case ISA::INT8: return (int8_t)row[i] * half(scale);
    case ISA::LM4: return ISA::LEVELS4[row[i % (dim / 2)] >> i / (dim / 2) * 4 & 15] * half(scale);
    case ISA::LM3: {
      const int low = row[i % (dim / 4)] >> i / (dim / 4) * 2 & 3, high = row[dim / 4 + i % (dim / 8)] >> i / (dim / 8) & 1;
      return ISA::LEVELS3[low | high << 2] * half(scale);
    }
  }
  const bool five = code == ISA::Q5_0 || code == ISA::Q5_1, low = code == ISA::Q4_1 || code == ISA::Q5_1;
  const uint8_t* block = row + i / 32 * (code == ISA::Q8_0 ? 34 : 2 + 2 * low + 4 * five + 16);
  if (code == ISA::Q8_0) return half(block) * (int8_t)block[2 + i % 32];
  const uint8_t *fifths = block + 2 + 2 * low, *fours = fifths + 4 * five;
  const int n = (fours[i % 16] >> i % 32 / 16 * 4 & 15) | (five ? fifths[i % 32 / 8] >> i % 8 & 1 : 0) << 4;
  if (code == ISA::IQ4_NL) return half(block) * ISA::LEVELS_NL[n];
  return low ? half(block) * n + half(block + 2) : half(block) * (n - (five ? 16 : 8));
}

// A field of HEADS heads on PAGES pages of 32 lines, which hold NaN where nothing was stored.
struct Field {
  static constexpr int HEADS = 2, PAGES = 64, LINES = 32;
  int code, dim, order, row_bytes;
  Floats centre, scale;
  std::vector<double> signs, paley;
  std::vector<uint8_t> data;

  // A field with a frame is rotated in `order` blocks and has centres and scales.
  Field(int code, int dim, int order)
      : code(code), dim(dim), order(order), row_bytes(ISA::Shape(code, dim).bytes), centre(order ? random_floats(HEADS * dim) : Floats()),
        scale(order ? random_floats(HEADS * dim) : Floats()), data((size_t)(PAGES * page_bytes()), 0xFF) {
    for (float& x : scale) x = 2 + x;
    for (int i = 0; order && i < dim; i++) signs.push_back(random_number() < 0 ? -1 : 1);
    for (int i = 0; order > 1 && i < order * order; i++) paley.push_back(random_number() < 0 ? -1 : 1);
  }

  int64_t head_bytes() const { return (int64_t)LINES * (row_bytes + 2); }
  int64_t page_bytes() const { return HEADS * head_bytes(); }

  Stored stored() {
    return {data.data(), page_bytes(), head_bytes(), order ? centre.data() : nullptr, order ? scale.data() : nullptr,
            order ? signs.data() : nullptr, order > 1 ? paley.data() : nullptr, order, code, dim, HEADS, LINES, 0};
  }

  // Stores [tokens, HEADS, dim] on lines of pages.
  void put(const Floats& rows, const std::vector<int64_t>& page, const std::vector<int64_t>& line) {
    int64_t broken = -1;
    const Store arguments{stored(), rows.data(), (int64_t)page.size(), HEADS * dim, dim, page.data(), line.data(), &broken, 0, 0};
    JOIN(truekv_, store, _, ISA)(&arguments);
    if (broken) printf("%lld rows are said to be broken\n", (long long)broken);
  }

  std::vector<double> row(int64_t page, int64_t line, int head) const {
    const uint8_t* codes = data.data() + page * page_bytes() + head * head_bytes();
    std::vector<double> x;
    for (int i = 0; i < dim; i++)
      x.push_back(number(code, codes + line * row_bytes, codes + LINES * row_bytes + 2 * line, dim, i));
    return x;
  }

  // The rotation, or its transpose.
  std::vector<double> rotated(const std::vector<double>& x, bool transposed) const {
    if (!order) return x;
    const int width = dim / order;
    std::vector<double> y((size_t)dim);
    for (int i = 0; i < dim; i++)
      for (int j = 0; j < dim; j++) {
        const double sign = __builtin_parity(i % width & j % width) ? -1 : 1;
        const double block = order > 1 ? paley[(size_t)(i / width * order + j / width)] : 1;
        const double entry = sign * block * signs[(size_t)j] / std::sqrt(dim);
        y[(size_t)(transposed ? j : i)] += entry * x[(size_t)(transposed ? i : j)];
      }
    return y;
  }

  std::vector<double> framed(std::vector<double> x, int head) const {
    for (int i = 0; order && i < dim; i++) x[(size_t)i] = (x[(size_t)i] - centre[(size_t)(head * dim + i)]) / scale[(size_t)(head * dim + i)];
    return rotated(x, false);
  }

  std::vector<double> framed_query(std::vector<double> x, int head) const {
    for (int i = 0; order && i < dim; i++) x[(size_t)i] *= scale[(size_t)(head * dim + i)];
    return rotated(x, false);
  }

  std::vector<double> unframed(const std::vector<double>& x, int head) const {
    std::vector<double> y = rotated(x, true);
    for (int i = 0; order && i < dim; i++) y[(size_t)i] = y[(size_t)i] * scale[(size_t)(head * dim + i)] + centre[(size_t)(head * dim + i)];
    return y;
  }
};
