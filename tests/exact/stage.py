"""The checkpoints on disk and the oracle of each of them: what cases have in common."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING

from exact.checkpoints import save_model
from exact.oracle import Oracle
from exact.paths import options, play

from truekv import LLM
from truekv.serve.assemble import build

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from pathlib import Path


class Stage:
    """Saves each model once, and asks each oracle the same question once."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.apart: Callable[[], AbstractContextManager[None]] | None = None
        """What oracles compute in, where the code under test is changed and they must not be."""
        self._oracles: dict[tuple[str, str, str], Oracle] = {}

    def llm(
        self, model: str, path: frozenset[str], cache_format: str = "int8", dtype: str = "float32", pages: int = 0
    ) -> LLM:
        """A fresh LLM that takes a path; few pages where somebody is to lose them, many where some are to stay."""
        directory = self._directory / model
        if not directory.exists():
            directory.mkdir()
            save_model(model, directory)
        llm = LLM(str(directory), **options(path), dtype=dtype, kv_cache_dtype=cache_format)
        return resized(llm, pages or (8 if "preempted" in path else 24 if "prefix" in path else 16))

    def oracle(self, model: str, cache_format: str = "int8", dtype: str = "float32") -> Oracle:
        """What is true of a model in a format."""
        key = model, cache_format, dtype
        if key not in self._oracles:
            with self._apart():
                llm = self.llm(model, frozenset(), cache_format, dtype)
            self._oracles[key] = Oracle(llm, self._apart)
        return self._oracles[key]

    def _apart(self) -> AbstractContextManager[None]:
        return self.apart() if self.apart else nullcontext()

    def play(
        self, model: str, path: frozenset[str], cache_format: str = "int8", dtype: str = "float32"
    ) -> Counter[str]:
        """Serve the usual prompts along a path and compare everything; return how often what happened."""
        oracle = self.oracle(model, cache_format, dtype)
        return play(self.llm(model, path, cache_format, dtype), oracle, path)


def resized(llm: LLM, pages: int) -> LLM:
    """The same LLM with so many pages."""
    blueprint = llm._blueprint
    llm._blueprint = dataclasses.replace(blueprint, plan=dataclasses.replace(blueprint.plan, pages=pages))
    llm._engine = build(llm._blueprint)
    return llm
