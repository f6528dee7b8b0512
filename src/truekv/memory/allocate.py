"""From a plan to tensors: every layer's memory, as many bytes as were planned."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.spec import Paged, Recurrent, Stateless
from truekv.formats.frame import frame_for
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.lazy import torch
    from truekv.core.protocols import LayerMemory
    from truekv.core.spec import LayerSpec, ModelSpec
    from truekv.formats.frame import Frame
    from truekv.kernels.table import Kernels
    from truekv.memory.plan import LayerPlan, MemoryPlan

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

    def memory(index: int, layer: LayerSpec, planned: LayerPlan) -> LayerMemory:
        name = f"layer {index}"
        match layer:
            case Paged(fields=fields):
                chosen = tuple(
                    frame_for(each, frames.get((index, field.name))).to(device)
                    for field, each in zip(fields, planned.formats, strict=True)
                )
                return PagedLayer(
                    name,
                    layer,
                    planned.formats,
                    chosen,
                    kernels,
                    pages=plan.pages,
                    page_tokens=plan.page_tokens,
                    poison=poison,
                    check_finite=check_finite,
                    device=device,
                )
            case Recurrent():
                return StateLayer(
                    name,
                    layer,
                    kernels,
                    slots=plan.slots,
                    checkpoints=plan.checkpoints,
                    drafts=plan.drafts,
                    dtype=plan.dtype,
                    poison=poison,
                    check_finite=check_finite,
                    device=device,
                )
            case Stateless():
                return None

    pairs = list(zip(spec.layers, plan.layers, strict=True))
    if plan.draft_layers:
        pairs += zip(spec.draft_layers, plan.draft_layers, strict=True)
    memories = tuple(memory(index, *pair) for index, pair in enumerate(pairs))
    return memories[: len(spec.layers)], memories[len(spec.layers) :]
