"""What is kept for steps is at least what they allocate, and the schedule makes no step that takes more."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import triton
from random_models import save_hybrid, save_latent

from truekv.engine import activations
from truekv.engine.activations import Parts
from truekv.kernels.cuda import paged as cuda
from truekv.kernels.triton import tiles

if TYPE_CHECKING:
    from collections.abc import Callable

SCRIPT = Path(__file__).parent / "peak.py"
CONFIGS = SCRIPT.parents[1] / "configs"
SAVED: dict[str, Callable[[Path], Path]] = {"small gdn": save_hybrid, "small mla": save_latent}
# Each kind of layer in the widths of a released model: attention with and without a gate, latent, both recurrences,
# experts of three kinds, and heads of guesses over a dense layer and over experts.
RELEASED = (
    "qwen3.6-27b",
    "qwen3.6-35b-a3b",
    "granite-4.0-h-tiny",
    "nemotron-3-nano-30b-a3b",
    "deepseek-v2-lite",
)


@pytest.mark.parametrize("name", [*SAVED, *RELEASED])
def test_what_is_kept_for_steps_is_at_least_what_torch_allocates(name: str, tmp_path: Path) -> None:
    config = SAVED[name](tmp_path) / "config.json" if name in SAVED else CONFIGS / f"{name}.json"
    folders = os.pathsep.join((str(SCRIPT.parents[2] / "src"), str(SCRIPT.parents[1])))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": folders}
    command = [sys.executable, "-W", "ignore", SCRIPT, config]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    passes = json.loads(done.stdout)
    assert passes["sums of attention"]["sizes"] >= 40, "all that there are"
    for what, found in passes.items():
        kept, steps = found["kept"], found["steps"]
        assert len(steps) >= 4
        shares = {step: taken / kept["step"] for step, taken in steps.items()}
        shares |= {part: found[part] / kept[part] for part in ("captured", "recordings") if part in found}
        assert min(shares.values()) > 0, (what, shares)
        assert max(shares.values()) <= 1, (what, shares)
        # And not many times as much, or the cache would lack it.
        if name in RELEASED:
            assert max(shares[step] for step in steps) > 0.25, (what, shares)


def test_spans_are_those_of_the_kernels() -> None:
    assert activations.SPAN == tiles.SPAN
    assert max(tiles._QUERIES) == activations.TILE == cuda._TILE
    for group in (1, 4, 6, 16, 128):
        for longest in (1, 4, 10, 64, 500):
            for pages in (1, 16, 17, 1000, 8192):
                most = 0
                for queries in tiles._QUERIES:
                    span = tiles.span_keys(triton.cdiv(group * longest, queries))
                    most = max(most, triton.cdiv(pages * 32, span))
                assert Parts(group, 32).of(7, longest, pages) == 7 * most


def told(**changes: Any) -> activations.Activations:
    from truekv.core.config import Config
    from truekv.formats.choice import choose_formats
    from truekv.memory.plan import plan
    from truekv.models.weights import understand

    asked: dict[str, Any] = {"max_model_len": 262_144, "max_num_seqs": 64, "drafts": 0} | changes
    tokens = asked.pop("tokens", 2048)
    architecture = understand(Config(json.loads((CONFIGS / "qwen3.6-27b.json").read_text())))
    formats = choose_formats(architecture.spec, "int8", "", "bfloat16")
    planned = plan(architecture.spec, formats, dtype="bfloat16", scratch=1, **asked)
    return activations.activations(architecture, planned, tokens, captured=True)


def test_more_of_anything_takes_more() -> None:
    base = told()
    assert told(tokens=4096).step > base.step + 2048 * 200_000
    assert told(max_num_seqs=128).step > base.step
    assert told(max_model_len=32_768).captured < base.captured
    assert told(drafts=3).captured > base.captured
    assert told(drafts=3).parts.most > 3 * base.parts.most
    # 24 heads of 256 columns, 512 spans of 64 tokens and of a short prompt's.
    assert base.parts.most == 512 * (63 + 64 // 6)
    assert base.step > 4 * 24 * 258 * base.parts.most
