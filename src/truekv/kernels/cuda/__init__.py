"""Kernels in CUDA C++, where Triton does not keep up with memory: rows of 4 and 3 bits, latent rows. Hopper alone."""
