"""Kernels in CUDA C++, where Triton does not keep up with memory: 3- and 4-bit, q8_0 and latent rows. Hopper alone."""
