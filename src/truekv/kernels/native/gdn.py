"""The gated delta rule on the CPU, one call per layer and step: see kernels/reference/gdn.py and native/gdn.cpp."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from truekv.core.lazy import torch
from truekv.kernels.native.library import run
from truekv.kernels.native.timeline import Timeline, address, channels, timeline

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step
    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent


class Gdn(ctypes.Structure):
    """Mirrors `Gdn` of native/gdn.cpp."""

    _fields_ = (
        ("step", Timeline),
        *((name, ctypes.c_void_p) for name in ("beta", "decay", "beta_log", "decay_log", "state", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "key_heads", "key_dim", "value_dim")),
    )


def scan(
    layer: Recurrent,  # noqa: ARG001 (every size is read off the tensors)
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    log: Mapping[str, torch.Tensor],
    step: Step,
) -> torch.Tensor:
    """Return float32 [T, H, V]; arguments and meaning are those of kernels/reference/gdn.py."""
    conv_TC = channels(inputs["conv"])
    beta_TH, decay_TH = (inputs[name].float().contiguous() for name in ("beta", "decay"))
    _, heads, key_dim, value_dim = state["state"].shape
    keys = (conv_TC.shape[1] - heads * value_dim) // 2
    out_THV = torch.empty(len(conv_TC), heads, value_dim)
    arguments = Gdn(
        timeline(conv_TC, weights, state["conv"], log["conv"], step),
        *(address(tensor) for tensor in (beta_TH, decay_TH, log["beta"], log["decay"], state["state"], out_THV)),
        *(heads, keys // key_dim, key_dim, value_dim),
    )
    run("gdn", arguments)
    return out_THV


SCAN: Final[ScanKernel] = scan
