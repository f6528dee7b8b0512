"""Where a model runs: on the CPU, or on one CUDA device."""

from __future__ import annotations

from typing import Literal

from truekv.core.errors import Refused
from truekv.core.lazy import torch

Device = Literal["auto", "cuda", "cpu"]
"""auto is a CUDA device where torch sees one, else the CPU."""


def choose_device(asked: Device) -> torch.device:
    """Return the device that was asked for; Refused for a CUDA device where torch sees none."""
    there = asked != "cpu" and torch.cuda.is_available()
    if asked == "cuda" and not there:
        raise Refused(
            f"device is cuda, but torch {torch.__version__} sees no CUDA device here; use device cpu, or install a "
            "CUDA build of torch and its driver"
        )
    # With its index, as tensors name it.
    return torch.device("cuda", torch.cuda.current_device()) if there else torch.device("cpu")
