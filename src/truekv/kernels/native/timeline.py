"""A step as the native recurrent rules take it: see native/conv.h, whose structure this mirrors.

Legend: B rows, T new tokens, Q longest chunk, R log capacity, C convolved channels, K taps.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step

MAX_TAPS: Final = 8


class Timeline(ctypes.Structure):
    """Mirrors `Timeline` of native/conv.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("gather", "count", "certain", "replay", "slot")),
        *((name, ctypes.c_void_p) for name in ("inputs", "weights", "bias", "tail", "log")),
        *((name, ctypes.c_int64) for name in ("rows", "longest", "tokens", "stride", "channels", "taps", "drafts")),
        ("bf16", ctypes.c_int32),
    )


def timeline(
    inputs_TC: torch.Tensor,
    weights: Mapping[str, torch.Tensor],
    tail: torch.Tensor,
    log: torch.Tensor,
    step: Step,
) -> Timeline:
    """Describe a step's tokens; the caller keeps every argument alive.

    `inputs_TC`: rows of any stride; `weights`: "conv" [C, K] and optionally "conv_bias" [C]; `tail`:
    [slots, C, K - 1]; `log`: [slots, R, C]. Raises Refused unless all are float32 or all bfloat16.
    """
    taps_CK, bias_C = weights["conv"], weights.get("conv_bias")
    kind = inputs_TC.dtype
    same = kind == taps_CK.dtype == tail.dtype == log.dtype and (bias_C is None or bias_C.dtype == kind)
    if not same or kind not in {torch.bfloat16, torch.float32}:
        kinds = {tensor.dtype for tensor in (inputs_TC, taps_CK, tail, log, *([] if bias_C is None else [bias_C]))}
        raise Refused(
            f"the native convolution takes channels, taps and state in one dtype, float32 or bfloat16, not in "
            f"{', '.join(sorted(map(str, kinds)))}; load the model with another dtype or use the reference backend"
        )
    if taps_CK.shape[1] > MAX_TAPS:
        raise Refused(
            f"the native convolution has at most {MAX_TAPS} taps, not {taps_CK.shape[1]}; use the reference backend"
        )
    return Timeline(
        *(address(tensor) for tensor in (step.gather, step.count, step.certain, step.replay, step.slot)),
        inputs_TC.data_ptr(),
        *(None if tensor is None else address(tensor) for tensor in (taps_CK, bias_C, tail, log)),
        *step.gather.shape,
        *(len(inputs_TC), inputs_TC.stride(0), *taps_CK.shape, log.shape[1]),
        taps_CK.dtype == torch.bfloat16,
    )


def channels(inputs_TC: torch.Tensor) -> torch.Tensor:
    """Return the same numbers with each token's channels side by side; what is a slice of wider rows stays one."""
    return inputs_TC if inputs_TC.stride(1) == 1 else inputs_TC.contiguous()


def address(tensor: torch.Tensor) -> int:
    """Where a dense tensor lies."""
    assert tensor.is_contiguous()
    return tensor.data_ptr()
