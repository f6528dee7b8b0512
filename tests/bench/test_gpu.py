"""The GPU's bench runs from end to end on a CPU, with tiny sizes: what remains for a device are its numbers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from bench import gpu, gpu_decode, gpu_peers
from kernels.native.cache import fill, formats
from memory.toys import gqa

from truekv.kernels.reference import paged as reference
from truekv.kernels.triton.chunks import LONG
from truekv.kernels.triton.interpreter import INTERPRETED

TOY = gpu.Size("cpu", 1 << 12, 2, 2, (2,), LONG, (64,), (1, 2), 3, "float32")
CUT = {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 512, "head_dim": 64, "num_attention_heads": 4}
CUT |= {"num_key_value_heads": 2}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
LINEAR |= {"linear_value_head_dim": 16, "num_hidden_layers": 4}
TOYS: dict[str, dict[str, Any]] = {
    "dense-8b": gpu_decode.MODELS["dense-8b"] | CUT | {"num_hidden_layers": 2},
    "hybrid-9b": gpu_decode.MODELS["hybrid-9b"]
    | CUT
    | LINEAR
    | {"layer_types": [*["linear_attention"] * 3, "full_attention"]},
}


@pytest.mark.parametrize("quick", [True, False])
def test_all_of_it(tmp_path: Path, quick: bool) -> None:
    kept = gpu.Kept(tmp_path, tmp_path / "page.md")
    results = gpu.run(TOY, kept, TOYS, quick=quick)
    assert [json.loads(line) for line in (tmp_path / "gpu.jsonl").read_text().splitlines()] == results
    assert not [one for one in results if one["part"] == "missing"]
    launched = [one for one in results if one["part"] == "launch"]
    assert len(launched) == len(gpu.launches(TOY, quick=quick))
    prompts = [one["what"] for one in results if one["part"] == "prompt"]
    assert prompts == [f"{rule}, {way}" for rule in ("gdn", "mamba2") for way in ("in chunks", "token by token")]
    steps = [one for one in results if one["part"] == "decode"]
    assert {(one["model"], one["kv"]) for one in steps} == {(name, kv) for name in TOYS for kv in gpu.KINDS}
    assert {one["captured"] for one in steps} == {True, False}
    assert {one["drafts"] for one in steps if one["model"] == "hybrid-9b"} == {0, gpu_decode.DRAFTS}
    page = (tmp_path / "page.md").read_text()
    for one in launched:
        assert f"| {one['what']} |" in page
    assert "## A prompt through one recurrent layer" in page
    assert "## Decode" in page
    assert "## Sequences in 64 GiB" in page
    assert "## Left out" not in page


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device, which would be measured")
def test_without_triton_or_a_device_one_sentence_says_so() -> None:
    code = "import runpy, sys; sys.modules['triton'] = None; runpy.run_module('bench.gpu', run_name='__main__')"
    folder = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (2, "")
    assert done.stdout.startswith("bench.gpu: ")
    assert done.stdout.count("\n") == 1


def test_what_fails_is_told_and_costs_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "launches", lambda *_, **__: [("peer", ("flashinfer", TOY)), ("scan", ("gdn", 2, TOY))])
    missing, launched = gpu.measured(TOY, 1e9, quick=True)
    assert missing["why"] == "flashinfer is left out: the package flashinfer is not installed"
    assert launched["what"].startswith("gdn step")


def test_sequences_that_fit() -> None:
    """36 layers of 8 heads of 128 are 147,456 bytes a token in bf16, and in kv4 a quarter of that and its scales."""
    counts = {kv: gpu_decode.fits("dense-8b", kv, 64 << 30, 8192) for kv in ("bf16", "kv4")}
    assert counts == {"bf16": (64 << 30) // (147456 * 8192), "kv4": (64 << 30) // (36 * 16 * 66 * 8192)}


@pytest.mark.skipif(not INTERPRETED, reason="the kernels here are interpreted")
def test_the_gathered_pattern_computes_attention() -> None:
    cache = fill(gqa(2, 64), formats("kv4", "kv4"), [37, 20])
    step = cache.step([1, 1])
    (query,) = cache.queries(step, 3)
    key, value = cache.fields
    got = value.frame.output(gpu_peers.gathered(key.frame.query(query).contiguous(), cache.fields, 0.1, step))
    wanted = reference.attend((query,), cache.fields, 0.1, None, step)
    # Levels are in units of a row's scale on both sides.
    assert float((got - wanted).abs().max()) <= 1e-5 * float(wanted.abs().max())


def test_other_attention_gives_the_same() -> None:
    make = torch.Generator().manual_seed(0)
    query = torch.randn(2, 4, 1, 16, generator=make)
    k, v = (torch.randn(2, 2, 48, 16, generator=make) for _ in range(2))
    wanted = torch.softmax(query.unflatten(1, (2, 2)) @ k[:, :, None].mT / 4, -1) @ v[:, :, None]
    got = gpu_peers.sdpa(query, k, v)()
    assert isinstance(got, torch.Tensor)
    assert float((got - wanted.flatten(1, 2)).abs().max()) < 1e-5
