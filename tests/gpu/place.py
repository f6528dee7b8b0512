"""Where these tests run: on a CUDA device, or, to try the tests themselves, on the CPU in Triton's interpreter."""

from __future__ import annotations

import torch

from truekv.kernels.triton.interpreter import INTERPRETED

ON_DEVICE = torch.cuda.is_available() and not INTERPRETED
DEVICE = "cuda" if ON_DEVICE else "cpu"
OPTIONS = {"device": DEVICE} if ON_DEVICE else {"device": DEVICE, "kernel_backend": "triton"}
"""Of an LLM on the Triton kernels."""
CAPTURED = "triton" if ON_DEVICE else "native"
"""The kernels of tests that capture: an interpreter's launches are not seen by what records on a CPU."""
