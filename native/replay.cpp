// Calls that were recorded, made again in their order: the arguments point to the same buffers, whose contents changed.
#include <cstdint>

extern "C" __attribute__((visibility("default"))) void truekv_replay(int64_t count, void (*const* operations)(const void*),
                                                                     const void* const* arguments) {
  for (int64_t i = 0; i < count; i++) operations[i](arguments[i]);
}
