"""Calibration on small random checkpoints: what it measures, what it writes, and what it refuses."""

from __future__ import annotations

import json
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import add_tokenizer, save_dense, save_hybrid
from safetensors.torch import load_file, save_file

from truekv.core.batch import Chunk
from truekv.core.errors import Corrupted, Refused
from truekv.core.spec import Paged
from truekv.engine.run import Runner
from truekv.formats.choice import choose_formats
from truekv.formats.frame import load_frames
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint
from truekv.serve.assemble import design
from truekv.serve.calibrate import run
from truekv.trust import calibrate as module
from truekv.trust.calibrate import AGREEMENT, MIN_PROMPTS, calibrate
from truekv.trust.observe import Session, places

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from truekv.core.protocols import Model
    from truekv.trust.calibrate import Calibration

DECODE = 4


def prompts_of(count: int = 30, length: int = 100, seed: int = 0) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(300) for _ in range(length)] for _ in range(count)]


def measure(model: Model, prompts: list[list[int]], **changes: Any) -> Calibration:
    given: dict[str, Any] = {"dtype": "float32", "source": "test", "decode": DECODE, **changes}
    return calibrate(model, prompts, **given)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return add_tokenizer(save_dense(tmp_path_factory.mktemp("dense")))


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_hybrid(tmp_path_factory.mktemp("hybrid"))


@pytest.fixture(scope="module")
def measured(hybrid: Path) -> Calibration:
    return measure(Checkpoint.open(str(hybrid)).load("float32"), prompts_of(), weights="digest")


