"""Tests that need a CUDA device: without one they are skipped, and the summary counts them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from truekv.kernels.triton.interpreter import INTERPRETED

_HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    ready = torch.cuda.is_available() and not INTERPRETED
    for item in items:
        if _HERE in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not ready:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device: make gpu runs these tests there"))
