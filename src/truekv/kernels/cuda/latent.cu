// Attention of up to 8 TILES query rows over spans of latent rows of 8 or 4 bits (int8, kv4) and their rotary keys of 8
// (int8): every head reads the one row of a token, as key and as value.
//
// Four warps share a page: each has a quarter of the latent row's numbers, and brings them from memory to registers
// once, where codes of 4 bits become bytes. Those are the second operand of scores, 32 bytes x 8 tokens, as they are,
// and, turned over by movmatrix, the first operand of averages, 16 numbers x 16 tokens. What the quarters say of a
// score are integers; they are added up through shared memory by one warp for each eight query rows, which has their
// softmax. Its weights are the second operand of averages as they are made. Compiled for compute capability 9.0 with
// TILES of 2 or 3, KEY_BITS, and PAGE and SPAN, the tokens of a page and of a span.
//
// Lane = 4 r + c. Of a page a lane loads bytes 16 c to 16 c + 15 of each 64 of tokens 4 r + i, and has the scores of
// query row r with tokens 8 c + i and 8 c + 4 + i. What the text begins with is lanes.cu and latents.cu.

constexpr int WORDS = QUARTER / 16;
constexpr int LINE = LATENT * KEY_BITS / 8, LOADS = KEY_BITS / 4;  // bytes of a row's codes, and loads of a lane's part
constexpr u32 ABOVE = 0x00800080u, BELOW = 0x807f807fu;  // 128 * 2^-24 and -127 * 2^-24, twice
constexpr float UNIT = 16777216;                         // 2^24

// Bytes times bytes; the first operand is four numbers of eight query rows twice: upper bytes, lower bytes.
__device__ __forceinline__ void multiply(int* d, uint4 a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1));
}
// Added to nothing.
__device__ __forceinline__ void multiply_first(int* d, uint4 a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%10, %10, %10, %10};"
      : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
      : "r"(a.x), "r"(a.y), "r"(a.z), "r"(a.w), "r"(b0), "r"(b1), "r"(0));
}
__device__ __forceinline__ uint4 load4(const void* at) {
  uint4 d;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(d.x), "=r"(d.y), "=r"(d.z), "=r"(d.w) : "l"(at));
  return d;
}

__device__ __forceinline__ float largest_of(const float* four) {
  const uint4 x = load4(four);
  return fmaxf(fmaxf(fabsf(__uint_as_float(x.x)), fabsf(__uint_as_float(x.y))),
               fmaxf(fabsf(__uint_as_float(x.z)), fabsf(__uint_as_float(x.w))));
}
// Four numbers of a query as integers of 16 bits, and those as two bytes with a sign each.
__device__ __forceinline__ uint2 in_bytes(const float* numbers, float units) {
  const uint4 four = load4(numbers);
  u32 x[4] = {four.x, four.y, four.z, four.w}, upper[4];
#pragma unroll
  for (int i = 0; i < 4; i++) {
    x[i] = __float_as_uint(fmaf(__uint_as_float(x[i]), units, 12582912.0f));
    upper[i] = x[i] + 128;
  }
  return make_uint2(permuted(permuted(upper[0], upper[1], 0x0051u), permuted(upper[2], upper[3], 0x0051u), 0x5410u),
                    permuted(permuted(x[0], x[1], 0x0040u), permuted(x[2], x[3], 0x0040u), 0x5410u));
}

// Column of a quarter where the q-th four numbers of lane c begin.
__device__ __forceinline__ int column(int c, int q) {
  return KEY_BITS == 8 ? 64 * (q / 4) + 16 * c + 4 * (q % 4) : 32 * c + 4 * q;
}

struct Page {
  uint4 codes[4][LOADS];        // of tokens 4 r + i, a quarter of a row
  uint4 rope;                   // of token 4 r + warp
  uint4 scales, rope_scales;    // of tokens 8 c to 8 c + 7
};

__device__ __forceinline__ float half_of(uint4 eight, int i) {
  const u32 two = i / 2 == 0 ? eight.x : i / 2 == 1 ? eight.y : i / 2 == 2 ? eight.z : eight.w;
  return wide(i % 2 ? two >> 16 : two & 0xffff);
}

