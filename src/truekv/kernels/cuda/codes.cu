// Rows of which each has one scale: values of 4 or 3 bits (kv4 and kv3 of formats/lm.py), keys of 4 or 3 bits likewise
// or of 8 (int8). See attend.cu, which reads them by what is defined here.
//
// A page's codes go from memory to registers once, in the order in which tensor cores want their first operand: keys as
// 16 tokens x 32 columns of bytes, values as 16 columns x 16 tokens of halves. DIM is 64 (not for kv3), 128 or 256.
// Numbers count as columns in storage order: of kv4 2 j and 2 j + 1 are the low and the high nibble of byte j, of kv3
// 8 j to 8 j + 7 are the parts of place j.

constexpr int KEY_BYTES = DIM * KEY_BITS / 8, VALUE_BYTES = DIM * VALUE_BITS / 8;
constexpr int KEY_PAGE = PAGE * (KEY_BYTES + 2), VALUE_PAGE = PAGE * (VALUE_BYTES + 2);  // bytes of a kv head
constexpr int KEY_WORDS = KEY_BYTES / 16;
// Values of 4 bits are loaded as their product wants them: of 8 tokens, an eighth of each. Those of 3 bits as keys are.
constexpr int VALUE_TOKENS = VALUE_BITS == 4 ? 8 : 4, VALUE_WORDS = VALUE_BYTES / (VALUE_BITS == 4 ? 32 : 16);
constexpr float KEY_UNIT = 1;                              // of a key in its product
constexpr float VALUE_UNIT = VALUE_BITS == 4 ? 1 : 16777216;
constexpr u32 CONSTANTS = 0xe6006600u;                   // 1536 and -1536
constexpr u32 ABOVE = 0x00800080u, BELOW = 0x80808080u;  // 128 * 2^-24 and -128 * 2^-24, twice

// Three planes of a row of 3-bit codes: two bits of even parts, of odd parts, third bits; a lane's words of each.
template <int WORDS>
__device__ __forceinline__ void load_planes(u32* d, const unsigned char* at, int plane) {
#pragma unroll
  for (int i = 0; i < 3; i++) load<WORDS / 3>(d + i * (WORDS / 3), at + i * plane);
}
template <int BITS, int WORDS>
__device__ __forceinline__ void load_row(u32* d, const unsigned char* at) {
  if constexpr (BITS == 3)
    load_planes<WORDS>(d, at, DIM / 8);
  else
    load<WORDS>(d, at);
}
// The i-th eight codes of a row of them as selectors of bytes: of four places in turn, the parts 0 and 4, 2 and 6, 1
// and 5, or 3 and 7.
template <int WORDS>
__device__ __forceinline__ u32 three_bits(const u32* row, int i) {
  const u32 two = row[(i % 4 < 2 ? 0 : WORDS / 3) + i / 4] >> (i % 2 * 2), third = row[WORDS / 3 * 2 + i / 4];
  const u32 moved = i % 4 == 0 ? third << 2 : i % 4 == 1 ? third : i % 4 == 2 ? third << 1 : third >> 1;
  return (two & 0x33333333u) | (moved & 0x44444444u);
}
// Where its columns begin, of those that a lane of so many numbers has: two places, each with two parts.
__device__ __forceinline__ int three_bit_column(int word, int k) {
  const int i = word / 2, parts = i % 4 == 0 ? 0 : i % 4 == 1 ? 2 : i % 4 == 2 ? 1 : 3;
  return 32 * (i / 4) + 8 * (2 * (word % 2) + k / 2) + parts + k % 2 * 4;
}

// The i-th eight codes of one key as numbers, bytes in the order of their columns. Codes of 8 bits are what they stand
// for; codes of 4 bits are selectors of bytes, see kernels/triton/codebook.py.
__device__ __forceinline__ void decode_key(const u32* row, int i, u32* out) {
  if constexpr (KEY_BITS == 8) {
    out[0] = row[2 * i];
    out[1] = row[2 * i + 1];
    return;
  }
  if constexpr (KEY_BITS == 3) {
    const u32 select = three_bits<KEY_WORDS>(row, i);
    out[0] = permuted(0xf6e1c9a8u, 0x58371f0au, select);
    out[1] = permuted(0xf6e1c9a8u, 0x58371f0au, select >> 16);
    return;
  }
  look_up(row[i], out);
}

