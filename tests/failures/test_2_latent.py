"""Failure 2: latent and rotary key are two fields with two scales, and one shared scale cannot be asked for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from truekv.core.errors import Corrupted, Refused
from truekv.formats.choice import choose_formats
from truekv.formats.frame import Frame, Provenance, load_frames, model_digest, save_frames
from truekv.serve.demo import latent
from truekv.serve.demo.stage import Stage
from truekv.trust.export import LAYOUTS, check
from truekv.trust.observe import places
from truekv.trust.verdict import judge

pytestmark = pytest.mark.xdist_group("mla")


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage("tiny-mla")


@pytest.mark.parametrize("seed", [0])
def test_the_case_ends_as_it_should(seed: int) -> None:
    case = latent.run(seed)
    assert case.reference.correct
    assert case.truekv.correct
    assert not case.naive.correct
    assert case.passed


@pytest.mark.parametrize("name", latent.FORMATS)
def test_truekv_follows_the_model_and_one_shared_scale_does_not(stage: Stage, name: str) -> None:
    """The last assertion is the mutant: what holds for two scales fails as soon as both fields share one."""
    questions = latent.draw_scenarios(stage, seed=3, count=2)
    gains = latent.latent_gains(stage.name)
    scale = latent.shared_scale(stage, gains, questions[0].prompt)

    def kl(arena: Any) -> float:
        return sum(stage.kl(arena, item.prompt, item.reference) or 0.0 for item in questions) / len(questions)

    bound = 0.05
    assert kl(stage.arena(name)) < bound
    assert not kl(latent.shared_arena(stage, gains, scale, sequences=1)) < bound


def test_the_naive_memory_rounds_latents_as_the_norm_leaves_them() -> None:
    """Unfolded, cast, folded again: with a scale of its own the latent comes back within fp8's precision."""
    stored: list[torch.Tensor] = []

    class Memory:
        def attend(self, queries: Any, rows: Any, scale: float, step: Any) -> torch.Tensor:
            del queries, scale, step
            stored.extend(rows)
            return rows[0]

    rows = torch.randn(50, 1, 64, generator=torch.Generator().manual_seed(0))
    gain = torch.full((64,), 0.03)
    shared = latent.SharedScale(Memory(), [gain, torch.ones(64)], scale=0.03 * 4 / 448)
    shared.attend((), (rows, rows * 100), 1.0, None)  # type: ignore[arg-type]
    torch.testing.assert_close(stored[0], rows.clamp(-4, 4), rtol=2**-4, atol=1e-4)
    # The rotary key, a thousand times larger, is clipped to the latent's range.
    assert float(stored[1].abs().max()) == pytest.approx(0.12, rel=0.01)


def test_every_name_gives_latent_and_rotary_key_a_frame_of_their_own(stage: Stage) -> None:
    fields = places(stage.spec)
    assert {name for _, name in fields} == {"latent", "rope"}
    formats = choose_formats(stage.spec, "fp8", "", "float32")
    for only in ("latent", "rope"):
        one = {place for place in fields if place[1] == only}
        verdict = judge(stage.spec, formats, one, model="m")
        assert verdict.answer == "calibrate"
        assert f"none for its {'rope' if only == 'latent' else 'latent'} rows" in verdict.reason


@pytest.mark.parametrize("asked", ["fp8/fp8/fp8", "kv4/kv4", "k8v4", "int8/q4_0", "fp8_shared", "fp8_ds_mla"])
def test_no_name_asks_for_a_shared_scale_or_a_rotary_key_below_eight_bits(stage: Stage, asked: str) -> None:
    with pytest.raises(Refused):
        choose_formats(stage.spec, asked, "", "float32")


def test_no_frame_file_holds_a_shared_scale(stage: Stage, tmp_path: Any) -> None:
    import json
    from dataclasses import asdict

    provenance = Provenance(model_digest(stage.spec), "test", "test", 24, 4096)
    metadata = {"version": "1", "provenance": json.dumps(asdict(provenance))}
    save_file({"layers.0.kv.scale": torch.full((1, 192), 0.3)}, tmp_path / "shared", metadata)
    with pytest.raises(Corrupted, match=r"'layers\.0\.kv\.scale' is not the frame of any cache field"):
        load_frames(tmp_path / "shared", stage.spec)
    # The latent's frame under the rotary key's name does not fit either.
    latent_frame = Frame(scale=torch.full((1, places(stage.spec)[0, "latent"].dim), 0.3))
    save_frames(tmp_path / "swapped", {(0, "rope"): latent_frame}, provenance)
    with pytest.raises(Corrupted, match=r"layers\.0\.rope\.scale"):
        load_frames(tmp_path / "swapped", stage.spec)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_with_one_scale_are_refused(stage: Stage, layout: str) -> None:
    with pytest.raises(Refused, match="one shared fp8 scale and no place for two"):
        check(layout, stage.spec, {}, {})