// Arguments as of attend_kernel in kernels/triton/attention.py, queries in float32. Grid: (tiles of query rows, batch
// rows, spans / each): a block takes `each` spans, one after the other, and joins their sums as join_kernel does.
extern "C" __global__ void __launch_bounds__(32 * WARPS, 2)
    attend(const unsigned char* __restrict__ latents, const unsigned char* __restrict__ ropes,
           const float* __restrict__ query, const float* __restrict__ rope_query, const float* __restrict__ factor,
           const float* __restrict__ rope_factor, const i64* __restrict__ gather, const i64* __restrict__ position,
           const i64* __restrict__ count, const i64* __restrict__ pages, float* __restrict__ average,
           float* __restrict__ largest, float* __restrict__ total, u32 page_bytes, i64 tokens, int longest, int width,
           int heads, int each) {
  __shared__ uint4 queries[WARPS][TILES][4][32], rope_queries[TILES][2][32];
  __shared__ int4 parts[WARPS][TILES][2][32];
  __shared__ int2 rope_parts[TILES][4][32];
  __shared__ uint4 weights[TILES][32];
  __shared__ __align__(16) float olds[ROWS], offsets[ROWS];  // read in twos
  __shared__ Joined joined;
  __shared__ int raised_any[TILES];
  __shared__ float mosts[WARPS][ROWS], rope_mosts[WARPS][ROWS];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int row = blockIdx.y;
  const int start = (int)position[row], added = (int)count[row];
  const Asked asked = {gather + (i64)row * longest, (int)blockIdx.x * ROWS, heads, added};
  if (asked.token(0) >= added) return;
  const int seen_by_any = start + smaller(added, asked.token(ROWS - 1) + 1);
  const int seen_by_all = (start + asked.token(0) + 1) / PAGE;
  if ((int)blockIdx.z * each * SPAN >= seen_by_any) return;

  // A query's two parts in units of one number, which makes the largest of both the largest integer of 16 bits, or less
  // by a bit. It is not 0, because minus infinity times it is to be minus infinity; and what is no number stays none.
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const i64 at = asked.place(8 * j + r);
    const float* numbers = query + at * LATENT + QUARTER * warp;
    const float* turned = rope_query + at * ROPE + 16 * c + 4 * warp;
    float most = 0, rope_most = largest_of(turned);
#pragma unroll
    for (int k = 0; k < 8; k++) most = fmaxf(most, largest_of(numbers + column(c, k)));
#pragma unroll
    for (int step = 1; step < 4; step *= 2) {
      most = fmaxf(most, __shfl_xor_sync(ALL, most, step));
      rope_most = fmaxf(rope_most, __shfl_xor_sync(ALL, rope_most, step));
    }
    if (c == 0) {
      mosts[warp][8 * j + r] = most;
      rope_mosts[warp][8 * j + r] = rope_most;
    }
  }
  __syncthreads();
  auto whole = [&](int n) {
    float most = 0, rope_most = 0;
#pragma unroll
    for (int w = 0; w < WARPS; w++) {
      most = fmaxf(most, mosts[w][n]);
      rope_most = fmaxf(rope_most, rope_mosts[w][n]);
    }
    const float all = factor[asked.place(n)] * most + rope_factor[asked.place(n)] * rope_most;
    return all < 1e-37f ? 1e-37f : all;
  };
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const i64 at = asked.place(8 * j + r);
    const float all = whole(8 * j + r);
    const float units = UNITS * (factor[at] / all), rope_units = UNITS * (rope_factor[at] / all);
    const float* numbers = query + at * LATENT + QUARTER * warp;
