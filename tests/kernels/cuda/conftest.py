"""What all tests of the CUDA kernels need; Triton's interpreter frames queries and merges spans here too."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from kernels.cuda.emulated import Emulated
from kernels.triton.conftest import _infinities_are_numbers

from truekv.kernels.cuda import paged, trial

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["_infinities_are_numbers"]


@pytest.fixture
def emulated(monkeypatch: pytest.MonkeyPatch) -> Emulated:
    found = Emulated()
    monkeypatch.setattr(paged, "load", found.load)
    monkeypatch.setattr(trial, "load", found.load)
    return found


@pytest.fixture(autouse=True)
def _nothing_is_allocated_clean() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode=before)
