"""Kernels in CUDA C++, where Triton's do not keep up with memory: attention over 4-bit rows, for one kind of device."""
