"""The folder is the registry: what a package offers is what its files define."""

from __future__ import annotations

import difflib
import functools
import importlib
from pathlib import Path
from typing import TypeVar

from truekv.core.errors import Refused

T = TypeVar("T")


@functools.cache
def members(package: str, attribute: str) -> dict[str, object]:
    """Return {module name: its `attribute`} for every module of a package that defines it."""
    folders = importlib.import_module(package).__path__
    # Only sources: a shared library beside them would pass for an extension module.
    names = {file.stem for folder in folders for file in Path(folder).glob("*.py")} - {"__init__"}
    found: dict[str, object] = {}
    for name in sorted(names):
        value = getattr(importlib.import_module(f"{package}.{name}"), attribute, None)
        if value is not None:
            found[name] = value
    return found


def choose(kind: str, name: str, offered: dict[str, T]) -> T:
    """Return offered[name], or refuse and name the nearest thing that exists."""
    if name in offered:
        return offered[name]
    near = difflib.get_close_matches(name, offered, n=1, cutoff=0.5)
    hint = f"did you mean '{near[0]}'?" if near else f"use one of {', '.join(sorted(offered))}"
    raise Refused(f"unknown {kind} '{name}': {hint}")
