// What the kernels of this folder have in common: one instruction of a warp's lanes each. Their texts are compiled as
// one; nothing but PTX is included, so NVRTC needs no headers.

typedef unsigned int u32;
typedef unsigned short u16;
typedef long long i64;
typedef unsigned long long u64;

constexpr int WARPS = 4;
constexpr float LOWEST = -3.0e38f;         // as in kernels/triton/attention.py
constexpr float SMALLEST = 5.9604645e-8f;  // 2^-24, of the scales that are not 0
constexpr float UNITS = 32512;             // of a query's 1: 127 * 256
constexpr u32 ALL = 0xffffffffu;

__device__ __forceinline__ int smaller(int a, int b) { return a < b ? a : b; }
__device__ __forceinline__ u32 permuted(u32 a, u32 b, u32 selectors) {
  u32 d;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(selectors));
  return d;
}
__device__ __forceinline__ float power(float x) {
  float d;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ float logarithm(float x) {
  float d;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(d) : "f"(x));
  return d;
}
__device__ __forceinline__ float wide(u32 half) {
  float d;
  asm("cvt.f32.f16 %0, %1;" : "=f"(d) : "h"((u16)half));
  return d;
}
__device__ __forceinline__ u32 narrow(float low, float high) {
  u32 d;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
  return d;
}
__device__ __forceinline__ u32 transposed(u32 a) {
  u32 d;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(d) : "r"(a));
  return d;
}
__device__ __forceinline__ void multiply(float* d, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
}
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
// Eight codes of 4 bits as the bytes that they stand for, which are selectors: see kernels/triton/codebook.py.
__device__ __forceinline__ void look_up(u32 codes, u32* out) {
  u32 select = codes & 0x77777777u, half = ((codes >> 1) & 0x44444444u) | 0x32103210u;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const u32 low = permuted(0xd0c2b198u, 0xfbf1e7dcu, select), high = permuted(0x24190f05u, 0x684f3e30u, select);
    out[j] = permuted(low, high, half);
    select >>= 16;
    half >>= 16;
  }
}
// What a thread has copied into shared memory since is a group; it waits for all groups but so many.
__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int GROUPS>
__device__ __forceinline__ void await() {
  asm volatile("cp.async.wait_group %0;" ::"n"(GROUPS) : "memory");
}
// Sums of some keys and of later ones, rounded as tl.fma does.
__device__ __forceinline__ float join(float sum, float old, float added, float by) {
  return __fmaf_rn(sum, old, __fmul_rn(added, by));
}
