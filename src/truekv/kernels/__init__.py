"""How: every multiplication. The reference is the specification; faster kernels must agree with it."""
