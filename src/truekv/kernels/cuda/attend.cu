// Attention of up to eight query rows over spans of one kv head's rows: values of 4 or 3 bits (kv4 and kv3 of
// formats/lm.py), keys of 4 or 3 bits likewise or of 8 (int8).
//
// Four warps take the pages of a span in turn. A page's codes go from memory to registers once, in the order in which
// tensor cores want their first operand: keys as 16 tokens x 32 columns of bytes, values as 16 columns x 16 tokens of
// halves. Query rows are the eight columns of both products, so a code is decoded once for all of them, and no number
// passes through shared memory before the warps merge. Compiled for compute capability 9.0 with DIM of 64 (not for
// kv3), 128 or 256, KEY_BITS, VALUE_BITS, and PAGE and SPAN, the tokens of a page and of a span.
//
// Lane = 4 r + c. Token 4 r + 2 t + u of a page is row r + 8 u of scores of tile t, whose columns are query rows 2 c
// and 2 c + 1. Numbers count as columns in storage order: of kv4 2 j and 2 j + 1 are the low and the high nibble of
// byte j, of kv3 8 j to 8 j + 7 are the parts of place j. What the text begins with is lanes.cu.

constexpr int KEY_BYTES = DIM * KEY_BITS / 8, VALUE_BYTES = DIM * VALUE_BITS / 8;
constexpr int KEY_WORDS = KEY_BYTES / 16, QUERY_WORDS = DIM / 16, TILES = DIM / 16;
// Values of 4 bits are loaded as their product wants them: of 8 tokens, an eighth of each. Those of 3 bits as keys are.
constexpr int VALUE_TOKENS = VALUE_BITS == 4 ? 8 : 4, VALUE_WORDS = VALUE_BYTES / (VALUE_BITS == 4 ? 32 : 16);
constexpr float UNIT = VALUE_BITS == 4 ? 1 : 16777216;  // of a value in its product
constexpr u32 CONSTANTS = 0xe6006600u;                   // 1536 and -1536
constexpr u32 ABOVE = 0x00800080u, BELOW = 0x80808080u;  // 128 * 2^-24 and -128 * 2^-24, twice