def changed(source: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Model:
    """Load a copy of a checkpoint with other weights."""
    target.mkdir()
    (target / "config.json").write_text((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    change(tensors)
    save_file(tensors, target / "model.safetensors", {"format": "pt"})
    return Checkpoint.open(str(target)).load("float32")


def test_every_paged_field_gets_a_frame_that_says_where_it_comes_from(hybrid: Path, measured: Calibration) -> None:
    spec = Checkpoint.open(str(hybrid)).architecture.spec
    assert set(measured.frames) == set(places(spec)) == {(3, "k"), (3, "v")}
    provenance = measured.frames.provenance
    assert (provenance.source, provenance.weights, provenance.prompts) == ("test", "digest", 30)
    assert set(provenance.layers) == {"layers.3.k", "layers.3.v"}
    for source in measured.sources:
        # 25 of the 30 prompts take part in the fit, each with its 100 tokens and those decoded; 5 are held out.
        assert source.rows == 25 * (100 + DECODE)
        assert 1 <= source.agreement <= AGREEMENT
        assert min(source.amax) > 0
        assert source.static[0] == pytest.approx(2 * max(source.amax) / 448, rel=1.0)
        assert source.subnormal < 0.01
    for frame in measured.frames.values():
        assert frame.scale is not None
        assert bool((frame.scale > 0).all())


def test_the_centre_is_the_mean_of_what_an_arena_stores(hybrid: Path) -> None:
    model = Checkpoint.open(str(hybrid)).load("float32")
    prompts = prompts_of()
    found = measure(model, prompts, decode=1)
    # Read back by another road: the bytes of a float32 cache after the same prompts, fitted ones only.
    first, second, _ = module._divide(prompts, 0)
    formats = [chosen or () for chosen in choose_formats(model.spec, "f32", "", "float32")]
    arena = Arena(model.spec, plan(model.spec, formats, max_model_len=128), select(model.spec, formats))
    total = torch.zeros(2, 2, 64, dtype=torch.float64)
    for prompt in first + second:
        held = arena.open()
        (logits,) = Runner(model, arena).step([Chunk(held, prompt)], [1])
        assert isinstance(logits, torch.Tensor)
        Runner(model, arena).step([Chunk(held, [int(logits.argmax())])], [0])
        layer = arena.layers[3]
        pages = layer.data[held.pages].view(torch.float32).reshape(len(held.pages), 2, 2, 32, 64)
        rows = pages.permute(1, 2, 0, 3, 4).reshape(2, 2, -1, 64)[:, :, :101]
        total += rows.double().sum(2)
        arena.close(held)
    for place, name in enumerate("kv"):
        centre = found.frames[3, name].centre
        assert centre is not None
        torch.testing.assert_close(centre.double(), total[place] / (25 * 101), atol=1e-5, rtol=1e-5)


def test_the_same_seed_measures_the_same(hybrid: Path, measured: Calibration) -> None:
    again = measure(Checkpoint.open(str(hybrid)).load("float32"), prompts_of(), weights="digest")
    for place, frame in measured.frames.items():
        other = again.frames[place]
        assert frame.scale is not None
        assert other.scale is not None
        assert torch.equal(frame.scale, other.scale)
    assert again.sources == measured.sources


def test_too_little_or_dummy_prompts_are_refused(hybrid: Path) -> None:
    model = Checkpoint.open(str(hybrid)).load("float32")
    with pytest.raises(Refused, match=f"at least {MIN_PROMPTS} different prompts, and got 1"):
        measure(model, prompts_of(1) * 50)
    with pytest.raises(Refused, match="has only 1 different ones: dummy tokens measure garbage"):
        measure(model, [*prompts_of(), [0] * 256])
    with pytest.raises(Refused, match=r"put only \d+ rows into layer 3, but a scale needs 1024"):
        measure(model, prompts_of(24, 12))
    with pytest.raises(Refused, match="take 516 positions, but the checkpoint has 512"):
        measure(model, [*prompts_of(), list(range(300)) + list(range(212))])


def _rare_giant(tensors: dict[str, torch.Tensor]) -> None:
    """Make token 7 the only one that reaches one large column of a value projection."""
    embedding = tensors["model.embed_tokens.weight"]
    embedding[:, 0] = 0
    embedding[7, 0] = 50 * embedding[7].norm()
    tensors["model.layers.0.self_attn.v_proj.weight"][:, 0] = 20


def test_halves_that_disagree_are_refused_and_name_the_layer(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = changed(dense, tmp_path / "giant", _rare_giant)
    prompts = [[token if token != 7 else 8 for token in prompt] for prompt in prompts_of()]
    prompts[3][50] = 7
    seed = next(seed for seed in range(9) if all(prompts[3] != held for held in module._divide(prompts, seed)[2]))
    with pytest.raises(Refused, match=r"two halves of the prompts disagree by [\d.]+x on the scale of layer 0 field v"):
        measure(model, prompts, seed=seed, ends=frozenset({7}))
    # Without the check the poisoned scale would pass: the check is what stops it.
    monkeypatch.setattr(module, "AGREEMENT", float("inf"))
    sources = {
        (item.layer, item.field): item for item in measure(model, prompts, seed=seed, ends=frozenset({7})).sources
    }
    assert sources[0, "v"].agreement > AGREEMENT


def test_held_out_rows_beyond_the_range_are_refused(dense: Path, tmp_path: Path) -> None:
    model = changed(dense, tmp_path / "giant", _rare_giant)
    prompts = [[token if token != 7 else 8 for token in prompt] for prompt in prompts_of()]
    prompts[3][50] = 7
    seed = next(seed for seed in range(99) if prompts[3] in module._divide(prompts, seed)[2])
    with pytest.raises(Refused, match=r"held-out numbers of layer 0 field v lie beyond the range that was measured"):
        measure(model, prompts, seed=seed, ends=frozenset({7}))


def test_a_head_that_never_changes_has_no_scale(dense: Path, tmp_path: Path) -> None:
    model = changed(dense, tmp_path / "dead", lambda tensors: tensors["model.layers.1.self_attn.v_proj.weight"].zero_())
    with pytest.raises((Refused, Corrupted), match="layer 1 field v"):
        measure(model, prompts_of())


def test_watching_changes_nothing(hybrid: Path) -> None:
    model = Checkpoint.open(str(hybrid)).load("float32")
    assert isinstance(model.spec.layers[3], Paged)
    prompt = prompts_of(1)[0]
    session = Session(model, "float32", 128, frozenset(), DECODE)

    class Nothing:
        def see(self, rows_THD: torch.Tensor, queries_TQD: torch.Tensor | None) -> None: ...

    arena = session._arena
    plain, watched = arena.open(), arena.open()
    runner = Runner(model, arena)
    (expected,) = runner.step([Chunk(plain, prompt)], [8])
    arena.layers = module_watch(model, arena, Nothing())
    (found,) = runner.step([Chunk(watched, prompt)], [8])
    assert isinstance(expected, torch.Tensor)
    assert isinstance(found, torch.Tensor)
    assert torch.equal(found, expected)


def module_watch(model: Model, arena: Arena, sink: Any) -> Any:
    from truekv.trust.observe import watch

    return watch(model.spec, arena.layers, dict.fromkeys(places(model.spec), sink))


def _lines(path: Path, count: int = 30) -> Path:
    rng = random.Random(1)
    words = ["harbour", "copper", "seven", "window", "2024", "river", "if x:", "return", "blue", "tomorrow"]
    lines: list[object] = []
    for place in range(count):
        text = " ".join(rng.choice(words) for _ in range(14))
        lines.append(text if place % 3 else [{"role": "user", "content": text}])
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_the_command_writes_frames_that_make_a_calibrated_format_run(
    dense: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from truekv.core.options import EngineOptions

    output, prompts = tmp_path / "frames.safetensors", _lines(tmp_path / "prompts.jsonl")
    options = EngineOptions(kv_cache_dtype="kv4", max_model_len=64, kv_cache_frames=str(output))
    with pytest.raises(Refused, match="truekv calibrate"):
        design(str(dense), EngineOptions(kv_cache_dtype="kv4", max_model_len=64))
    done = run(
        str(dense),
        prompts=str(prompts),
        output=str(output),
        export=f"modelopt={tmp_path / 'out'}",
        seed=0,
        as_json=True,
    )
    assert done == 0
    told = json.loads(capsys.readouterr().out)
    assert told["written"][0] == str(output)
    assert [(item["layer"], item["field"]) for item in told["layers"]] == [(0, "k"), (0, "v"), (1, "k"), (1, "v")]
    checkpoint = Checkpoint.open(str(dense))
    frames = load_frames(output, checkpoint.architecture.spec)
    assert frames.provenance.weights == checkpoint.digest
    assert set(design(str(dense), options).frames) == set(frames)
    scales = load_file(tmp_path / "out" / "kv_cache_scales.safetensors")
    assert scales["model.layers.1.self_attn.v_proj.v_scale"].item() == pytest.approx(told["layers"][3]["static"][1])


def test_the_command_refuses_before_it_loads_the_model(
    dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Checkpoint, "load", lambda *_: pytest.fail("weights were loaded"))

    def refuse(match: str, **changes: Any) -> None:
        given: dict[str, Any] = {"prompts": None, "output": None, "export": None, "seed": 0, "as_json": True, **changes}
        with pytest.raises(Refused, match=match):
            run(str(dense), **given)

    refuse("cannot be written; name a file in a directory that can be with --output", output=str(tmp_path / "no" / "f"))
    refuse("must be LAYOUT=DIRECTORY", export="modelopt")
    refuse("did you mean 'modelopt'", export=f"modelop={tmp_path}")
    refuse("would change the checkpoint", export=f"modelopt={dense}")
    refuse("which is not a file", prompts=str(tmp_path / "none.jsonl"))
    (tmp_path / "bad.jsonl").write_text('"fine"\n{"messages": \n')
    refuse(r"bad\.jsonl:2 is not valid JSON", prompts=str(tmp_path / "bad.jsonl"))
    (tmp_path / "roles.jsonl").write_text('[{"role": "king", "content": "x"}]\n')
    refuse("role 'king'", prompts=str(tmp_path / "roles.jsonl"))
