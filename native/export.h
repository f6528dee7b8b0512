// The C ABI: an operation `op` is exported once per instruction set, as truekv_<op>_<isa>, and takes a pointer to its
// arguments, a plain structure that ctypes mirrors in truekv.kernels.native. truekv_<op>_size_<isa> is its size in bytes.
#pragma once

#define JOIN_(a, b, c, d) a##b##c##d
#define JOIN(a, b, c, d) JOIN_(a, b, c, d)

#define EXPORT(op, Arguments)                                                                                  \
  extern "C" __attribute__((visibility("default"))) int JOIN(truekv_, op, _size_, ISA)() { return sizeof(Arguments); } \
  extern "C" __attribute__((visibility("default"))) void JOIN(truekv_, op, _, ISA)(const Arguments* arguments)
