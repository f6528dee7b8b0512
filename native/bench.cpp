// Reading memory and doing nothing else with it: what the machine can give, beside what the kernels take.
#include "export.h"
#include "simd.h"

struct RawRead {
  const void* data;
  int64_t bytes;  // rounded down to whole cache lines
  int32_t threads;
  uint64_t* result;  // xor of all 64-bit words, so that no load can be left out
};

namespace ISA {
namespace {

typedef uint64_t U64 __attribute__((vector_size(64), aligned(64), may_alias));

constexpr int64_t LINE = 64, BLOCK = 1 << 16;

// Eight accumulators, so that loads wait for memory and never for one another.
U64 read_lines(const char* from, int64_t lines) {
  U64 a[8] = {};
  int64_t i = 0;
  for (; i + 8 <= lines; i += 8)
    for (int j = 0; j < 8; j++) a[j] ^= load<U64>(from + (i + j) * LINE);
  for (; i < lines; i++) a[0] ^= load<U64>(from + i * LINE);
  for (int j = 1; j < 8; j++) a[0] ^= a[j];
  return a[0];
}

// Each thread streams through one contiguous share, as the hardware prefetchers like it.
void raw_read(const RawRead& a) {
  const int64_t lines = a.bytes / LINE, blocks = (lines + BLOCK / LINE - 1) / (BLOCK / LINE);
  uint64_t total = 0;
#pragma omp parallel for schedule(static) num_threads(a.threads) reduction(^ : total)
  for (int64_t block = 0; block < blocks; block++) {
    const int64_t first = block * (BLOCK / LINE);
    const int64_t count = lines - first < BLOCK / LINE ? lines - first : BLOCK / LINE;
    const U64 words = read_lines((const char*)a.data + first * LINE, count);
    for (int i = 0; i < 8; i++) total ^= words[i];
  }
  *a.result = total;
}

}  // namespace
}  // namespace ISA

EXPORT(raw_read, RawRead) { ISA::raw_read(*arguments); }
