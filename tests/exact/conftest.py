"""The models of this folder, saved once."""

from __future__ import annotations

import pytest
from exact.stage import Stage


@pytest.fixture(scope="session")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Stage:
    return Stage(tmp_path_factory.mktemp("exact"))
