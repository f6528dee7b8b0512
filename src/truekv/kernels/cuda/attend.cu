// Attention of up to eight query rows over spans of one kv head's rows, which are those of codes.cu or of blocks.cu.
//
// Four warps take the pages of a span in turn. Query rows are the eight columns of both products, so a code is decoded
// once for all of them. Compiled for compute capability 9.0 with DIM, KEY_BITS, VALUE_BITS, and PAGE and SPAN, the
// tokens of a page and of a span. What the text begins with is lanes.cu and what defines Rows: how keys and values come
// from memory, keys as the first operand of scores, values as that of averages.
//
// Lane = 4 r + c has query rows 2 c and 2 c + 1 of what both products give.

constexpr int QUERY_WORDS = DIM / 16, TILES = DIM / 16;

// Arguments as of attend_kernel in kernels/triton/attention.py, queries in float32. Grid: (kv heads, batch rows,
// spans / each): a block takes `each` spans, one after the other, and joins their sums as join_kernel does.
extern "C" __global__ void __launch_bounds__(32 * WARPS, DIM <= 128 ? 3 : 2)
    attend(const unsigned char* __restrict__ keys, const unsigned char* __restrict__ values,
           const float* __restrict__ query, const float* __restrict__ factor, const i64* __restrict__ gather,
           const i64* __restrict__ position, const i64* __restrict__ count, const i64* __restrict__ pages,
           float* __restrict__ average, float* __restrict__ largest, float* __restrict__ total, u32 key_page_bytes,
           u32 value_page_bytes, i64 tokens, int longest, int width, int window, int group, int each) {
  __shared__ float tops[WARPS][8], sums[WARPS][8];
  // Of the spans before.
  __shared__ float joined_top[8], joined_sum[8];
  __shared__ __align__(16) float joined[8][DIM + 4];
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, r = lane / 4, c = lane % 4;
  const int head = blockIdx.x, row = blockIdx.y;
  const int start = (int)position[row], added = (int)count[row];
  if (added == 0 || (int)blockIdx.z * each * SPAN >= start + added) return;

  Rows rows;
  rows.place(keys + (i64)head * KEY_PAGE, values + (i64)head * VALUE_PAGE, warp, r, c);
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
#pragma unroll
  for (int i = 0; i < QUERY_WORDS; i++) {
    u32 four[4];
    Rows::query(four, query + place(r) * DIM, c, i);
#pragma unroll
    for (int j = 0; j < 4; j++) four[j] = __float_as_uint(fmaf(__uint_as_float(four[j]), UNITS, 12582912.0f));
    const u32 a = permuted(four[0], four[1], 0x5140u), b = permuted(four[2], four[3], 0x5140u);
    low_bytes[i] = permuted(a, b, 0x5410u);
    high[i] = permuted(a, b, 0x7632u);
  }
  float by[2];
#pragma unroll
  for (int i = 0; i < 2; i++) {
    by[i] = factor[place(2 * c + i)] * (KEY_UNIT / UNITS);
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
    float mean[TILES][4], top[2] = {LOWEST, LOWEST}, added_up[2] = {0, 0};
#pragma unroll
    for (int i = 0; i < TILES; i++)
#pragma unroll
      for (int j = 0; j < 4; j++) mean[i][j] = 0;
    // Pages are counted from the start of the sequence, so which warp takes one depends on nothing else.
    int page = low / PAGE;
    page += (warp - page) & (WARPS - 1);
    const int stop = (end + PAGE - 1) / PAGE;
    rows.begin();
    {
      u32 at = 0;
      if (page < stop) at = table[2 * page];
      rows.fetch_keys(page < stop, at, key_page_bytes);
      rows.fetch_values(page < stop, at, value_page_bytes);
    }
    for (; page < stop; page += WARPS) {
      const int next = page + WARPS;
      u32 at = 0;
      if (next < stop) at = table[2 * next];
      float score[2][4], value_scale[2][2];
      rows.scores(score, high, low_bytes);
      rows.fetch_keys(next < stop, at, key_page_bytes);
      rows.scales(value_scale, r, end - page * PAGE);
      if (page >= seen_by_all || page < hidden) {
        const float nothing = __int_as_float(0xff800000);
#pragma unroll
        for (int t = 0; t < 2; t++)
#pragma unroll
          for (int u = 0; u < 2; u++) {
            const int token = page * PAGE + Rows::token(r, t, u);
            // Lines that nobody wrote may hold anything.
            if (token >= end) value_scale[t][u] = 0;
#pragma unroll
            for (int i = 0; i < 2; i++)
              if (token > last[i] || token < first[i]) score[t][2 * u + i] = nothing;
          }
      }
      // What enters the second product are weights times scales: at most 2^15, a half's largest power of two, unless
      // scores are beyond 2^24.
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
          rows.lower(i, old);
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
        rows.average(mean, t, b0, b1);
      }
      rows.fetch_values(next < stop, at, value_page_bytes);
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
      rows.leave(Rows::left(warp) + (4 * i + c) * (DIM + 4), mean, i, r, power(top[i] - most));
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < DIM / 64; k++) {
      const int at = threadIdx.x + 32 * WARPS * k, slot = at / (DIM / 4), column = at % (DIM / 4) * 4;
      float4 all = *(float4*)(Rows::left(0) + slot * (DIM + 4) + column);
      float most = tops[0][slot];
#pragma unroll
      for (int w = 1; w < WARPS; w++) {
        const float4 part = *(float4*)(Rows::left(w) + slot * (DIM + 4) + column);
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
    if (token_of(n) < added)
      *(float4*)(average + (first_out + place(n)) * DIM + column) = *(float4*)(joined[slot] + column);
  }
  if (const int slot = threadIdx.x; slot < 8) {
    const int n = slot % 4 * 2 + slot / 4;
    if (token_of(n) < added) {
      largest[first_out + place(n)] = joined_top[slot];
      total[first_out + place(n)] = joined_sum[slot];
    }
  }
}
