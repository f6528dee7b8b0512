"""The reference kernels: plain torch in float32, written to be read."""
