"""`truekv doctor`: what this machine can run, whether the native library is there, and which kernels a model gets."""

from __future__ import annotations

import json as jsonlib
import os
import platform
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from truekv.core.lazy import torch
from truekv.kernels.native import library as native
from truekv.memory.plan import readable

if TYPE_CHECKING:
    from truekv.core.options import EngineOptions


@dataclass(frozen=True, slots=True)
class Machine:
    """Processor and threads."""

    architecture: str
    cores: int
    """That this process may use."""
    threads: int
    """That a kernel uses."""
    torch: str


@dataclass(frozen=True, slots=True)
class LibraryReport:
    """The native library, or why there is none."""

    path: str | None
    instruction_sets: tuple[str, ...]
    """Of the library's, those that this machine can run, the slowest first."""
    chosen: str | None
    problem: str | None
    """Why there is no library."""
    refused: str | None
    """Why the last of the instruction sets was tried and not chosen."""


@dataclass(frozen=True, slots=True)
class KernelRow:
    """One operation of a model and what runs it."""

    operation: str
    on: str
    """Formats, heads and dims."""
    backend: str
    instruction_set: str
    """triton, or torch, if the operation is neither native nor in CUDA C++."""


@dataclass(frozen=True, slots=True)
class Report:
    """All that `truekv doctor` prints."""

    machine: Machine
    library: LibraryReport
    model: str | None
    kernels: tuple[KernelRow, ...]
    step_bytes: int = 0
    """Of a GPU, kept for steps of the model."""


def run(model: str | None, options: EngineOptions, *, as_json: bool) -> int:
    """Print the report, with the kernels of a model if one is named; return the exit code."""
    report = examine(model, options)
    if as_json:
        sys.stdout.write(jsonlib.dumps(asdict(report), indent=1) + "\n")
    else:
        _show(report)
    return 0


def examine(model: str | None, options: EngineOptions) -> Report:
    """Look at the machine, the library and, for a model, at the kernel table. Allocates nothing."""
    machine = Machine(platform.machine(), len(os.sched_getaffinity(0)), torch.get_num_threads(), str(torch.__version__))
    library = _library()
    rows: tuple[KernelRow, ...] = ()
    steps = 0
    if model is not None:
        from truekv.serve.assemble import design

        blueprint = design(model, options)
        steps = blueprint.plan.step_bytes
        rows = tuple(_row(*described, library.chosen) for described in blueprint.kernels.describe())
    return Report(machine, library, model, rows, steps)


def _library() -> LibraryReport:
    try:
        found = native.library()
    except OSError as error:
        return LibraryReport(None, (), None, f"it cannot be loaded: {error}", None)
    if found is None:
        return LibraryReport(
            None,
            (),
            None,
            f"{native.NAME} is not beside truekv.kernels.native: there was no C++ compiler when truekv was installed; "
            "install one and install truekv again",
            None,
        )
    return LibraryReport(str(found.path), found.isas, found.isa, None, found.problem)


def _row(described: str, backend: str, chosen: str | None) -> KernelRow:
    operation, _, on = described.partition(" ")
    by = {"native": chosen, "triton": "triton", "cuda": "sm_90a"}.get(backend) or "torch"
    return KernelRow(operation, on, backend, by)


def _show(report: Report) -> None:
    from rich.console import Console
    from rich.table import Table

    # Piped, the table keeps its columns: nobody's terminal decides where they break.
    console = Console(width=None if sys.stdout.isatty() else 160, highlight=False)
    machine, library = report.machine, report.library
    cores = "1 core" if machine.cores == 1 else f"{machine.cores} cores"
    threads = "1 thread" if machine.threads == 1 else f"{machine.threads} threads"
    console.print(f"machine  {machine.architecture}, {cores}, {threads}, torch {machine.torch}")
    if library.problem is not None:
        console.print(f"library  none: {library.problem}", soft_wrap=True)
        console.print("         the reference kernels run, which are 50-100x slower")
    else:
        console.print(f"library  {library.path}", soft_wrap=True)
        console.print(
            f"runs     {', '.join(f'[{i}]' if i == library.chosen else i for i in library.instruction_sets)}",
            markup=False,
        )
        if library.refused is not None:
            console.print(f"         not {library.instruction_sets[-1]}, because {library.refused}", soft_wrap=True)
    if report.step_bytes:
        console.print(f"steps    {readable(report.step_bytes)} of the GPU are kept for what they compute")
    if not report.kernels:
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("operation", "on", "backend", "instruction set"):
        table.add_column(title, no_wrap=title != "on")
    for row in report.kernels:
        table.add_row(row.operation, row.on, row.backend, row.instruction_set)
    console.print()
    console.print(table)
