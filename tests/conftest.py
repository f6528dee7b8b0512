"""How much is tried: what fits into every run, or the whole campaign."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from collections.abc import Iterator

# Triton decides when it is imported whether its kernels run in the interpreter, and one process runs many files:
# here they all do, on the CPU. Only make gpu, which says 0, compiles them.
if os.environ.setdefault("TRITON_INTERPRET", "1") == "1":
    # The same tests everywhere: without this, device auto would leave the CPU where there is a GPU.
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

# Tests that name no number of their own scale with it: fifty times the default.
# A machine that is busy with something else has no bug.
settings.register_profile("unhurried", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("unhurried")
settings.register_profile("campaign", max_examples=50 * settings.default.max_examples)
_LEFT_OUT = pytest.StashKey[int]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--campaign", action="store_true", help="run the full products too (make campaign)")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "campaign: too long for every run; part of make campaign")
    config.addinivalue_line("markers", "gpu: needs a CUDA device; make gpu runs them there")
    config.stash[_LEFT_OUT] = 0
    if config.pluginmanager.hasplugin("xdist"):
        config.pluginmanager.register(_Workers(config))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--campaign"):
        return
    left_out = [item for item in items if item.get_closest_marker("campaign")]
    items[:] = [item for item in items if not item.get_closest_marker("campaign")]
    config.stash[_LEFT_OUT] = len(left_out)
    config.hook.pytest_deselected(items=left_out)


@pytest.hookimpl(wrapper=True)
def pytest_sessionfinish(session: pytest.Session) -> Iterator[None]:
    if output := getattr(session.config, "workeroutput", None):
        output["left_out"] = session.config.stash[_LEFT_OUT]
    yield


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for report in (*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")):
        for name, line in report.user_properties:
            if name == "summary" and report.when == "call":
                terminalreporter.write_line(str(line))
    if count := config.stash[_LEFT_OUT]:
        terminalreporter.write_line(f"{count} tests were left to make campaign")


class _Workers:
    """Carries the count of every worker's collection, which all have collected the same, to the one who prints it."""

    def __init__(self, config: pytest.Config) -> None:
        self.config = config

    @pytest.hookimpl(optionalhook=True)
    def pytest_testnodedown(self, node: Any) -> None:
        self.config.stash[_LEFT_OUT] = getattr(node, "workeroutput", {}).get("left_out", 0)
