// Which of the compiled instruction sets this machine can run.
#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#ifdef __x86_64__
bool avx512() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni") &&
         __builtin_cpu_supports("avx512vbmi");
}

// The tile registers are large, so Linux hands them out per process and on request. What it says is not yet believed: AMX is
// tried before it is chosen (src/truekv/kernels/native/trial.py).
bool amx() {
#ifdef EMULATED_TILES
  return true;
#endif
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned wanted = (1u << 25) | (1u << 24) | (1u << 22);  // products of bytes, tiles, products of bfloat16
  constexpr int request_permission = 0x1023, tile_data = 18;
  return (d & wanted) == wanted && syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}
#endif

}  // namespace

#ifdef EMULATED_TILES
// What the emulated tiles get wrong (`Broken` of tiles.h), so that tests see whether the trial of AMX notices.
extern "C" __attribute__((visibility("default"))) int truekv_broken_tiles;
int truekv_broken_tiles = 0;
#endif

// Names separated by spaces, the slowest first.
extern "C" __attribute__((visibility("default"))) const char* truekv_machine() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  if (!(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
        __builtin_cpu_supports("bmi2")))
    return "baseline";
  if (!avx512()) return "baseline avx2";
  if (!__builtin_cpu_supports("avx512bf16")) return "baseline avx2 avx512";
  return amx() ? "baseline avx2 avx512 avx512_bf16 amx" : "baseline avx2 avx512 avx512_bf16";
#else
  return "baseline";
#endif
}
