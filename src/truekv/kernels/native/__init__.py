"""Native kernels for the CPU: one shared library, compiled once per instruction set."""
