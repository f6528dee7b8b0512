"""Kernels in CUDA C++, where Triton's do not keep up with memory: for rows of 4 bits and latent rows, on one device."""
