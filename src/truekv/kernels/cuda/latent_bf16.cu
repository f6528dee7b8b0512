// Attention of up to 8 TILES query rows over spans of latent rows and their rotary keys, both of bf16: every head reads
// the one row of a token, as key and as value.
//
// Sixteen tokens at a time are copied into a ring of shared memory, three of which are under way while one is read,
// across the ends of spans. Four warps share them: each has a quarter of the latent row's numbers and of the rotary
// key's. Tokens are the first operand of scores as they lie there, and turned over, on the way to registers, that of
// averages. The quarters' scores are added up through shared memory, in the order of the quarters, by one warp for each
// eight query rows, which has their softmax. Compiled for compute capability 9.0 with TILES of 2 or 3, and PAGE and
// SPAN, the tokens of a page and of a span.
//
// Lane = 4 r + c has tokens r and r + 8 of scores of query rows 2 c and 2 c + 1. What the text begins with is lanes.cu
// and latents.cu.

constexpr int WIDTH = QUARTER / 16;
constexpr int STEP = 16, STAGES = 4;            // tokens that are read at a time; the ring has so many times that
constexpr int LINE = 2 * (LATENT + ROPE) + 16;  // bytes from token to token: eight lie four banks apart
constexpr int STAGE = STEP * LINE;

extern __shared__ __align__(16) unsigned char held[];  // STAGES * STAGE

