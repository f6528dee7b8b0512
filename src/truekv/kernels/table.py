"""Which kernel runs each operation: chosen once at load, total for what was chosen, and counted."""

from __future__ import annotations

import importlib
import pkgutil
from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Protocol, cast

from truekv.core.errors import Refused
from truekv.core.folder import choose, members
from truekv.core.spec import Paged, Recurrent

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.lazy import torch
    from truekv.core.ops import Ops
    from truekv.core.protocols import CacheFormat, ScanKernel, Stored
    from truekv.core.spec import LayerSpec, ModelSpec

Formats = tuple["CacheFormat", ...]


class PagedKernels(Protocol):
    """What a backend's folder offers for paged layers: `paged.py` with these three functions."""

    def refusal(self, layer: Paged, formats: Formats) -> str | None:
        """Why these fields in these formats cannot run here, with what to use instead; None if they can."""
        ...

    def store(self, stored: Stored, rows: torch.Tensor, step: Step) -> None:
        """Encode rows [T, heads, dim] and write them to the step's pages and lines."""
        ...

    def attend(
        self,
        queries: tuple[torch.Tensor, ...],
        fields: tuple[Stored, ...],
        scale: float,
        window: int | None,
        step: Step,
    ) -> torch.Tensor:
        """Attend to stored rows; see kernels/reference/paged.py, which is the specification."""
        ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One kernel per operation. `calls` counts what ran, so a test can assert the path it meant to test."""

    backend: str
    paged: PagedKernels
    scans: Mapping[str, ScanKernel]
    ops: Ops
    rows: tuple[tuple[str, str], ...]
    calls: Counter[str] = field(default_factory=Counter[str], compare=False)

    def store(self, stored: Stored, rows: torch.Tensor, step: Step) -> None:
        """Write one field's rows [T, heads, dim] of the step."""
        self.calls[f"store[{stored.format.name}]"] += 1
        self.paged.store(stored, rows, step)

    def attend(
        self,
        queries: tuple[torch.Tensor, ...],
        fields: tuple[Stored, ...],
        scale: float,
        window: int | None,
        step: Step,
    ) -> torch.Tensor:
        """Return [T, query heads, value dim] for queries [T, query heads, dim], one per scored field."""
        self.calls[f"attend[{'/'.join(item.format.name for item in fields)}]"] += 1
        return self.paged.attend(queries, fields, scale, window, step)

    def scan(
        self,
        layer: Recurrent,
        inputs: Mapping[str, torch.Tensor],
        weights: Mapping[str, torch.Tensor],
        state: Mapping[str, torch.Tensor],
        log: Mapping[str, torch.Tensor],
        step: Step,
    ) -> torch.Tensor:
        """Run the layer's recurrent rule; see core.protocols.ScanKernel."""
        self.calls[f"scan[{layer.rule}]"] += 1
        return self.scans[layer.rule](layer, inputs, weights, state, log, step)

    def describe(self) -> tuple[tuple[str, str], ...]:
        """(operation with its formats and sizes, backend) for every operation the model will use."""
        return self.rows


def select(
    spec: ModelSpec, formats: Seq[Formats | None], draft_formats: Seq[Formats | None] = (), backend: str = "reference"
) -> Kernels:
    """Choose the kernels of a model, or refuse before anything is allocated.

    `formats` holds one tuple per layer of `spec.layers`, with one format per field of a paged
    layer and none otherwise; `draft_formats` likewise for `spec.draft_layers`, or nothing.
    """
    package = f"{__package__}.{choose('kernel backend', backend, _backends())}"
    paged = cast("PagedKernels", importlib.import_module(f"{package}.paged"))
    scans = cast("dict[str, ScanKernel]", members(package, "SCAN"))
    ops = cast("Ops", importlib.import_module(f"{package}.ops").OPS)
    rows: dict[str, str] = {}
    draft_layers = spec.draft_layers if draft_formats else ()
    for layers, chosen in ((spec.layers, formats), (draft_layers, draft_formats)):
        for index, (layer, names) in enumerate(zip(layers, chosen, strict=True)):
            for operation in _operations(layer, names or (), paged, scans, f"layer {index} of {spec.family}", backend):
                rows[operation] = backend
    return Kernels(backend, paged, MappingProxyType(scans), ops, tuple(rows.items()))


def _operations(
    layer: LayerSpec,
    formats: Formats,
    paged: PagedKernels,
    scans: Mapping[str, ScanKernel],
    where: str,
    backend: str,
) -> list[str]:
    if isinstance(layer, Paged):
        reason = paged.refusal(layer, formats)
        if reason is not None:
            raise Refused(f"{where}: {reason}")
        fields = [
            f"{item.name}={chosen.name} {item.heads}x{item.dim}"
            for item, chosen in zip(layer.fields, formats, strict=True)
        ]
        window = f", window {layer.window}" if layer.window is not None else ""
        return [f"store {text}" for text in fields] + [f"attend {', '.join(fields)}{window}"]
    if isinstance(layer, Recurrent):
        if layer.rule not in scans:
            raise Refused(
                f"{where}: the {backend} backend has no scan kernel for the rule '{layer.rule}'; "
                f"it has {', '.join(sorted(scans))}"
            )
        return [f"scan {layer.rule} {' '.join(f'{name}={size}' for name, size in layer.sizes)}".strip()]
    return []


def _backends() -> dict[str, str]:
    path = importlib.import_module(__package__ or "truekv.kernels").__path__
    return {module.name: module.name for module in pkgutil.iter_modules(path) if module.ispkg}