// One code of each of two values, in bits 4-7 of both halves, to 1536 + level and -1536 + level, exactly: with
// x = 0.2583 (code - 7.5), x ((x^2 + 0.0261)^2 + 39.19) is less than 0.44 from a level, and the constant leaves an
// integer. Every second token has the other sign, so that what the constants add to a sum stays small; it is known from
// a product of its own, and taken off in the end.
__device__ __forceinline__ u32 decode_value(u32 codes) {
  u32 shifted;  // 1024 + 16 code
  asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(shifted) : "r"(codes), "n"(0x00f000f0), "n"(0x64006400));
  u32 x = fused(shifted, 0x24222422u, 0xcc9ecc9eu);
  u32 square = fused(x, x, 0x26af26afu);
  u32 slope = fused(square, square, 0x50e650e6u);
  return fused(slope, x, CONSTANTS);
}

struct Rows {
  u32 keys[2][2][KEY_WORDS], values[2][VALUE_TOKENS / 2][VALUE_WORDS], key_scales[2], value_scales[2];
  const unsigned char *key_codes, *key_places, *value_codes, *value_places;  // of codes and scales of page 0
  float constants[4];  // what the constants of values add to averages

  // Token of a page in row r + 8 u of scores of tile t.
  static __device__ __forceinline__ int token(int r, int t, int u) { return 4 * r + 2 * t + u; }

  // Numbers of a query row that meet the i-th word of keys.
  static __device__ __forceinline__ void query(u32* four, const float* row, int c, int i) {
    const unsigned char* numbers = (const unsigned char*)(row + 4 * c * (DIM / 16));
    if constexpr (KEY_BITS == 3) {
#pragma unroll
      for (int k = 0; k < 4; k++) load<1>(four + k, numbers + 4 * three_bit_column(i, k));
    } else {
      load<4>(four, numbers + 16 * i);
    }
  }

  __device__ __forceinline__ void place(const unsigned char* key, const unsigned char* value, int, int r, int c) {
    key_codes = key + 4 * r * KEY_BYTES + 4 * c * (KEY_BITS == 3 ? KEY_WORDS / 3 : KEY_WORDS);
    key_places = key + PAGE * KEY_BYTES + 8 * r;
    value_codes = VALUE_BITS == 4 ? value + 8 * c * VALUE_BYTES + 4 * VALUE_WORDS * r
                                  : value + 4 * r * VALUE_BYTES + 4 * c * (VALUE_WORDS / 3);
    value_places = value + PAGE * VALUE_BYTES + 8 * r;
    // Kept in registers, not computed again for each page.
    asm volatile("" : "+l"(key_codes), "+l"(key_places));
    asm volatile("" : "+l"(value_codes), "+l"(value_places));
  }

  __device__ __forceinline__ void begin() {
#pragma unroll
    for (int j = 0; j < 4; j++) constants[j] = 0;
  }

  __device__ __forceinline__ void fetch_keys(bool there, u32 page, u32 page_bytes) {
    if (!there) return;
#pragma unroll
    for (int i = 0; i < 4; i++)
      load_row<KEY_BITS, KEY_WORDS>(keys[i / 2][i % 2], key_codes + (u64)page * page_bytes + i * KEY_BYTES);
    load<2>(key_scales, key_places + (u64)page * page_bytes);
  }

