"""From a plan to tensors: every layer's memory, as many bytes as were planned."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

from truekv.core.spec import Paged, Recurrent, Stateless
from truekv.formats.frame import frame_for
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.lazy import torch
    from truekv.core.protocols import CacheFormat, LayerMemory
    from truekv.core.spec import LayerSpec, ModelSpec
    from truekv.formats.frame import Frame
    from truekv.kernels.table import Kernels
    from truekv.memory.plan import MemoryPlan

    Frames = Mapping[tuple[int, str], Frame]
    Memories = tuple[LayerMemory, ...]


def allocate(
    spec: ModelSpec,
    plan: MemoryPlan,
    kernels: Kernels,
    frames: Frames,
    *,
    poison: bool,
    check_finite: bool,
    device: torch.device,
) -> tuple[Memories, Memories]:
    """Return the memories of the layers, and of the draft layers as far as they are planned."""
    common: _Common = {"poison": poison, "check_finite": check_finite, "device": device}
    pairs = list(zip(spec.layers, plan.layers, strict=True))
    if plan.draft_layers:
        pairs += zip(spec.draft_layers, plan.draft_layers, strict=True)
    memories = tuple(
        _memory(index, layer, planned.formats, plan, kernels, frames, common)
        for index, (layer, planned) in enumerate(pairs)
    )
    return memories[: len(spec.layers)], memories[len(spec.layers) :]


class _Common(TypedDict):
    """What every layer's memory is told."""

    poison: bool
    check_finite: bool
    device: torch.device


def _memory(
    index: int,
    layer: LayerSpec,
    formats: tuple[CacheFormat, ...],
    plan: MemoryPlan,
    kernels: Kernels,
    frames: Frames,
    common: _Common,
) -> LayerMemory:
    name = f"layer {index}"
    match layer:
        case Paged(fields=fields):
            chosen = tuple(
                frame_for(each, frames.get((index, field.name))).to(common["device"])
                for field, each in zip(fields, formats, strict=True)
            )
            sizes = {"pages": plan.pages, "page_tokens": plan.page_tokens}
            return PagedLayer(name, layer, formats, chosen, kernels, **sizes, **common)
        case Recurrent():
            counts = {"slots": plan.slots, "checkpoints": plan.checkpoints, "drafts": plan.drafts}
            return StateLayer(name, layer, kernels, **counts, dtype=plan.dtype, **common)
        case Stateless():
            return None
