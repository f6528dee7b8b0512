"""Without a GPU too: every tensor of a step lies where its model does, whatever step it is."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from random_models import save_dense, save_hybrid, save_latent, save_mamba

import truekv

SCRIPT = Path(__file__).parent / "placement.py"
SAVED = {"dense": save_dense, "gdn": save_hybrid, "mamba2": save_mamba, "mla": save_latent}
DRAFTING = Path(truekv.__file__).parent / "tiny" / "hybrid"


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("models")
    for name, save in SAVED.items():
        (root / name).mkdir()
        save(root / name)
    return [*(root / name for name in SAVED), DRAFTING]


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    folders = os.pathsep.join((str(SCRIPT.parents[2] / "src"), str(SCRIPT.parents[1])))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folders}
    command = [sys.executable, "-W", "ignore", SCRIPT, *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)


def test_whole_models_on_a_device_that_is_not_there(directories: list[Path]) -> None:
    done = run(*directories)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found["served"]) == 2 * len(directories)
    for name, served in found["served"].items():
        # A prompt runs as it is, and so does a short one that is no step of drafts; the others are replayed.
        assert (served["eager"], served["replays"]) == (1, 3), name
        prompt, nothing, token, drafts = served["logits"]
        assert [len(shapes) for shapes in served["logits"]] == [4] * 4
        assert [rows for rows, _ in nothing] == [0, 0, 0, 0]
        # Of the second sequence nobody reads any, and of the fourth the tokens are drawn where the logits are.
        assert [rows for rows, _ in prompt] == [rows for rows, _ in token] == [1, 0, 1, 0]
        assert [rows for rows, _ in drafts] == [4, 0, 4, 0]
        # And of the third the best alone.
        (whole, vocab), _, (best, few), _ = drafts
        assert (whole, best, few) == (4, 4, 7)
        assert vocab > few
        assert served["drafted"] == (name.split()[0] == DRAFTING.name)
    kernels = {"store_kernel", "query_kernel", "attend_kernel", "merge_kernel", "prepare", "carry", "multiply"}
    assert {*kernels, "span_kernel", "key_kernel", "_norm", "_norm_rotate"} <= {*found["launched"]}


def test_a_tensor_that_was_left_on_the_host_is_noticed(directories: list[Path]) -> None:
    done = run("misplaced", directories[0])
    assert done.returncode != 0
    assert "npy" in done.stderr
    assert "cpu" in done.stderr
