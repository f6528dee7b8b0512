// Rows cut into blocks of 32 numbers with a scale each: q8_0 and q4_0 of formats/blocks.py, byte for byte. See
// attend.cu, which reads them by what is defined here.
//
// Blocks of 34 and 18 bytes start at even addresses, which no wide load takes, so a warp copies its page of keys, and
// then of values, into shared memory as they are, 16 bytes at a time and past its registers: keys of the next page are
// under way while values of this one are multiplied. Keys are integers of 8 bits, a block a product, whose sums are
// exact before they meet its scale. Of values a power of two above each row's scales is its weight's factor, as if it
// had one scale, and what a block has of it, a half, exactly down to 2^-14, is multiplied to the weights of that
// block's product. DIM is 64, 128 or 256.
//
// Numbers count as columns in storage order: 2 j and 2 j + 1 of a block of q4_0 are the low and the high nibble of byte
// j, numbers j and j + 16; those of q8_0 are as they are.

constexpr int BLOCKS = DIM / 32, KEY_BLOCK = 2 + 4 * KEY_BITS, VALUE_BLOCK = 2 + 4 * VALUE_BITS;
constexpr int KEY_BYTES = BLOCKS * KEY_BLOCK, VALUE_BYTES = BLOCKS * VALUE_BLOCK;
constexpr int KEY_PAGE = PAGE * KEY_BYTES, VALUE_PAGE = PAGE * VALUE_BYTES;  // bytes of a kv head
constexpr float KEY_UNIT = KEY_BITS == 4 ? 0.0625f : 1;                      // of a key in its product
constexpr int APART = 256 / DIM;
constexpr int SHARES = PAGE * BLOCKS * 2;                                    // bytes of what blocks have of scales
constexpr int HELD = KEY_PAGE + VALUE_PAGE + SHARES;                         // bytes of a warp

constexpr u32 ONE = 0x3c003c00u, NOTHING = 0x80008000u;                      // halves, twice: 1 and -0

extern __shared__ __align__(16) unsigned char held[];  // WARPS * HELD

__device__ __forceinline__ u32 word(int at) { return *(const u32*)(held + at); }
__device__ __forceinline__ u32 half_word(int at) { return *(const u16*)(held + at); }
// A word at an even address that is a multiple of 4 or is not, as is known to the compiler.
__device__ __forceinline__ u32 even_word(int at, bool aligned) {
  return aligned ? word(at) : permuted(word(at - 2), word(at + 2), 0x5432u);
}
// Some bits, of which others are turned over: one instruction, if it is said to be.
template <u32 MASK, u32 TURNED>
__device__ __forceinline__ u32 chosen(u32 x) {
  u32 d;
  asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(x), "n"(MASK), "n"(TURNED));
  return d;
}
// Bits 0-3 or 4-7 of both halves, less 8, as halves: 1024 + code, or 1024 + 16 code, is a matter of bits.
__device__ __forceinline__ u32 low_nibbles(u32 x) {
  return fused(chosen<0x000f000fu, 0x64006400u>(x), ONE, 0xe408e408u);
}
__device__ __forceinline__ u32 high_nibbles(u32 x) {
  return fused(chosen<0x00f000f0u, 0x64006400u>(x), 0x2c002c00u, 0xd480d480u);
}
// A lane's part of so many bytes, from some byte on.
template <int BYTES, int AT = 0>
__device__ __forceinline__ void copy(u32 to, const unsigned char* from, int lane) {
  if (AT + 512 <= BYTES || AT + 16 * lane < BYTES)
    asm volatile("cp.async.cg.shared.global [%0+%2], [%1+%2], 16;" ::"r"(to), "l"(from), "n"(AT) : "memory");
  if constexpr (AT + 512 < BYTES) copy<BYTES, AT + 512>(to, from, lane);
}

struct Rows {
  int keys, values, shares, lane;  // where they are held
  u32 keys_to, values_to;          // where a lane's part of a page goes, and where it comes from in page 0
  const unsigned char *keys_from, *values_from;