__device__ __forceinline__ void multiply_wide(float* d, const u32* a, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}
__device__ __forceinline__ u32 narrow_wide(float low, float high) {
  u32 d;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
// Four matrices of 8 x 8 numbers, whose rows are at the addresses of eight lanes each, as they are or turned over.
__device__ __forceinline__ void matrices(u32* d, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(at)
               : "memory");
}
__device__ __forceinline__ void turned_matrices(u32* d, u32 at) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(d[0]), "=r"(d[1]), "=r"(d[2]), "=r"(d[3])
               : "r"(at)
               : "memory");
}
// 16 bytes, or as many zeros.
__device__ __forceinline__ void copy(u32 to, const unsigned char* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
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
  __shared__ float4 parts[WARPS][TILES][32];
  __shared__ uint4 weights[TILES][32];
  __shared__ __align__(8) float olds[ROWS];  // read in twos
  __shared__ Joined joined;
  __shared__ int raised_any[TILES];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int row = blockIdx.y;
  const int start = (int)position[row], added = (int)count[row];
  const Asked asked = {gather + (i64)row * longest, (int)blockIdx.x * ROWS, heads, added};
  if (asked.token(0) >= added) return;
  const int seen_by_any = start + smaller(added, asked.token(ROWS - 1) + 1);
  const int seen_by_all = (start + asked.token(0) + 1) / STEP;
  const int first = (int)blockIdx.z * each * SPAN, beyond = smaller(first + each * SPAN, seen_by_any);
  if (first >= beyond) return;

  // A rotary query in units of the other part's factor, which both parts' scores meet.
  u32 queries[TILES][WIDTH][2], rope_queries[TILES][2];
#pragma unroll
  for (int j = 0; j < TILES; j++) {
    const i64 at = asked.place(8 * j + r);
    const float* numbers = query + at * LATENT + QUARTER * warp + 2 * c;
    const float* turned = rope_query + at * ROPE + 16 * warp + 2 * c;
    const float units = rope_factor[at] / factor[at];
#pragma unroll
    for (int i = 0; i < 2; i++) {
#pragma unroll
      for (int k = 0; k < WIDTH; k++)
        queries[j][k][i] = narrow_wide(numbers[16 * k + 8 * i], numbers[16 * k + 8 * i + 1]);
      rope_queries[j][i] = narrow_wide(turned[8 * i] * units, turned[8 * i + 1] * units);
    }
  }
  // A warp has the softmax of eight query rows, of which a lane has two.
  float by[2] = {0, 0};
  int seen[2] = {0, 0};
  if (warp < TILES) {
#pragma unroll
    for (int i = 0; i < 2; i++) {
      const int n = 8 * warp + 2 * c + i;
      by[i] = factor[asked.place(n)];
      // Not 0, because minus infinity times it is to be minus infinity; and what is no number stays none.
      if (by[i] < 1e-37f) by[i] = 1e-37f;
      seen[i] = start + smaller(asked.token(n), added - 1);
    }
  }
  joined.begin();

  // Pages are fewer than 2^31: half of each entry will do.
  const u32* table = (const u32*)(pages + (i64)row * width);
  const u32 base = (u32)__cvta_generic_to_shared(held);
  const int stop = (beyond + STEP - 1) / STEP;
  const u32 to = base + threadIdx.x / 64 * LINE + threadIdx.x % 64 * 16;
  const u32 rope_to = base + threadIdx.x / 8 * LINE + 2 * LATENT + threadIdx.x % 8 * 16;
  auto fetch = [&](int step) {
    if (step < stop) {
      const u64 at = (u64)table[2 * (step * STEP / PAGE)] * page_bytes;
      const int line = step * STEP % PAGE, left = beyond - step * STEP, slot = step % STAGES * STAGE;
      const unsigned char* from = latents + at + line * 2 * LATENT + 16 * threadIdx.x;
      // Lines that nobody wrote may hold anything.
#pragma unroll
      for (int k = 0; k < STEP / 2; k++)
        copy(to + slot + 2 * k * LINE, from + 4 * k * LATENT, (int)threadIdx.x / 64 + 2 * k < left);
      copy(rope_to + slot, ropes + at + line * 2 * ROPE + 16 * threadIdx.x, (int)threadIdx.x / 8 < left);
    }
    commit();
  };
#pragma unroll
  for (int i = 0; i < STAGES - 1; i++) fetch(first / STEP + i);
  // Matrices of scores are tokens 0-7 and 8-15 of eight numbers and of the next eight; turned over, the other way
  // round.
  const u32 keys_at = base + lane % 16 * LINE + 2 * QUARTER * warp + lane / 16 * 16;
  const u32 ropes_at = base + lane % 16 * LINE + 2 * LATENT + 32 * warp + lane / 16 * 16;
  const u32 values_at = base + (lane % 8 + lane / 16 * 8) * LINE + 2 * QUARTER * warp + lane / 8 % 2 * 16;

  const i64 first_out = blockIdx.z * tokens * heads;
  for (int low = first; low < beyond; low += SPAN) {
    const int end = smaller(low + SPAN, beyond);
    float mean[WIDTH][TILES][4];
#pragma unroll
    for (int m = 0; m < WIDTH; m++)
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) mean[m][j][i] = 0;
    float top[2] = {LOWEST, LOWEST}, sum[2] = {0, 0};
    for (int step = low / STEP; step < (end + STEP - 1) / STEP; step++) {
      await<STAGES - 2>();
      // It is there for all, and all have read what was in the place that the next is copied to.
      __syncthreads();
      fetch(step + STAGES - 1);
      const u32 slot = step % STAGES * STAGE;
      float score[TILES][4];
#pragma unroll
      for (int j = 0; j < TILES; j++)
#pragma unroll
        for (int i = 0; i < 4; i++) score[j][i] = 0;
#pragma unroll
      for (int k = 0; k < WIDTH; k++) {
        u32 a[4];
        matrices(a, keys_at + slot + 32 * k);
#pragma unroll
        for (int j = 0; j < TILES; j++) multiply_wide(score[j], a, queries[j][k][0], queries[j][k][1]);
      }
      {
        u32 a[4];
        matrices(a, ropes_at + slot);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          multiply_wide(score[j], a, rope_queries[j][0], rope_queries[j][1]);
          parts[warp][j][lane] = make_float4(score[j][0], score[j][1], score[j][2], score[j][3]);
        }
      }
      __syncthreads();

      if (warp < TILES) {
        float4 whole = parts[0][warp][lane];
#pragma unroll
        for (int w = 1; w < WARPS; w++) {
          const float4 part = parts[w][warp][lane];
          whole = make_float4(whole.x + part.x, whole.y + part.y, whole.z + part.z, whole.w + part.w);
        }
        float scores[4] = {whole.x, whole.y, whole.z, whole.w}, raised[2] = {top[0], top[1]};
#pragma unroll
        for (int i = 0; i < 4; i++) {
          if (step >= seen_by_all && step * STEP + r + i / 2 * 8 > smaller(seen[i % 2], end - 1))
            scores[i] = __int_as_float(0xff800000);
          // Rounded once, so that of scores of any size the largest weight is 2^15.
          scores[i] = __fmul_rn(scores[i], by[i % 2]);
          raised[i % 2] = fmaxf(raised[i % 2], scores[i]);
        }
        const bool higher = __any_sync(ALL, raised[0] > top[0] || raised[1] > top[1]);
        if (higher) {
#pragma unroll
          for (int i = 0; i < 2; i++) {
#pragma unroll
            for (int other = 4; other < 32; other *= 2)
              raised[i] = fmaxf(raised[i], __shfl_xor_sync(ALL, raised[i], other));
            const float old = power(top[i] - raised[i]);
            top[i] = raised[i];
            sum[i] *= old;
            if (r == 0) olds[8 * warp + 2 * c + i] = old;
          }
        }
        if (lane == 0) raised_any[warp] = higher;
        float weight[4];
#pragma unroll
        for (int i = 0; i < 4; i++) {
          weight[i] = power(scores[i] - top[i % 2] + 15.0f);
          sum[i % 2] += weight[i];
        }
        // What bf16 leaves of a weight is a second one.
        u32 both[2][2];
#pragma unroll
        for (int i = 0; i < 2; i++) {
          const u32 upper = narrow_wide(weight[2 * i], weight[2 * i + 1]);
          const u32 lower = narrow_wide(weight[2 * i] - __uint_as_float(upper << 16),
                                        weight[2 * i + 1] - __uint_as_float(upper & 0xffff0000u));
          both[0][i] = transposed(upper);
          both[1][i] = transposed(lower);
        }
        weights[warp][lane] = make_uint4(both[0][0], both[0][1], both[1][0], both[1][1]);
      }
      __syncthreads();

      uint4 weight[TILES];
#pragma unroll
      for (int j = 0; j < TILES; j++) {
        weight[j] = weights[j][lane];
        if (raised_any[j]) {
          const float2 old = *(float2*)(olds + 8 * j + 2 * c);
#pragma unroll
          for (int m = 0; m < WIDTH; m++)
#pragma unroll
            for (int i = 0; i < 4; i++) mean[m][j][i] *= i % 2 ? old.y : old.x;
        }
      }
#pragma unroll
      for (int m = 0; m < WIDTH; m++) {
        u32 a[4];
        turned_matrices(a, values_at + slot + 32 * m);
#pragma unroll
        for (int j = 0; j < TILES; j++) {
          multiply_wide(mean[m][j], a, weight[j].x, weight[j].y);
          multiply_wide(mean[m][j], a, weight[j].z, weight[j].w);
        }
      }
    }

    if (warp < TILES) {
#pragma unroll
      for (int i = 0; i < 2; i++) {
#pragma unroll
        for (int other = 4; other < 32; other *= 2) sum[i] += __shfl_xor_sync(ALL, sum[i], other);
        if (r == 0) {
          joined.top[8 * warp + 2 * c + i] = top[i];
          joined.sum[8 * warp + 2 * c + i] = sum[i];
        }
      }
    }
    __syncthreads();
#pragma unroll
    for (int j = 0; j < TILES; j++)
#pragma unroll
      for (int e = 0; e < 2; e++) {
        const int n = 8 * j + 2 * c + e;
        if (asked.token(n) >= added) continue;
        const float2 share = joined.shares(n);
        float* out = average + (first_out + asked.place(n)) * LATENT + QUARTER * warp + r;
#pragma unroll
        for (int m = 0; m < WIDTH; m++)
#pragma unroll
          for (int i = 0; i < 2; i++) {
            float* at = out + 16 * m + 8 * i;
            *at = join(low == first ? 0 : *at, share.x, mean[m][j][e + 2 * i], share.y);
          }
      }
    joined.add();
  }
  joined.leave(largest, total, first_out, asked);
}
