"""Any model in any format along any path: the same logits, stored rows and states as from nothing in one chunk."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from exact.checkpoints import MODELS, save_model
from exact.oracle import Oracle
from exact.paths import PATHS, TAKEN, Case, load, play

from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(library() is None, reason="the native library is not built")
FORMATS = ("bf16", "fp8", "int8", "kv4", "turboquant_3bit_nc", "q4_0")
DTYPES = ("float32", "bfloat16")
PRODUCT = [Case(*values) for values in __import__("itertools").product(MODELS, FORMATS, DTYPES, PATHS)]


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {name: save_model(name, tmp_path_factory.mktemp(name)) for name in MODELS}


@pytest.fixture(scope="session")
def oracles() -> dict[tuple[str, str, str], Oracle]:
    return {}


@pytest.mark.parametrize("case", PRODUCT, ids=str)
def test_a_path_changes_no_bit(
    case: Case, models: dict[str, Path], oracles: dict[tuple[str, str, str], Oracle]
) -> None:
    llm = load(models[case.model], case)
    oracle = oracles.setdefault((case.model, case.format, case.dtype), Oracle(llm))
    counts = play(llm, oracle, PATHS[case.path])
    assert llm._blueprint.kernels.backend == "native"
    for feature in PATHS[case.path]:
        assert TAKEN[feature](counts), f"{feature} was asked for and did not happen: {counts}"