  // Token of a page in row r + 8 u of scores of tile t. Rows that are read together are 4 banks apart.
  static __device__ __forceinline__ int token(int r, int t, int u) {
    const int group = 2 * t + u;
    return APART * r + group % APART + 8 * APART * (group / APART);
  }

  // Numbers of a query row that meet the i-th word of keys: of a block, words c and 4 + c, or both nibbles of word c.
  static __device__ __forceinline__ void query(u32* four, const float* row, int c, int i) {
    const float* block = row + i / 2 * 32;
#pragma unroll
    for (int k = 0; k < 4; k++)
      four[k] = __float_as_uint(KEY_BITS == 4 ? block[8 * c + 2 * k + i % 2] : block[16 * (i % 2) + 4 * c + k]);
  }

  __device__ __forceinline__ void place(const unsigned char* key, const unsigned char* value, int warp, int r, int c) {
    keys = warp * HELD;
    values = keys + KEY_PAGE;
    shares = values + VALUE_PAGE;
    lane = 4 * r + c;
    keys_to = (u32)__cvta_generic_to_shared(held + keys) + 16 * lane;
    values_to = keys_to + KEY_PAGE;
    keys_from = key + 16 * lane;
    values_from = value + 16 * lane;
  }

  __device__ __forceinline__ void begin() {}

  __device__ __forceinline__ void fetch_keys(bool there, u32 page, u32 page_bytes) {
    // All lanes have read what was there.
    __syncwarp();
    if (there) copy<KEY_PAGE>(keys_to, keys_from + (u64)page * page_bytes, lane);
    commit();
  }

  __device__ __forceinline__ void fetch_values(bool there, u32 page, u32 page_bytes) {
    __syncwarp();
    if (there) copy<VALUE_PAGE>(values_to, values_from + (u64)page * page_bytes, lane);
    commit();
  }

  // What query rows 2 c and 2 c + 1 make of the keys, but for their units.
  __device__ __forceinline__ void scores(float score[2][4], const u32* high, const u32* low) const {
    await<1>();
    __syncwarp();
#pragma unroll
    for (int t = 0; t < 2; t++) {
#pragma unroll
      for (int j = 0; j < 4; j++) score[t][j] = 0;
#pragma unroll
      for (int b = 0; b < BLOCKS; b++) {
        u32 a[2][2];
        float scale[2];
#pragma unroll
        for (int u = 0; u < 2; u++) {
          const int block = keys + token(lane / 4, t, u) * KEY_BYTES + b * KEY_BLOCK, codes = block + 2 + lane % 4 * 4;
          scale[u] = wide(half_word(block));
          a[u][0] = even_word(codes, b % 2);
          if constexpr (KEY_BITS == 4) {
            // 16 times what codes stand for, as bytes.
            a[u][1] = chosen<0xf0f0f0f0u, 0x80808080u>(a[u][0]);
            a[u][0] = chosen<0xf0f0f0f0u, 0x80808080u>(a[u][0] << 4);
          } else {
            a[u][1] = even_word(codes + 16, b % 2);
          }
        }
        int upper[4] = {0, 0, 0, 0}, lower[4] = {0, 0, 0, 0};
        multiply_high(upper, a[0][0], a[1][0], a[0][1], a[1][1], high[2 * b], high[2 * b + 1]);
        multiply_low(lower, a[0][0], a[1][0], a[0][1], a[1][1], low[2 * b], low[2 * b + 1]);
#pragma unroll
        for (int j = 0; j < 4; j++) score[t][j] = fmaf((float)(upper[j] * 256 + lower[j]), scale[j / 2], score[t][j]);
      }
    }
  }