#pragma unroll
    for (int k = 0; k < 4; k++) {
      const uint2 a = in_bytes(numbers + column(c, 2 * k), units);
      const uint2 b = in_bytes(numbers + column(c, 2 * k + 1), units);
      queries[warp][j][k][lane] = make_uint4(a.x, a.y, b.x, b.y);
    }
    if (warp < 2) {
      const float* turned = rope_query + at * ROPE + 16 * c + 8 * warp;
      const uint2 a = in_bytes(turned, rope_units), b = in_bytes(turned + 4, rope_units);
      rope_queries[j][warp][lane] = make_uint4(a.x, a.y, b.x, b.y);
    }
  }
  // A warp has the softmax of eight query rows: row r is a lane's.
  float by = 0;
  int seen = 0;
  if (warp < TILES) {
    by = whole(8 * warp + r) * (1 / UNITS);
    seen = start + smaller(asked.token(8 * warp + r), added - 1);
  }
  joined.begin();
  __syncthreads();

  const unsigned char* code_at = latents + 4 * r * LINE + LINE / WARPS * warp + 16 * c;
  const unsigned char* rope_at = ropes + (4 * r + warp) * ROPE + 16 * c;
  const unsigned char *scale_at = latents + PAGE * LINE + 16 * c, *rope_scale_at = ropes + PAGE * ROPE + 16 * c;
  // Pages are fewer than 2^31: half of each entry will do.
  const u32* table = (const u32*)(pages + (i64)row * width);
  auto read = [&](Page& page, int number) {
    const u64 at = (u64)table[2 * number] * page_bytes;
#pragma unroll
    for (int i = 0; i < 4; i++)
#pragma unroll
      for (int k = 0; k < LOADS; k++) page.codes[i][k] = load4(code_at + at + i * LINE + 64 * k);
    page.rope = load4(rope_at + at);
    page.scales = load4(scale_at + at);
    page.rope_scales = load4(rope_scale_at + at);
  };

  const i64 first_out = blockIdx.z * tokens * heads;
  for (int span = 0; span < each; span++) {
    const int low = ((int)blockIdx.z * each + span) * SPAN, end = smaller(low + SPAN, seen_by_any);
    if (low >= end) break;
    float mean[WORDS][TILES][4];
#pragma unroll
    for (int q = 0; q < WORDS; q++)
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) mean[q][j][i] = 0;
    float top = LOWEST, sum = 0, offset[4] = {0, 0, 0, 0};
    const int stop = (end + PAGE - 1) / PAGE;
    auto take = [&](const Page& page, Page& next, int number) {
      if (number + 1 < stop) read(next, number + 1);
      u32 code[4][WORDS];
#pragma unroll
      for (int i = 0; i < 4; i++)
#pragma unroll
        for (int k = 0; k < LOADS; k++) {
          const u32 four[4] = {page.codes[i][k].x, page.codes[i][k].y, page.codes[i][k].z, page.codes[i][k].w};
#pragma unroll
          for (int q = 0; q < 4; q++)
            if constexpr (KEY_BITS == 8)
              code[i][4 * k + q] = four[q];
            else
              look_up(four[q], code[i] + 2 * q);
        }
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        int score[4][4];
#pragma unroll
        for (int k = 0; k < 4; k++) {
          const uint4 query_row = queries[warp][j][k][lane];
#pragma unroll
          for (int i = 0; i < 4; i++)
            if (k == 0)
              multiply_first(score[i], query_row, code[i][0], code[i][1]);
            else
              multiply(score[i], query_row, code[i][2 * k], code[i][2 * k + 1]);
        }
#pragma unroll
        for (int i = 0; i < 4; i += 2)
          parts[warp][j][i / 2][lane] =
              make_int4(score[i][0] * 256 + score[i][2], score[i][1] * 256 + score[i][3],
                        score[i + 1][0] * 256 + score[i + 1][2], score[i + 1][1] * 256 + score[i + 1][3]);
        multiply_first(score[0], rope_queries[j][0][lane], page.rope.x, page.rope.y);
        multiply(score[0], rope_queries[j][1][lane], page.rope.z, page.rope.w);
        rope_parts[j][warp][lane] = make_int2(score[0][0] * 256 + score[0][2], score[0][1] * 256 + score[0][3]);
      }
      __syncthreads();

      if (warp < TILES) {
        float score[4][2], scale[4][2], raised = top;
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const int2* at = (const int2*)parts[0][warp][i / 2] + 2 * lane + i % 2;
          int2 content = *at;
#pragma unroll
          for (int w = 1; w < WARPS; w++) {
            const int2 part = at[w * sizeof(parts[0]) / 8];
            content = make_int2(content.x + part.x, content.y + part.y);
          }
          const int2 turned = rope_parts[warp][i][lane];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            const int token = number * PAGE + 8 * c + 4 * e + i;
            scale[i][e] = half_of(page.scales, 4 * e + i);
            score[i][e] = fmaf((float)(e ? content.y : content.x), scale[i][e],
                               (float)(e ? turned.y : turned.x) * half_of(page.rope_scales, 4 * e + i));
            if (number >= seen_by_all) {
              // Lines that nobody wrote may hold anything.
              if (token >= end) scale[i][e] = 0;
              if (token > smaller(seen, end - 1)) score[i][e] = __int_as_float(0xff800000);
            }
            // What enters the second product are weights times scales: at most 2^14, and twice that where scores are so
            // large that they are rounded to whole numbers, up to 2^25.
            raised = fmaxf(raised, fmaf(score[i][e], by, logarithm(fmaxf(scale[i][e], SMALLEST))));
          }
        }
        const bool higher = __any_sync(ALL, raised > top);
        if (higher) {
          raised = fmaxf(raised, __shfl_xor_sync(ALL, raised, 1));
          raised = fmaxf(raised, __shfl_xor_sync(ALL, raised, 2));
          const float old = power(top - raised);
          top = raised;
          sum *= old;
          if (c == 0) olds[8 * warp + r] = old;
        }
        if (lane == 0) raised_any[warp] = higher;
        const float base = 14.0f - top;
        u32 made[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          float weight[2];
#pragma unroll
          for (int e = 0; e < 2; e++) {
            weight[e] = power(fmaf(score[i][e], by, base));
            sum += weight[e];
            weight[e] *= scale[i][e];
          }
          made[i] = narrow(weight[0], weight[1]);
        }
        weights[warp][lane] = make_uint4(made[0], made[1], made[2], made[3]);
      }
      __syncthreads();

