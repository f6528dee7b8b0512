"""Small random models and the command line, shared by the tests of this folder."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from command_line import CommandLine
from random_models import add_tokenizer, save_dense, save_hybrid

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dense model with a tokenizer and a chat template."""
    return add_tokenizer(save_dense(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="session")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GDN hybrid with a tokenizer and a chat template."""
    return add_tokenizer(save_hybrid(tmp_path_factory.mktemp("hybrid")))


@pytest.fixture
def truekv(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> CommandLine:
    """Run a command and return what it printed."""
    return CommandLine(capsys, monkeypatch)