  // The power of two of each value by rows of scores, and what its blocks have of it. A lane has a token. Of lines that
  // nobody wrote, which may hold anything, blocks have nothing.
  __device__ __forceinline__ void scales(float scale[2][2], int r, int written) const {
    await<1>();
    __syncwarp();
    float each[BLOCKS], most = 0;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      each[b] = wide(half_word(values + lane * VALUE_BYTES + b * VALUE_BLOCK));
      if (lane >= written) each[b] = 0;
      most = fmaxf(most, fabsf(each[b]));
    }
    const u32 bits = (__float_as_uint(fmaxf(most, SMALLEST)) & 0x7f800000u) + 0x00800000u;
    const float whole = __uint_as_float(bits), inverse = __uint_as_float(0x7f000000u - bits);
    // Rows 2 c, 2 c + 1, 8 + 2 c and 9 + 2 c of a tile are side by side, as weights are.
    const int row = lane / APART % 8, group = lane % APART + APART * (lane / (8 * APART));
    const int place = 16 * (group / 2) + 4 * (row / 2) + 2 * (group % 2) + row % 2;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
      *(u16*)(held + shares + 2 * (b * PAGE + place)) = (u16)narrow(each[b] * inverse, 0);
    __syncwarp();
#pragma unroll
    for (int t = 0; t < 2; t++)
#pragma unroll
      for (int u = 0; u < 2; u++) scale[t][u] = __shfl_sync(ALL, whole, token(r, t, u));
  }

  __device__ __forceinline__ void lower(int, float) {}

  // Add the values of tile t, weights being the second operand.
  __device__ __forceinline__ void average(float mean[][4], int t, u32 b0, u32 b1) const {
    const int r = lane / 4, c = lane % 4;
#pragma unroll
    for (int b = 0; b < BLOCKS; b++) {
      const uint2 share = *(const uint2*)(held + shares + 2 * (b * PAGE + 16 * t + 4 * c));
      const u32 w0 = fused(b0, share.x, NOTHING), w1 = fused(b1, share.y, NOTHING);
      // Columns 4 r to 4 r + 3 of the block, of two pairs of tokens.
      u32 number[4][2];
#pragma unroll
      for (int pair = 0; pair < 2; pair++) {
        const int first = values + token(2 * c, t, pair) * VALUE_BYTES + b * VALUE_BLOCK + 2;
        const int second = first + APART * VALUE_BYTES;
        if constexpr (VALUE_BITS == 4) {
          const u32 x = permuted(half_word(first + 2 * r), half_word(second + 2 * r), 0x5410u);
          number[0][pair] = low_nibbles(x);
          number[1][pair] = high_nibbles(x);
          number[2][pair] = low_nibbles(x >> 8);
          number[3][pair] = high_nibbles(x >> 8);
        } else {
          const u32 x = even_word(first + 4 * r, b % 2) ^ 0x80808080u;
          const u32 y = even_word(second + 4 * r, b % 2) ^ 0x80808080u;
#pragma unroll
          for (int k = 0; k < 2; k++) {
            const u32 both = permuted(x, y, k ? 0x7362u : 0x5140u);
            number[2 * k][pair] = fused(permuted(both, 0x64646464u, 0x4140u), ONE, 0xe480e480u);
            number[2 * k + 1][pair] = fused(permuted(both, 0x64646464u, 0x4342u), ONE, 0xe480e480u);
          }
        }
      }
      multiply(mean[2 * b], number[0][0], number[2][0], number[0][1], number[2][1], w0, w1);
      multiply(mean[2 * b + 1], number[1][0], number[3][0], number[1][1], number[3][1], w0, w1);
    }
  }

  // Write the averages of one query row, each times `by`, in the order of columns.
  __device__ __forceinline__ void leave(float* out, const float mean[][4], int i, int r, float by) const {
#pragma unroll
    for (int b = 0; b < BLOCKS; b++)
      *(float4*)(out + 32 * b + 4 * r) = make_float4(mean[2 * b][i] * by, mean[2 * b + 1][i] * by,
                                                     mean[2 * b][i + 2] * by, mean[2 * b + 1][i + 2] * by);
  }

  // Where a warp leaves its averages: over its own pages, of which it needs no more.
  static __device__ __forceinline__ float* left(int warp) { return (float*)(held + warp * HELD); }
};