#pragma unroll
      for (int j = 0; j < TILES; j++)
        if (raised_any[j]) {
          const float2 old = *(float2*)(olds + 8 * j + 2 * c);
#pragma unroll
          for (int q = 0; q < WORDS; q++)
#pragma unroll
            for (int i = 0; i < 4; i++) mean[q][j][i] *= i % 2 ? old.y : old.x;
          if (warp == j) {
            offset[0] *= old.x;
            offset[1] *= old.y;
          }
        }
      uint4 weight[TILES];
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        weight[j] = weights[j][lane];
        if (warp == j) {
          multiply(offset, ABOVE, ABOVE, BELOW, BELOW, weight[j].x, weight[j].y);
          multiply(offset, ABOVE, ABOVE, BELOW, BELOW, weight[j].z, weight[j].w);
        }
      }
      // A byte b, as a half, is b * 2^-24, exactly. Codes of two tokens are x + 128 and x - 127, so that what that adds
      // to a sum stays small; it is known from a product of its own, and taken off in the end.
#pragma unroll
      for (int q = 0; q < WORDS; q++) {
        u32 even[4], odd[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          const u32 turned = transposed(code[i][q]) ^ (i % 2 ? 0x7f7f7f7fu : 0x80808080u);
          even[i] = permuted(turned, i % 2 ? 0x80808080u : 0, 0x4240u);
          odd[i] = permuted(turned, i % 2 ? 0x80808080u : 0, 0x4341u);
        }
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          multiply(mean[q][j], even[0], odd[0], even[1], odd[1], weight[j].x, weight[j].y);
          multiply(mean[q][j], even[2], odd[2], even[3], odd[3], weight[j].z, weight[j].w);
        }
      }
    };
    Page one, two;
    read(one, low / PAGE);
    for (int number = low / PAGE; number < stop; number += 2) {
      take(one, two, number);
      if (number + 1 < stop) take(two, one, number + 1);
    }

    if (warp < TILES) {
      sum += __shfl_xor_sync(ALL, sum, 1);
      sum += __shfl_xor_sync(ALL, sum, 2);
      if (c == 0) {
        joined.top[8 * warp + r] = top;
        joined.sum[8 * warp + r] = sum;
      }
      // All rows of this product are alike.
      if (r == 0) *(float2*)(offsets + 8 * warp + 2 * c) = make_float2(offset[0], offset[1]);
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int n = 8 * j + 2 * c + e;
        if (asked.token(n) >= added) continue;
        const float2 share = joined.shares(n);
        float* out = average + (first_out + asked.place(n)) * LATENT + QUARTER * warp + 2 * (r % 2);
#pragma unroll
        for (int q = 0; q < WORDS; q++) {
          float2* at = (float2*)(out + column(r / 2, q));
          const float2 before = span ? *at : make_float2(0, 0);
          *at = make_float2(join(before.x, share.x, (mean[q][j][e] - offsets[n]) * UNIT, share.y),
                            join(before.y, share.x, (mean[q][j][e + 2] - offsets[n]) * UNIT, share.y));
        }
      }
    joined.add();
  }
  joined.leave(largest, total, first_out, asked);
}
