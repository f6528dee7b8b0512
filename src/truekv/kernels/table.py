"""Which kernel runs each operation: chosen once at load, total for what was chosen, and counted."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
import pkgutil
from collections import Counter
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Final, Protocol, TypeAlias, cast

from truekv.core.errors import Refused
from truekv.core.folder import choose, members
from truekv.core.lazy import torch
from truekv.core.spec import Paged, Recurrent
from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq
    from types import ModuleType

    from truekv.core.batch import Step
    from truekv.core.ops import Ops
    from truekv.core.protocols import CacheFormat, ScanKernel, Stored
    from truekv.core.sampling import Draw, Sampling
    from truekv.core.spec import LayerSpec, ModelSpec
    from truekv.kernels.cuda.kernel import Kind

Formats = tuple["CacheFormat", ...]
Layers: TypeAlias = "Seq[tuple[LayerSpec, Formats | None]]"
TRITON: Final = "triton"
CUDA: Final = "cuda"
NATIVE: Final = "native"
REFERENCE: Final = "reference"
_BASES: Final = {CUDA: TRITON}
"""Backends that run what they have no kernel for in another."""
_NOT_BUILT: Final = "no native library was built: install truekv again where there is a C++ compiler"


class PagedKernels(Protocol):
    """What a backend's folder offers for paged layers: `paged.py` with these three functions."""

    def refusal(self, layer: Paged, formats: Formats) -> str | None:
        """Why these fields in these formats cannot run here, with what to use instead; None if they can."""
        ...

    def store(self, fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
        """Take each field's rows [T, heads, dim] into its frame, encode them and write them to the step's lines.

        A row that is not finite raises Corrupted; where the step is being recorded it is written as NaN instead.
        """
        ...

    def attend(
        self,
        queries: tuple[torch.Tensor, ...],
        fields: tuple[Stored, ...],
        scale: float,
        window: int | None,
        step: Step,
    ) -> torch.Tensor:
        """Attend to stored rows with queries as the model made them, and return averages of such rows.

        See kernels/reference/paged.py, which is the specification.
        """
        ...


@dataclass(frozen=True, slots=True)
class Kernels:
    """One kernel per operation. `calls` counts what ran, so a test can assert the path it meant to test."""

    backend: str
    paged: PagedKernels
    scans: Mapping[str, ScanKernel]
    ops: Ops
    sampling: Sampling
    rows: tuple[tuple[str, str], ...]
    calls: Counter[str] = field(default_factory=Counter[str], compare=False)

    def store(self, fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
        """Write the rows [T, heads, dim] of one layer's fields; every field counts."""
        self.calls.update(f"store[{stored.format.name}]" for stored in fields)
        self.paged.store(fields, rows, step)

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

    def draw(self, draws: Seq[Draw]) -> list[int]:
        """Draw one token from each of some rows of logits; see core.sampling.Sampling."""
        self.calls["sample"] += 1
        return self.sampling.draw(draws)

    def candidates(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `draw` chooses from."""
        return self.sampling.candidates(draw)

    def logprobs(
        self, logits_NV: torch.Tensor, tokens: Seq[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the tokens and of the best ones."""
        self.calls["logprobs"] += 1
        return self.sampling.logprobs(logits_NV, tokens, count)

    def describe(self) -> tuple[tuple[str, str], ...]:
        """(operation with its formats and sizes, backend) for every operation the model will use."""
        return self.rows


def select(
    spec: ModelSpec,
    formats: Seq[Formats | None],
    draft_formats: Seq[Formats | None] = (),
    backend: str = "auto",
    device: torch.device | str = "cpu",
) -> Kernels:
    """Choose the kernels of a model, or refuse before anything is allocated.

    `formats` holds one tuple per layer of `spec.layers`, with one format per field of a paged
    layer and none otherwise; `draft_formats` likewise for `spec.draft_layers`, or nothing.
    `backend` names a folder beside this file, or is auto: triton on a CUDA device and native on the
    CPU, where it is there and refuses no layer, else reference; and in front of triton cuda, where
    it has a kernel for a layer and the device. A rule that the backend has no scan for runs in the
    reference.
    """
    layers = list(zip(spec.layers, formats, strict=True))
    if draft_formats:
        layers += zip(spec.draft_layers, draft_formats, strict=True)
    place = torch.device(device)
    kind = place.type
    chosen = _fastest(layers, place) if backend == "auto" else choose("kernel backend", backend, _backends())
    if reason := _missing(chosen, kind):
        raise Refused(f"{reason}, or use the reference backend")
    if chosen == CUDA and (reason := _untrusted(layers, place)):
        raise Refused(f"{reason}; use the triton backend")
    paged, base = _paged(chosen), _BASES.get(chosen, chosen)
    scans = {rule: (name, kernel) for name in (REFERENCE, base) for rule, kernel in _scans(name).items()}
    rows: dict[str, str] = {}
    for index, (layer, names) in enumerate(layers):
        where = f"layer {index} of {spec.family}"
        if isinstance(layer, Paged):
            if reason := _refusal(chosen, layer, names or ()):
                raise Refused(f"{where}: {reason}")
            *stores, attend = _paged_operations(layer, names or ())
            rows |= dict.fromkeys(stores, base)
            rows[attend] = chosen if chosen == base or _in_cuda([(layer, names)]) else base
        elif isinstance(layer, Recurrent):
            if layer.rule not in scans:
                raise Refused(
                    f"{where}: the {chosen} backend has no scan kernel for the rule '{layer.rule}'; "
                    f"it has {', '.join(sorted(scans))}"
                )
            sizes = " ".join(f"{name}={size}" for name, size in layer.sizes)
            rows[f"scan {layer.rule} {sizes}".strip()] = scans[layer.rule][0]
    kernels = MappingProxyType({rule: kernel for rule, (_, kernel) in scans.items()})
    sampler = _sampler(chosen)
    rows[f"sample vocab={spec.vocab_size}"] = sampler
    return Kernels(chosen, paged, kernels, _ops(base), _sampling(sampler), tuple(rows.items()))


def fastest_ops(device: torch.device | str = "cpu") -> Ops:
    """Return the operations of a device's fastest backend that is there, for a pass that stores rows as they are."""
    return _ops(_fastest((), torch.device(device)))


def fastest_sampling() -> Sampling:
    """Return how the fastest backend that is there draws tokens."""
    return _sampling(_sampler(NATIVE))


def _fastest(layers: Layers, device: torch.device) -> str:
    """Return the fast backend of a device if it can run every paged layer, else the reference."""
    fast = TRITON if device.type == "cuda" else NATIVE
    reason = _missing(fast, device.type)
    if reason is None:
        reasons = (_refusal(fast, layer, names or ()) for layer, names in layers if isinstance(layer, Paged))
        reason = next((text for text in reasons if text), None)
    if reason is not None:
        _say_slow(reason)
        return REFERENCE
    if fast == TRITON and _in_cuda(layers) and _cuda().runs_on(device):
        reason = _untrusted(layers, device)
        if reason is None:
            return CUDA
        _say_triton(reason)
    return fast


def _in_cuda(layers: Layers) -> list[Kind]:
    """Return the kinds of kernels in CUDA C++ that attend to some of the layers."""
    from truekv.kernels.cuda.paged import taken

    return [kind for layer, names in layers if isinstance(layer, Paged) for kind in taken(layer, names or ())]


def _untrusted(layers: Layers, device: torch.device) -> str | None:
    """Return why the kernels that these layers take are not used on a device, or None: they are tried there."""
    reasons = (_cuda().problem(kind, device) for kind in _in_cuda(layers))
    return next((text for text in reasons if text), None)


def _cuda() -> ModuleType:
    return importlib.import_module(f"{__package__}.{CUDA}.trial")


def _missing(backend: str, device: str) -> str | None:
    """Return why a backend cannot run on a kind of device, with what to do about it, or None."""
    if backend == NATIVE and device == "cuda":
        return "the native kernels run on the CPU alone: use device cpu or the triton backend"
    if backend == NATIVE and library() is None:
        return _NOT_BUILT
    if backend == CUDA and device != "cuda":
        return "the cuda kernels run on a CUDA device: use the native backend"
    if backend == TRITON and device == "cpu" and not _interpreted():
        return "the triton kernels run on a CUDA device, not on the CPU: use the native backend"
    if backend in {TRITON, CUDA} and importlib.util.find_spec("triton") is None:
        return "triton is not installed: install it"
    return None


def _interpreted() -> bool:
    return bool(importlib.import_module(f"{__package__}.{TRITON}.interpreter").INTERPRETED)


@functools.cache
def _say_slow(reason: str) -> None:
    logging.getLogger("truekv").warning("the reference kernels run, which are 50-100x slower, because %s", reason)


@functools.cache
def _say_triton(reason: str) -> None:
    logging.getLogger("truekv").warning("some rows are attended to in Triton, which takes longer, because %s", reason)


def _paged(backend: str) -> PagedKernels:
    return cast("PagedKernels", importlib.import_module(f"{__package__}.{backend}.paged"))


def _ops(backend: str) -> Ops:
    return cast("Ops", importlib.import_module(f"{__package__}.{backend}.ops").OPS)


def _sampler(backend: str) -> str:
    """Return the backend that draws tokens for another: logits lie on the host, whatever made them."""
    return REFERENCE if backend == REFERENCE or library() is None else NATIVE


def _sampling(backend: str) -> Sampling:
    return cast("Sampling", importlib.import_module(f"{__package__}.{backend}.sampling").SAMPLING)


def _scans(backend: str) -> dict[str, ScanKernel]:
    return cast("dict[str, ScanKernel]", members(f"{__package__}.{backend}", "SCAN"))


def _refusal(backend: str, layer: Paged, formats: Formats) -> str | None:
    return _paged(backend).refusal(layer, formats)


def _paged_operations(layer: Paged, formats: Formats) -> list[str]:
    fields = [
        f"{item.name}={chosen.name} {item.heads}x{item.dim}" for item, chosen in zip(layer.fields, formats, strict=True)
    ]
    window = f", window {layer.window}" if layer.window is not None else ""
    return [f"store {text}" for text in fields] + [f"attend {', '.join(fields)}{window}"]


def _backends() -> dict[str, str]:
    path = importlib.import_module(__package__ or "truekv.kernels").__path__
    return {module.name: module.name for module in pkgutil.iter_modules(path) if module.ispkg}
