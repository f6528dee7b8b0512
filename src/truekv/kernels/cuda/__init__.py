"""Kernels in CUDA C++ for what Triton cannot keep up with memory: attention over 4-bit rows on compute capability 9.0."""