__device__ __forceinline__ u32 fused(u32 a, u32 b, u32 c) {
  u32 d;
  asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
  return d;
}
// Bytes times bytes: those of queries are signed or not.
#define MULTIPLY_BYTES(name, type)                                                                              \
  __device__ __forceinline__ void name(int* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {                 \
    asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8." type ".s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "    \
                 "{%8, %9}, {%0, %1, %2, %3};"                                                                  \
                 : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])                                               \
                 : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));                                       \
  }
MULTIPLY_BYTES(multiply_high, "s8")
MULTIPLY_BYTES(multiply_low, "u8")
template <int WORDS>
__device__ __forceinline__ void load(u32* d, const unsigned char* at) {
  if constexpr (WORDS == 1) {
    asm volatile("ld.global.nc.u32 %0, [%1];" : "=r"(d[0]) : "l"(at));
  } else if constexpr (WORDS == 2) {
    asm volatile("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(d[0]), "=r"(d[1]) : "l"(at));
  } else {
#pragma unroll
    for (int i = 0; i < WORDS; i += 4)
      asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
                   : "=r"(d[i]), "=r"(d[i + 1]), "=r"(d[i + 2]), "=r"(d[i + 3])
                   : "l"(at + 4 * i));
  }
}

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
// The i-th eight codes of a row of them as selectors of bytes: of four places in turn, the parts 0 and 4, 2 and 6, 1 and
// 5, or 3 and 7.
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
  const u32 codes = row[i];
  u32 select = codes & 0x77777777u, half = ((codes >> 1) & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const u32 low = permuted(0xd0c2b198u, 0xfbf1e7dcu, select), high = permuted(0x24190f05u, 0x684f3e30u, select);
    out[j] = permuted(low, high, half);
    select >>= 16;
    half >>= 16;
  }
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
};

// Where a lane reads in page 0.
struct Places {
  const unsigned char *codes, *scales;
};

// Token 4 r + 2 t + u of a page: row u of tile t.
__device__ __forceinline__ void load_keys(Rows& rows, Places at, u32 page, u32 page_bytes) {
#pragma unroll
  for (int i = 0; i < 4; i++)
    load_row<KEY_BITS, KEY_WORDS>(rows.keys[i / 2][i % 2], at.codes + (u64)page * page_bytes + i * KEY_BYTES);
  load<2>(rows.key_scales, at.scales + (u64)page * page_bytes);
}

// Token 8 c + 4 i + 2 t + u of a page: number i of pair u of tile t. Of 3 bits: token 4 r + 2 t + u.
__device__ __forceinline__ void load_values(Rows& rows, Places at, u32 page, u32 page_bytes) {
#pragma unroll
  for (int t = 0; t < 2; t++)
#pragma unroll
    for (int i = 0; i < VALUE_TOKENS / 2; i++) {
      const int token = VALUE_BITS == 4 ? 4 * (i % 2) + 2 * t + i / 2 : 2 * t + i;
      load_row<VALUE_BITS, VALUE_WORDS>(rows.values[t][i], at.codes + (u64)page * page_bytes + token * VALUE_BYTES);
    }
  load<2>(rows.value_scales, at.scales + (u64)page * page_bytes);
}

// Arguments as of attend_kernel in kernels/triton/attention.py, queries in float32. Grid: (kv heads, batch rows,
// spans / each): a block takes `each` spans, one after the other, and joins their sums as join_kernel does.
extern "C" __global__ void __launch_bounds__(32 * WARPS, DIM <= 128 ? 3 : 2)
    attend(const unsigned char* __restrict__ keys, const unsigned char* __restrict__ values,
           const float* __restrict__ query, const float* __restrict__ factor, const i64* __restrict__ gather,
           const i64* __restrict__ position, const i64* __restrict__ count, const i64* __restrict__ pages,
           float* __restrict__ average, float* __restrict__ largest, float* __restrict__ total, u32 key_page_bytes,
           u32 value_page_bytes, i64 tokens, int longest, int width, int window, int group, int each) {
  __shared__ float tops[WARPS][8], sums[WARPS][8];
  __shared__ __align__(16) float means[WARPS][8][DIM + 4];
  // Of the spans before.
  __shared__ float joined_top[8], joined_sum[8];
  __shared__ __align__(16) float joined[8][DIM + 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int head = blockIdx.x, row = blockIdx.y;
  const int start = (int)position[row], added = (int)count[row];
  if (added == 0 || (int)blockIdx.z * each * SPAN >= start + added) return;

  keys += (i64)head * PAGE * (KEY_BYTES + 2);
  values += (i64)head * PAGE * (VALUE_BYTES + 2);
  Places key_places = {keys + 4 * r * KEY_BYTES + 4 * c * (KEY_BITS == 3 ? KEY_WORDS / 3 : KEY_WORDS),
                       keys + PAGE * KEY_BYTES + 8 * r};
  Places value_places = {VALUE_BITS == 4 ? values + 8 * c * VALUE_BYTES + 4 * VALUE_WORDS * r
                                         : values + 4 * r * VALUE_BYTES + 4 * c * (VALUE_WORDS / 3),
                         values + PAGE * VALUE_BYTES + 8 * r};
  // Kept in registers, not computed again for each page.
  asm volatile("" : "+l"(key_places.codes), "+l"(key_places.scales));
  asm volatile("" : "+l"(value_places.codes), "+l"(value_places.scales));
  // Pages are fewer than 2^31: half of each entry will do.
  const u32* table = (const u32*)(pages + (i64)row * width);
  // Query row n: head n % group of the kv head's, of token n / group; right for n and groups of up to 8. Rows beyond
  // those of the last token are its rows again, and are not written.
  const int reciprocal = 256 / group + 1, heads = gridDim.x;
  auto token_of = [&](int n) { return n * reciprocal >> 8; };
  auto place = [&](int n) {
    const int token = token_of(n);
    return (gather[(i64)row * longest + smaller(token, added - 1)] * heads + head) * group + n - token * group;
  };
  // Numbers of a query are no larger than 1: integers of 16 bits, whose upper and lower bytes meet keys one by one.
  u32 high[QUERY_WORDS], low_bytes[QUERY_WORDS];
  const unsigned char* numbers = (const unsigned char*)(query + place(r) * DIM + 4 * c * QUERY_WORDS);
#pragma unroll
  for (int i = 0; i < QUERY_WORDS; i++) {
    u32 four[4];
    if constexpr (KEY_BITS == 3) {
#pragma unroll
      for (int k = 0; k < 4; k++) load<1>(four + k, numbers + 4 * three_bit_column(i, k));
    } else {
      load<4>(four, numbers + 16 * i);
    }
#pragma unroll
    for (int j = 0; j < 4; j++) four[j] = __float_as_uint(fmaf(__uint_as_float(four[j]), UNITS, 12582912.0f));
    const u32 a = permuted(four[0], four[1], 0x5140u), b = permuted(four[2], four[3], 0x5140u);
    low_bytes[i] = permuted(a, b, 0x5410u);
    high[i] = permuted(a, b, 0x7632u);
  }
  float by[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    by[i] = factor[place(2 * c + i)] * (1 / UNITS);
    // Not 0, because minus infinity times it is to be minus infinity; and what is no number stays none.
    if (by[i] < 1e-37f) by[i] = 1e-37f;
  }
  // Whatever a thread has here, it alone writes.
#pragma unroll
  for (int k = 0; k < DIM / 64; k++) {
    const int at = threadIdx.x + 32 * WARPS * k;
    *(float4*)(joined[at / (DIM / 4)] + at % (DIM / 4) * 4) = make_float4(0, 0, 0, 0);
  }
  if (threadIdx.x < 8) {
    joined_top[threadIdx.x] = LOWEST;
    joined_sum[threadIdx.x] = 0;
  }
  const int seen_by_all = (start + 1) / PAGE, hidden = window > 0 ? (start + added - window + PAGE - 1) / PAGE : 0;

  for (int span = blockIdx.z * each; span < ((int)blockIdx.z + 1) * each; span++) {
    int low = span * SPAN;
    const int end = smaller(low + SPAN, start + added);
    if (low >= end) break;
    if (window > 0 && start - window >= low) low = (start - window + 1) / PAGE * PAGE;
    if (low >= end) continue;
    int last[2], first[2];
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int seen = start + token_of(2 * c + i);
      last[i] = smaller(seen, end - 1);
      first[i] = window > 0 ? seen - window + 1 : 0;
    }
    float mean[TILES][4], constants[4] = {0, 0, 0, 0}, top[2] = {LOWEST, LOWEST}, added_up[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) mean[i][j] = 0;
    // Pages are counted from the start of the sequence, so which warp takes one depends on nothing else.
    int page = low / PAGE;
    page += (warp - page) & (WARPS - 1);
    const int stop = (end + PAGE - 1) / PAGE;
    Rows rows;
    if (page < stop) {
      const u32 at = table[2 * page];
      load_keys(rows, key_places, at, key_page_bytes);
      load_values(rows, value_places, at, value_page_bytes);
    }
    for (; page < stop; page += WARPS) {
      const int next = page + WARPS;
      u32 at = 0;
      if (next < stop) at = table[2 * next];
      float score[2][4];
#pragma unroll
      for (int t = 0; t < 2; t++) {
        int upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < QUERY_WORDS / 2; i++) {
          u32 a[2], b[2];
          decode_key(rows.keys[t][0], i, a);
          decode_key(rows.keys[t][1], i, b);
          multiply_high(upper, a[0], b[0], a[1], b[1], high[2 * i], high[2 * i + 1]);
          multiply_low(lower, a[0], b[0], a[1], b[1], low_bytes[2 * i], low_bytes[2 * i + 1]);
        }
        // Sums of integers, exact.
#pragma unroll
        for (int j = 0; j < 4; j++) score[t][j] = (float)(upper[j] * 256 + lower[j]);
      }
      float value_scale[2][2], key_scale[2][2];
#pragma unroll
      for (int t = 0; t < 2; t++) {
        key_scale[t][0] = wide(rows.key_scales[t] & 0xffff);
        key_scale[t][1] = wide(rows.key_scales[t] >> 16);
        value_scale[t][0] = wide(rows.value_scales[t] & 0xffff);
        value_scale[t][1] = wide(rows.value_scales[t] >> 16);
      }
      if (next < stop) load_keys(rows, key_places, at, key_page_bytes);
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int j = 0; j < 4; j++) score[t][j] *= key_scale[t][j / 2];
      if (page >= seen_by_all || page < hidden) {
        const float nothing = __int_as_float(0xff800000);
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
          for (int u = 0; u < 2; u++) {
            const int token = page * PAGE + 4 * r + 2 * t + u;
            // Lines that nobody wrote may hold anything.
            if (token >= end) value_scale[t][u] = 0;
#pragma unroll
            for (int i = 0; i < 2; i++)
              if (token > last[i] || token < first[i]) score[t][2 * u + i] = nothing;
          }
      }
      // What enters the second product are weights times scales: at most 2^15, a half's largest power of two.
      float raised[2] = {top[0], top[1]};
#pragma unroll
      for (int t = 0; t < 2; t++)
#pragma unroll
        for (int u = 0; u < 2; u++) {
          const float size = logarithm(fmaxf(value_scale[t][u], SMALLEST));
#pragma unroll
          for (int i = 0; i < 2; i++) raised[i] = fmaxf(raised[i], fmaf(score[t][2 * u + i], by[i], size));
        }
      if (__any_sync(ALL, raised[0] > top[0] || raised[1] > top[1])) {
#pragma unroll
        for (int i = 0; i < 2; i++) {
#pragma unroll
          for (int step = 4; step < 32; step *= 2) raised[i] = fmaxf(raised[i], __shfl_xor_sync(ALL, raised[i], step));
          const float old = power(top[i] - raised[i]);
          top[i] = raised[i];
          added_up[i] *= old;
          constants[i] *= old;
#pragma unroll
          for (int m = 0; m < TILES; m++) {
            mean[m][i] *= old;
            mean[m][i + 2] *= old;
          }
        }
      }
      const float base[2] = {15.0f - top[0], 15.0f - top[1]};
#pragma unroll
      for (int t = 0; t < 2; t++) {
        float weight[4];
#pragma unroll
        for (int j = 0; j < 4; j++) {
          weight[j] = power(fmaf(score[t][j], by[j % 2], base[j % 2]));
          added_up[j % 2] += weight[j];
          weight[j] *= value_scale[t][j / 2];
        }
        const u32 b0 = transposed(narrow(weight[0], weight[1])), b1 = transposed(narrow(weight[2], weight[3]));
        if constexpr (VALUE_BITS == 4) {
          multiply(constants, CONSTANTS, CONSTANTS, CONSTANTS, CONSTANTS, b0, b1);
#pragma unroll
          for (int i = 0; i < 2 * VALUE_WORDS; i++) {
            // Two bytes of each of two values, side by side.
            const u32 chosen = i % 2 ? 0x7632u : 0x5410u;
            const u32 x = permuted(rows.values[t][0][i / 2], rows.values[t][1][i / 2], chosen);
            const u32 y = permuted(rows.values[t][2][i / 2], rows.values[t][3][i / 2], chosen);
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
          for (int i = 0; i < TILES / 2; i++) {
            const u32 above = three_bits<VALUE_WORDS>(rows.values[t][0], i);
            const u32 below = three_bits<VALUE_WORDS>(rows.values[t][1], i);
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
      if (next < stop) load_values(rows, value_places, at, value_page_bytes);
    }

    // The warps' sums, in the order of the warps. Query row 2 c + i lies in slot 4 i + c, as banks want it.
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int step = 4; step < 32; step *= 2) added_up[i] += __shfl_xor_sync(ALL, added_up[i], step);
      if (r == 0) {
        tops[warp][4 * i + c] = top[i];
        sums[warp][4 * i + c] = added_up[i];
      }
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < 2; i++) {
      float most = tops[0][4 * i + c];
#pragma unroll
      for (int w = 1; w < WARPS; w++) most = fmaxf(most, tops[w][4 * i + c]);
      const float old = power(top[i] - most) * UNIT, less = -constants[i] * old;
      float* out = means[warp][4 * i + c];
      if constexpr (VALUE_BITS == 4) {
#pragma unroll
        for (int m = 0; m < TILES; m += 2)
          *(float4*)(out + r * (DIM / 8) + 2 * m) =
              make_float4(fmaf(mean[m][i], old, less), fmaf(mean[m][i + 2], old, less),
                          fmaf(mean[m + 1][i], old, less), fmaf(mean[m + 1][i + 2], old, less));
      } else {
        // Parts 0 and 4 of a place are two rows of one tile, then 2 and 6, 1 and 5, 3 and 7.
#pragma unroll
        for (int j = 0; j < TILES / 4; j++) {
          const int m = j / 2 * 8 + j % 2, place = VALUE_WORDS / 3 * 4 * (r / 2) + j / 2 * 4 + j % 2 * 2 + r % 2;
#pragma unroll
          for (int half = 0; half < 2; half++)
            *(float4*)(out + 8 * place + 4 * half) =
                make_float4(fmaf(mean[m][i + 2 * half], old, less), fmaf(mean[m + 4][i + 2 * half], old, less),
                            fmaf(mean[m + 2][i + 2 * half], old, less), fmaf(mean[m + 6][i + 2 * half], old, less));
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DIM / 64; k++) {
      const int at = threadIdx.x + 32 * WARPS * k, slot = at / (DIM / 4), column = at % (DIM / 4) * 4;
      float4 all = *(float4*)(means[0][slot] + column);
      float most = tops[0][slot];
#pragma unroll
      for (int w = 1; w < WARPS; w++) {
        const float4 part = *(float4*)(means[w][slot] + column);
        all = make_float4(all.x + part.x, all.y + part.y, all.z + part.z, all.w + part.w);
        most = fmaxf(most, tops[w][slot]);
      }
      const float raised = fmaxf(joined_top[slot], most);
      const float old = power(joined_top[slot] - raised), added_by = power(most - raised);
      float4* before = (float4*)(joined[slot] + column);
      *before = make_float4(join(before->x, old, all.x, added_by), join(before->y, old, all.y, added_by),
                            join(before->z, old, all.z, added_by), join(before->w, old, all.w, added_by));
    }
    float most = tops[0][threadIdx.x % 8], weights = 0;
#pragma unroll
    for (int w = 1; w < WARPS; w++) most = fmaxf(most, tops[w][threadIdx.x % 8]);
#pragma unroll
    for (int w = 0; w < WARPS; w++) weights += sums[w][threadIdx.x % 8] * power(tops[w][threadIdx.x % 8] - most);
    // What was left is read before the next span's is written.
    __syncthreads();
    if (threadIdx.x < 8) {
      const float before = joined_top[threadIdx.x], raised = fmaxf(before, most);
      joined_sum[threadIdx.x] = join(joined_sum[threadIdx.x], power(before - raised), weights, power(most - raised));
      joined_top[threadIdx.x] = raised;
    }
  }

  const i64 first_out = blockIdx.z * tokens * heads * group;
#pragma unroll
  for (int k = 0; k < DIM / 64; k++) {
    const int at = threadIdx.x + 32 * WARPS * k, slot = at / (DIM / 4), column = at % (DIM / 4) * 4;
    const int n = slot % 4 * 2 + slot / 4;
    if (token_of(n) < added) *(float4*)(average + (first_out + place(n)) * DIM + column) = *(float4*)(joined[slot] + column);
  }
  if (const int slot = threadIdx.x; slot < 8) {
    const int n = slot % 4 * 2 + slot / 4;
    if (token_of(n) < added) {
      largest[first_out + place(n)] = joined_top[slot];
      total[first_out + place(n)] = joined_sum[slot];
    }
  }
}
