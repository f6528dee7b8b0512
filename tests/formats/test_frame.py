"""Frames: attention inside equals attention outside, fitted ones spread hard keys, and files are checked."""

# Shape suffixes: T tokens, S stored tokens, H kv heads, Q query heads, D dim.

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from truekv.core.errors import Corrupted, Refused, TrueKVError
from truekv.core.spec import Field, ModelSpec, Paged, Recurrent, Slab, Stateless
from truekv.formats.choice import codecs
from truekv.formats.fit import FP8_TOP, HEADROOM, Statistics, fit, static_scale
from truekv.formats.frame import (
    VERSION,
    Frame,
    Provenance,
    frame_for,
    load_frames,
    model_digest,
    save_frames,
)
from truekv.trust.measure import attention_kl

if TYPE_CHECKING:
    from pathlib import Path

DIMS = (64, 80, 96, 128, 192, 256, 512)
STATE = Recurrent("gdn", (("heads", 2),), (Slab("state", (2, 4, 4), "float32"),), (Slab("k", (4,), "model"),))
ATTENTION = Paged((Field("k", 2, 64, "key"), Field("v", 2, 64, "value")))
MLA = Paged((Field("latent", 1, 128, "both"), Field("rope", 1, 64, "key", floor_bits=8)))
HYBRID = ModelSpec("any", 64, 100, 512, "bfloat16", (STATE, Stateless(), ATTENTION), draft_layers=(ATTENTION,))


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def hard_frame(heads: int, dim: int, *, rotated: bool) -> Frame:
    """A frame as hard keys need it: centres far from zero, scales over two to three decades."""
    return Frame(5 * noise(heads, dim, seed=1), noise(heads, dim, seed=2).exp(), rotated)


def attention(scores_QTS: torch.Tensor, values_SQD: torch.Tensor) -> torch.Tensor:
    return torch.einsum("qts,sqd->tqd", scores_QTS.softmax(-1), values_SQD)


