"""Mamba-2's rule on the CPU, one call per layer and step: see kernels/reference/mamba2.py and native/mamba2.cpp."""

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


class Mamba2(ctypes.Structure):
    """Mirrors `Mamba2` of native/mamba2.cpp."""

    _fields_ = (
        ("step", Timeline),
        *((name, ctypes.c_void_p) for name in ("dt", "dt_log", "A", "D", "state", "out")),
        *((name, ctypes.c_int64) for name in ("heads", "groups", "head_dim", "size")),
    )


def scan(
    layer: Recurrent,  # noqa: ARG001 (every size is read off the tensors)
    inputs: Mapping[str, torch.Tensor],
    weights: Mapping[str, torch.Tensor],
    state: Mapping[str, torch.Tensor],
    log: Mapping[str, torch.Tensor],
    step: Step,
) -> torch.Tensor:
    """Return float32 [T, H, P]; arguments and meaning are those of kernels/reference/mamba2.py."""
    conv_TE = channels(inputs["conv"])
    dt_TH, a_H, d_H = (x.float().contiguous() for x in (inputs["dt"], weights["A"], weights["D"]))
    _, heads, head_dim, size = state["state"].shape
    shared = (conv_TE.shape[1] - heads * head_dim) // 2
    out_THP = torch.empty(len(conv_TE), heads, head_dim)
    arguments = Mamba2(
        timeline(conv_TE, weights, state["conv"], log["conv"], step),
        *(address(tensor) for tensor in (dt_TH, log["dt"], a_H, d_H, state["state"], out_THP)),
        *(heads, shared // size, head_dim, size),
    )
    run("mamba2", arguments)
    return out_THP


SCAN: Final[ScanKernel] = scan
