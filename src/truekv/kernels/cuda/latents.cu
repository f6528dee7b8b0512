// What the kernels of latent rows have in common: which query rows a block has, and how it joins its spans' sums. Every
// head reads the one row of a token, as key and as value; four warps have a quarter of its numbers each. Compiled with
// TILES of eight query rows in a block.

constexpr int LATENT = 512, ROPE = 64, QUARTER = LATENT / WARPS, ROWS = 8 * TILES;

// Query row n of a block: head (first + n) % heads of token (first + n) / heads. Rows beyond those of the last token
// are its rows again, and are not written.
struct Asked {
  const i64* gather;
  int first, heads, added;

  __device__ __forceinline__ int token(int n) const { return (first + n) / heads; }
  __device__ __forceinline__ i64 place(int n) const {
    return gather[smaller(token(n), added - 1)] * heads + first + n - token(n) * heads;
  }
};

// Largest scores and sums of weights, of one span and of those before it; in shared memory.
struct Joined {
  float top[ROWS], sum[ROWS], before_top[ROWS], before_sum[ROWS];

  __device__ __forceinline__ void begin() {
    if (threadIdx.x < ROWS) {
      before_top[threadIdx.x] = LOWEST;
      before_sum[threadIdx.x] = 0;
    }
  }
  // What averages of the spans before, and of this one, are multiplied by.
  __device__ __forceinline__ float2 shares(int n) const {
    const float raised = fmaxf(before_top[n], top[n]);
    return make_float2(power(before_top[n] - raised), power(top[n] - raised));
  }
  __device__ __forceinline__ void add() {
    // What was left is read before the next span's is written.
    __syncthreads();
    if (const int n = threadIdx.x; n < ROWS) {
      const float2 by = shares(n);
      before_sum[n] = join(before_sum[n], by.x, sum[n], by.y);
      before_top[n] = fmaxf(before_top[n], top[n]);
    }
  }
  __device__ __forceinline__ void leave(float* largest, float* total, i64 first, const Asked& asked) const {
    if (const int n = threadIdx.x; n < ROWS && asked.token(n) < asked.added) {
      largest[first + asked.place(n)] = before_top[n];
      total[first + asked.place(n)] = before_sum[n];
    }
  }
};
