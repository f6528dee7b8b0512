"""Triton's interpreter computes with numpy, which warns where a device computes infinities without a word.

And memory that nobody has written is NaN.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING

import numpy as np
import pytest
import torch

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _infinities_are_numbers() -> Iterator[None]:
    with np.errstate(over="ignore", invalid="ignore", divide="ignore"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "All-NaN slice encountered", RuntimeWarning)
        yield


@pytest.fixture(autouse=True)
def _nothing_is_allocated_clean() -> Iterator[None]:
    """Memory that torch.empty returns is NaN: what the kernels leave to each other must have been written."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(mode=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    assert torch.empty(3).isnan().all()
    yield
    torch.use_deterministic_algorithms(mode=before)
