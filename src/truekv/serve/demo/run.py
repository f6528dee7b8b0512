"""`truekv demo`: run the five failures and show what each method did."""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Final

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.serve.demo.case import Case, Outcome

# Imported when run: a refused --only must not pay for torch.
CASES: Final = {1: "calibration", 2: "latent", 3: "lowbit", 4: "pages", 5: "capture"}


def run(only: int | None, seed: int, *, as_json: bool) -> int:
    """Run all cases, or one; return 0 only if every one ended as it should."""
    if only is not None and only not in CASES:
        raise Refused(f"there is no case {only}; the cases are 1 to {len(CASES)}")
    numbers = list(CASES) if only is None else [only]
    cases = _execute(numbers, seed)
    passed = all(case.passed for case in cases)
    if as_json:
        print(json.dumps({"cases": [dataclasses.asdict(case) for case in cases], "passed": passed}, indent=1))  # noqa: T201 (the command's output)
    else:
        console = Console()
        for case in cases:
            _show(console, case)
        console.print(f"[bold]{sum(case.passed for case in cases)} of {len(cases)} failures ended[/bold]")
    return 0 if passed else 1


def _execute(numbers: list[int], seed: int) -> list[Case]:
    """Run the cases one after the other under a progress display (on stderr, where it disturbs no output)."""
    cases: list[Case] = []
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        for number in numbers:
            task = bar.add_task(f"case {number}: {CASES[number]}", total=None)
            case: Callable[[int], Case] = import_module(f"truekv.serve.demo.{CASES[number]}").run
            began = time.monotonic()
            cases.append(case(seed))
            bar.update(task, total=1, completed=1, description=f"case {number}: {time.monotonic() - began:.0f} s")
    return cases


def _show(console: Console, case: Case) -> None:
    mark = "[green]ended[/green]" if case.passed else "[red]NOT ended[/red]"
    console.print(f"\n[bold]{case.case}. {case.title}[/bold]  ({case.model})  {mark}")
    console.print(case.question, style="dim", markup=False)
    table = Table(box=None, pad_edge=False, show_header=True, header_style="dim")
    for name in ("", "right?", "KL", "answer"):
        table.add_column(name, overflow="fold")
    for label, outcome in (("reference", case.reference), ("naive", case.naive), ("truekv", case.truekv)):
        table.add_row(label, *_cells(outcome))
    console.print(table)
    for label, outcome in (("naive", case.naive), ("truekv", case.truekv)):
        if outcome.detail:
            console.print(f"{label}: {outcome.detail}", style="dim", markup=False)


def _cells(outcome: Outcome) -> tuple[str, str, str]:
    from rich.markup import escape

    right = "[green]yes[/green]" if outcome.correct else "[red]no[/red]"
    return right, "-" if outcome.kl is None else f"{outcome.kl:.2g}", escape(outcome.answer)