def grouped(rows_SHD: torch.Tensor, queries: int) -> torch.Tensor:
    return rows_SHD.repeat_interleave(queries // rows_SHD.shape[1], 1)


@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("rotated", [False, True])
@pytest.mark.parametrize(("heads", "queries"), [(1, 1), (2, 6), (4, 4)])
def test_attention_in_the_frame_equals_attention_outside(dim: int, rotated: bool, heads: int, queries: int) -> None:
    key_frame = hard_frame(heads, dim, rotated=rotated)
    value_frame = replace(hard_frame(heads, dim, rotated=rotated), centre=noise(heads, dim, seed=9))
    assert key_frame.centre is not None
    assert key_frame.scale is not None
    k_SHD = noise(33, heads, dim, seed=3) * key_frame.scale + key_frame.centre
    assert value_frame.centre is not None
    assert value_frame.scale is not None
    v_SHD = noise(33, heads, dim, seed=4) * value_frame.scale + value_frame.centre
    q_TQD = noise(5, queries, dim, seed=5) / grouped(key_frame.scale[None], queries) / math.sqrt(dim)

    keys, values = grouped(k_SHD.double(), queries), grouped(v_SHD.double(), queries)
    exact = attention(torch.einsum("tqd,sqd->qts", q_TQD.double(), keys), values).float()
    inside_q, inside_k = key_frame.query(q_TQD), key_frame.rows(k_SHD)
    found = attention(
        torch.einsum("tqd,sqd->qts", inside_q, grouped(inside_k, queries)), grouped(value_frame.rows(v_SHD), queries)
    )
    # In units of each channel's own scale: float32 accuracy for the small channels too.
    error = (value_frame.output(found) - exact) / grouped(value_frame.scale[None], queries)
    assert float(error.abs().max()) < 1e-4
    # The same without a part of the frame would be wrong: the test can see each of them.
    assert not torch.allclose(found, exact, atol=1e-2)


@pytest.mark.parametrize("rotated", [False, True])
def test_one_latent_serves_as_key_and_as_value(rotated: bool) -> None:
    latent_frame, rope_frame = hard_frame(1, 128, rotated=rotated), hard_frame(1, 64, rotated=rotated)
    assert latent_frame.centre is not None
    assert latent_frame.scale is not None
    assert rope_frame.centre is not None
    assert rope_frame.scale is not None
    latent = noise(40, 1, 128, seed=6) * latent_frame.scale + latent_frame.centre
    rope = noise(40, 1, 64, seed=7) * rope_frame.scale + rope_frame.centre
    q_latent = noise(3, 8, 128, seed=8) / latent_frame.scale / 12
    q_rope = noise(3, 8, 64, seed=9) / rope_frame.scale / 12

    def scores(ql: torch.Tensor, qr: torch.Tensor, kl: torch.Tensor, kr: torch.Tensor) -> torch.Tensor:
        return torch.einsum("tqd,sd->qts", ql, kl[:, 0]) + torch.einsum("tqd,sd->qts", qr, kr[:, 0])

    exact = attention(scores(q_latent, q_rope, latent, rope), latent.expand(-1, 8, -1))
    inside = latent_frame.rows(latent)
    inner = scores(latent_frame.query(q_latent), rope_frame.query(q_rope), inside, rope_frame.rows(rope))
    found = latent_frame.output(attention(inner, inside.expand(-1, 8, -1)))
    assert torch.allclose(found, exact, rtol=1e-4, atol=1e-4 * float(latent_frame.scale.max()))


def test_a_frame_of_nothing_changes_no_bit() -> None:
    rows = noise(3, 2, 64)
    frame = Frame()
    assert frame.identity
    assert torch.equal(frame.rows(rows), rows)
    assert torch.equal(frame.query(rows), rows)
    assert torch.equal(frame.output(rows), rows)
    assert frame.rows(rows.bfloat16()).dtype == torch.float32


def test_the_format_decides_what_of_a_frame_applies() -> None:
    measured = Frame(torch.zeros(2, 64), torch.ones(2, 64))
    assert frame_for(codecs()["bf16"], measured).identity
    assert frame_for(codecs()["q4_0"], measured).identity
    without = frame_for(codecs()["int8"], None)
    assert without.rotated
    assert without.centre is None
    for name, rotated in (("int8", True), ("kv4", True), ("q4_0+hadamard", True), ("fp8_e4m3", False)):
        frame = frame_for(codecs()[name], measured)
        assert frame.scale is measured.scale
        assert frame.rotated is rotated


@pytest.mark.parametrize("name", ["int8", "kv4", "kv3"])
@pytest.mark.parametrize("keys", ["outliers", "offset"])
@pytest.mark.parametrize("seed", [0, 10])
def test_hard_keys_cost_no_more_than_gaussian_ones_in_the_fitted_frame(name: str, keys: Any, seed: int) -> None:
    codec = codecs()[name]
    easy = attention_kl(codec, "gaussian", seed=seed)
    hard = attention_kl(codec, keys, seed=seed)
    assert 0 < hard.mean <= 1.15 * easy.mean
    # Without the frame the rotation alone is several times worse: the frame is what the bar measures.
    assert attention_kl(codec, keys, measured=False, seed=seed).mean > 5 * easy.mean


def test_statistics_do_not_depend_on_how_rows_arrive() -> None:
    rows = 1e4 + noise(100, 2, 16) * torch.logspace(-2, 2, 16)
    whole, parts, other = Statistics(2, 16), Statistics(2, 16), Statistics(2, 16)
    whole.observe(rows)
    for part in rows[:60].split([1, 0, 19, 40]):
        parts.observe(part)
    other.observe(rows[60:].bfloat16().float() * 0 + rows[60:])
    parts.merge(other)
    parts.merge(Statistics(2, 16))
    assert parts.count == whole.count == 100
    exact = rows.double()
    for found in (whole, parts):
        assert torch.allclose(found.mean, exact.mean(0), rtol=1e-12)
        assert torch.allclose(found.spread, exact.std(0, correction=0), rtol=1e-8)
        assert torch.allclose(found.second_moment, exact.square().mean(0), rtol=1e-12)
        assert torch.equal(found.amax, exact.abs().amax((0, 2)))
        assert torch.equal(found.low, exact.amin(0))


def test_the_fitted_scale_balances_keys_against_queries() -> None:
    spread_k, spread_q = torch.logspace(-1, 1, 64), torch.linspace(0.5, 3, 64)
    keys, queries = Statistics(2, 64), Statistics(6, 64)
    keys.observe(noise(20000, 2, 64) * spread_k + 3)
    queries.observe(noise(5000, 6, 64, seed=1) * spread_q)
    frame = fit("key", keys, queries)
    assert frame.centre is not None
    assert frame.scale is not None
    assert torch.allclose(frame.centre, torch.full((2, 64), 3.0), atol=0.4)
    balanced = (spread_k / spread_q).sqrt()
    ratio = frame.scale / balanced
    assert torch.allclose(ratio, ratio.mean(-1, keepdim=True).expand_as(ratio), rtol=0.05)
    values = fit("value", keys)
    assert values.scale is not None
    ratio = values.scale / spread_k
    assert torch.allclose(ratio, ratio.mean(-1, keepdim=True).expand_as(ratio), rtol=0.05)


def test_fp8_has_twice_the_largest_number_seen_as_headroom() -> None:
    rows = noise(500, 2, 64) * torch.logspace(-3, 3, 64) + 50
    seen = Statistics(2, 64)
    seen.observe(rows)
    inside = fit("value", seen).rows(rows)
    assert torch.allclose(inside.abs().amax((0, 2)), torch.full((2,), FP8_TOP / HEADROOM), rtol=1e-4)
    assert torch.allclose(static_scale(seen), (rows.double().abs().amax((0, 2)) * 2 / 448), rtol=1e-12)


def test_channels_that_never_moved_get_a_usable_scale() -> None:
    rows = noise(100, 3, 16)
    rows[:, 0, 3] = 7.0  # one channel of a head
    rows[:, 1] = -2.0  # a whole head
    rows[:, 2] = 0.0
    seen = Statistics(3, 16)
    seen.observe(rows)
    frame = fit("key", seen, seen)
    assert frame.scale is not None
    assert bool((frame.scale > 0).all())
    assert bool(torch.isfinite(frame.rows(rows)).all())
    assert bool(torch.isfinite(frame.rows(rows + 1)).all())
    assert torch.allclose(frame.output(frame.rows(rows)), rows, atol=1e-5)


def test_fitting_refuses_what_it_cannot_know() -> None:
    seen = Statistics(2, 16)
    with pytest.raises(Refused, match="no row was observed"):
        fit("value", seen)
    seen.observe(noise(4, 2, 16))
    with pytest.raises(Refused, match="queries, which were not observed"):
        fit("key", seen)
    other = Statistics(3, 16)
    other.observe(noise(4, 3, 16))
    with pytest.raises(Refused, match="cannot share"):
        fit("key", seen, other)
    with pytest.raises(Refused, match=r"\[T, 2, 16\]"):
        seen.observe(noise(4, 2, 8))
    with pytest.raises(Refused, match="cannot take in"):
        seen.merge(Statistics(2, 8))
    with pytest.raises(Corrupted, match="NaN or infinity"):
        seen.observe(torch.full((1, 2, 16), math.nan))
    assert seen.count == 4


def measured_frames() -> dict[tuple[int, str], Frame]:
    frames = {(layer, name): hard_frame(2, 64, rotated=False) for layer in (2, 3) for name in ("k", "v")}
    frames[2, "v"] = Frame(None, torch.ones(2, 64))
    return frames


def provenance(spec: ModelSpec = HYBRID) -> Provenance:
    return Provenance(
        model_digest(spec), "some/model", "balanced", 32, 5000, {"layers.2.k": {"amax": [1.5, 2.0]}}, "ab"
    )


def test_frames_survive_a_file(tmp_path: Path) -> None:
    path = tmp_path / "frames.safetensors"
    save_frames(path, measured_frames(), provenance())
    found = load_frames(path, HYBRID)
    assert set(found) == set(measured_frames())
    assert len(found) == 4
    assert found.provenance == provenance()
    for place, frame in measured_frames().items():
        for part in ("centre", "scale"):
            before, after = getattr(frame, part), getattr(found[place], part)
            assert (before is None and after is None) or torch.equal(before, after)
    assert [file.name for file in tmp_path.iterdir()] == ["frames.safetensors"]


def test_frames_of_another_model_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "frames.safetensors"
    save_frames(path, measured_frames(), provenance())
    for other in (
        replace(HYBRID, family="other"),
        replace(HYBRID, layers=(ATTENTION, Stateless(), ATTENTION)),
        replace(HYBRID, layers=(STATE, Stateless(), MLA)),
        replace(HYBRID, draft_layers=()),
    ):
        with pytest.raises(Refused, match=r"measured on another model \('some/model'\)"):
            load_frames(path, other)
    # What does not touch the rows does not matter.
    assert load_frames(path, replace(HYBRID, max_positions=64, dtype="float32"))


def write(path: Path, change: dict[str, torch.Tensor | None], metadata: dict[str, str] | None = None) -> None:
    save_frames(path, measured_frames(), provenance())
    tensors: dict[str, Any] = load_file(path) | change
    about = {"version": str(VERSION), "provenance": json.dumps(asdict(provenance()))}
    save_file({name: value for name, value in tensors.items() if value is not None}, path, metadata or about)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"layers.2.k.scale": torch.ones(2, 32)}, r"of shape \(2, 32\), but this model needs float32 \(2, 64\)"),
        ({"layers.2.k.scale": torch.ones(2, 64, dtype=torch.float16)}, "torch.float16"),
        ({"layers.2.k.scale": torch.zeros(2, 64)}, "not positive"),
        ({"layers.2.k.scale": torch.full((2, 64), math.nan)}, "NaN or infinity"),
        ({"layers.2.k.centre": torch.full((2, 64), math.inf)}, "NaN or infinity"),
        ({"layers.0.k.scale": torch.ones(2, 64)}, "not the frame of any cache field"),
        ({"layers.2.q.scale": torch.ones(2, 64)}, "not the frame of any cache field"),
        ({"layers.2.k.rotation": torch.ones(2, 64)}, "not the frame of any cache field"),
        ({"model.norm.weight": torch.ones(2)}, "not the frame of any cache field"),
    ],
)
def test_numbers_that_are_no_frame_are_refused(tmp_path: Path, change: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "frames.safetensors"
    write(path, change)
    with pytest.raises(Corrupted, match=sentence):
        load_frames(path, HYBRID)


@pytest.mark.parametrize(
    ("metadata", "sentence"),
    [
        ({"version": "0", "provenance": "{}"}, "version 0"),
        ({"format": "pt"}, "version None"),
        ({"version": str(VERSION)}, "where its frames come from"),
        ({"version": str(VERSION), "provenance": "[1"}, "where its frames come from"),
        ({"version": str(VERSION), "provenance": "[]"}, "where its frames come from"),
        ({"version": str(VERSION), "provenance": '{"model": "x"}'}, "where its frames come from"),
    ],
)
def test_a_file_that_does_not_say_where_it_comes_from_is_refused(
    tmp_path: Path, metadata: dict[str, str], sentence: str
) -> None:
    path = tmp_path / "frames.safetensors"
    write(path, {}, metadata)
    with pytest.raises(TrueKVError, match=sentence):
        load_frames(path, HYBRID)


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "frames.safetensors"
    with pytest.raises(Refused, match="not a file"):
        load_frames(path, HYBRID)
    save_frames(path, measured_frames(), provenance())
    whole = path.read_bytes()
    for damaged in (b"", b"GGUF", whole[:100], whole[:-4], b"\xff" * 8 + whole[8:]):
        path.write_bytes(damaged)
        with pytest.raises(Corrupted, match="cannot be read as frames"):
            load_frames(path, HYBRID)
