"""Which grids a kernel is launched with."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from truekv.kernels.triton import paged

if TYPE_CHECKING:
    from types import ModuleType

    import pytest


class Watched:
    """Takes the grids with which a module launches a kernel."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, kernel: str, user: ModuleType = paged) -> None:
        self.grids: list[tuple[int, ...]] = []
        self._kernel = getattr(user, kernel)
        monkeypatch.setattr(user, kernel, self)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        self.grids.append(grid)
        return self._kernel[grid]