  // Token 8 c + 4 i + 2 t + u of a page: number i of pair u of tile t. Of 3 bits: token 4 r + 2 t + u.
  __device__ __forceinline__ void fetch_values(bool there, u32 page, u32 page_bytes) {
    if (!there) return;
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int i = 0; i < VALUE_TOKENS / 2; i++) {
        const int token = VALUE_BITS == 4 ? 4 * (i % 2) + 2 * t + i / 2 : 2 * t + i;
        load_row<VALUE_BITS, VALUE_WORDS>(values[t][i], value_codes + (u64)page * page_bytes + token * VALUE_BYTES);
      }
    load<2>(value_scales, value_places + (u64)page * page_bytes);
  }

  // What query rows 2 c and 2 c + 1 make of the keys, but for their units.
  __device__ __forceinline__ void scores(float score[2][4], const u32* high, const u32* low) {
#pragma unroll
    for (int t = 0; t < 2; t++) {
      int upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
#pragma unroll
      for (int i = 0; i < DIM / 32; i++) {
        u32 a[2], b[2];
        decode_key(keys[t][0], i, a);
        decode_key(keys[t][1], i, b);
        multiply_high(upper, a[0], b[0], a[1], b[1], high[2 * i], high[2 * i + 1]);
        multiply_low(lower, a[0], b[0], a[1], b[1], low[2 * i], low[2 * i + 1]);
      }
      // Sums of integers, exact.
#pragma unroll
      for (int j = 0; j < 4; j++)
        score[t][j] = (float)(upper[j] * 256 + lower[j]) * wide(j < 2 ? key_scales[t] & 0xffff : key_scales[t] >> 16);
    }
  }

  // The scales of values by rows of scores.
  __device__ __forceinline__ void scales(float scale[2][2], int, int) const {
#pragma unroll
    for (int t = 0; t < 2; t++) {
      scale[t][0] = wide(value_scales[t] & 0xffff);
      scale[t][1] = wide(value_scales[t] >> 16);
    }
  }

  __device__ __forceinline__ void lower(int i, float by) { constants[i] *= by; }

  // Add the values of tile t, weights being the second operand.
  __device__ __forceinline__ void average(float mean[][4], int t, u32 b0, u32 b1) {
    if constexpr (VALUE_BITS == 4) {
      multiply(constants, CONSTANTS, CONSTANTS, CONSTANTS, CONSTANTS, b0, b1);
#pragma unroll
      for (int i = 0; i < 2 * VALUE_WORDS; i++) {
        // Two bytes of each of two values, side by side.
        const u32 chosen = i % 2 ? 0x7632u : 0x5410u;
        const u32 x = permuted(values[t][0][i / 2], values[t][1][i / 2], chosen);
        const u32 y = permuted(values[t][2][i / 2], values[t][3][i / 2], chosen);
        const u32 x0 = decode_value(x << 4), x1 = decode_value(x), y0 = decode_value(y << 4), y1 = decode_value(y);
        multiply(mean[2 * i], x0, x1, y0, y1, b0, b1);
        const u32 x2 = decode_value(x >> 4), x3 = decode_value(x >> 8);
        const u32 y2 = decode_value(y >> 4), y3 = decode_value(y >> 8);
        multiply(mean[2 * i + 1], x2, x3, y2, y3, b0, b1);
      }
    } else {
      // A level is a byte, 128 above it in one token and below it in the next, and a byte is a half b * 2^-24.
      multiply(constants, ABOVE, ABOVE, BELOW, BELOW, b0, b1);
#pragma unroll
      for (int i = 0; i < DIM / 32; i++) {
        const u32 above = three_bits<VALUE_WORDS>(values[t][0], i);
        const u32 below = three_bits<VALUE_WORDS>(values[t][1], i);
#pragma unroll
        for (int k = 0; k < 2; k++) {
          const u32 x = transposed(permuted(0x76614928u, 0xd8b79f8au, k ? above >> 16 : above));
          const u32 y = transposed(permuted(0x8a9fb7d8u, 0x28496176u, k ? below >> 16 : below));
          multiply(mean[2 * i + k], permuted(x, 0, 0x4240u), permuted(x, 0, 0x4341u),
                   permuted(y, 0x80808080u, 0x4240u), permuted(y, 0x80808080u, 0x4341u), b0, b1);
        }
      }
    }
  }

  // Write the averages of one query row, each times `by`, in the order of columns.
  __device__ __forceinline__ void leave(float* out, const float mean[][4], int i, int r, float by) const {
    by *= VALUE_UNIT;
    const float less = -constants[i] * by;
    if constexpr (VALUE_BITS == 4) {
#pragma unroll
      for (int m = 0; m < DIM / 16; m += 2)
        *(float4*)(out + r * (DIM / 8) + 2 * m) =
            make_float4(fmaf(mean[m][i], by, less), fmaf(mean[m][i + 2], by, less), fmaf(mean[m + 1][i], by, less),
                        fmaf(mean[m + 1][i + 2], by, less));
    } else {
      // Parts 0 and 4 of a place are two rows of one tile, then 2 and 6, 1 and 5, 3 and 7.
#pragma unroll
      for (int j = 0; j < DIM / 64; j++) {
        const int m = j / 2 * 8 + j % 2, place = VALUE_WORDS / 3 * 4 * (r / 2) + j / 2 * 4 + j % 2 * 2 + r % 2;
#pragma unroll
        for (int half = 0; half < 2; half++)
          *(float4*)(out + 8 * place + 4 * half) =
              make_float4(fmaf(mean[m][i + 2 * half], by, less), fmaf(mean[m + 4][i + 2 * half], by, less),
                          fmaf(mean[m + 2][i + 2 * half], by, less), fmaf(mean[m + 6][i + 2 * half], by, less));
      }
    }
  }

  // Where a warp leaves its averages.
  static __device__ __forceinline__ float* left(int warp) {
    __shared__ __align__(16) float means[WARPS][8 * (DIM + 4)];
    return means[warp];
  }
};
