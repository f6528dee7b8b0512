"""Every guard fires on what it is for, says where, and is silent on what is right."""

from __future__ import annotations

import dataclasses
import itertools
import json
import logging
import math
import re
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from truekv import Corrupted
from truekv.core.batch import Chunk
from truekv.engine.run import Runner
from truekv.engine.tokens import Tokenizer
from truekv.formats.choice import choose_formats, codecs
from truekv.formats.frame import Frame, load_frames
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint
from truekv.serve.assemble import FRAMES_FILE, locate
from truekv.serve.messages import ChatTemplate
from truekv.tiny import tasks
from truekv.trust.measure import divergence
from truekv.trust.sentinel import KEPT, KL, ROWS, SHADOW_SHARE, Measured, Sentinel, ceiling, error_limit, measure

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from truekv.core.batch import Step
    from truekv.core.protocols import Stored
    from truekv.trust.sentinel import Finding

QUIET = [("tiny-hybrid", "int8"), ("tiny-dense", "kv4"), ("tiny-mla", "fp8_e4m3")]
LOOP = [20, 21, 22, 23, 24]


def prompts(directory: Path) -> list[list[int]]:
    """Three conversations of a task that the embedded models were trained for."""
    tokenizer, template = Tokenizer.open(directory), ChatTemplate.open(directory)
    assert tokenizer is not None
    assert template is not None
    texts = [template.render(item.messages, None, None) for item in tasks.examples("fact", "heldout", 3, 3)]
    return [tokenizer.encode(text, add_special_tokens=False) for text in texts]


class Bench:
    """A model and its arena, stepped greedily with an observer, as an engine does it."""

    def __init__(self, model: str, kv_cache_dtype: str, scale: tuple[int, str, float] | None = None) -> None:
        """Load a model; `scale`: (layer, field, factor) makes a measured scale wrong."""
        checkpoint = Checkpoint.open(locate(model))
        spec = checkpoint.architecture.spec
        frames = dict(load_frames(checkpoint.directory / FRAMES_FILE, spec))
        if scale is not None:
            layer, field, factor = scale
            frame = frames[layer, field]
            frames[layer, field] = Frame(frame.centre, frame.scale * factor)
        formats = [chosen or () for chosen in choose_formats(spec, kv_cache_dtype, "", "float32")]
        layout = plan(spec, formats, max_model_len=512, max_num_seqs=4)
        kernels = select(spec, formats)
        self.model = checkpoint.load("float32", kernels.ops)
        self.arena = Arena(spec, layout, kernels, frames, poison=True)
        self.prompts = prompts(checkpoint.directory)

    def sentinel(self, every: int = 1) -> Sentinel:
        return Sentinel(self.model, self.arena, every)

    def paged(self) -> list[tuple[int, PagedLayer]]:
        return [(index, layer) for index, layer in enumerate(self.arena.layers) if isinstance(layer, PagedLayer)]

    def logits(self, tokens: list[int]) -> torch.Tensor:
        held = self.arena.open()
        found = list(Runner(self.model, self.arena).teacher_force(held, tokens, itertools.repeat(16)))
        self.arena.close(held)
        return torch.cat(found)

    def play(self, observer: Sentinel | None, count: int = 12, asked: list[list[int]] | None = None) -> Any:
        """Answer prompts with `count` tokens each, all in one step at a time; the requests are 100, 101 ..."""
        running = {
            100 + row: (self.arena.open(), list(prompt), len(prompt))
            for row, prompt in enumerate(asked or self.prompts)
        }
        tokens = {request: item[1] for request, item in running.items()}
        for _ in range(count):
            chunks = [Chunk(held, known[held.position :]) for held, known, _ in running.values()]
            if observer is not None:
                observer.before_step(list(running), sum(len(chunk.tokens) for chunk in chunks))
            found = Runner(self.model, self.arena).step(chunks, [1] * len(chunks))
            for request, logits in zip(list(running), found, strict=True):
                held, known, prompt = running[request]
                if isinstance(logits, Corrupted):
                    assert observer is not None
                    observer.fault(request, logits)
                    observer.end(request)
                    self.arena.close(running.pop(request)[0])
                    continue
                known.append(int(logits[-1].argmax()))
                if observer is not None:
                    observer.after_tokens(request, known, prompt)
        for request, (held, _, _) in running.items():
            self.arena.close(held)
            if observer is not None:
                observer.end(request)
        return tokens


@pytest.fixture(scope="module")
def hybrid() -> Bench:
    return Bench("tiny-hybrid", "int8")


def only(sentinel: Sentinel, guard: str) -> Finding:
    """The last finding, where all are of one guard."""
    assert {finding.guard for finding in sentinel.findings} == {guard}
    return sentinel.findings[-1]


@pytest.mark.parametrize(("model", "chosen"), QUIET)
def test_right_formats_raise_nothing_and_answers_stay_as_they_are(model: str, chosen: str) -> None:
    bench = Bench(model, chosen)
    sentinel = bench.sentinel()
    assert bench.play(sentinel, 16) == bench.play(None, 16)
    assert not sentinel.findings
    report = json.loads(json.dumps(sentinel.report()))
    assert report["looks"] == report["steps"] == 16
    assert {(item["layer"], item["field"]) for item in report["fields"]} == {
        (index, stored.field.name) for index, layer in bench.paged() for stored in layer.stored
    }
    for item in report["fields"]:
        codec = bench.arena.plan.layers[item["layer"]].formats[0]
        assert 0 < item["error"] < error_limit(codec, 64)
        assert 0 < item["excess"] < 1
        assert item["saturated"] == 0
    assert sentinel._shadow.compare(bench.prompts[0]).mean < KL
    bench.arena.check()


def test_a_scale_that_is_too_small_saturates() -> None:
    layer, field = 1, "latent"
    bench = Bench("tiny-mla", "fp8_e4m3", (layer, field, 1 / 64))
    sentinel = bench.sentinel()
    bench.play(sentinel)
    found = only(sentinel, "saturation")
    assert {(item.layer, item.field) for item in sentinel.findings} == {("layer 1", field)}
    assert found.value > found.limit
    assert found.requests == (100, 101, 102)
    assert found.sentence.startswith("layer 1: 'latent' has ")
    assert "beyond 448, where fp8_e4m3 ends" in found.sentence
    assert sentinel.report()["findings_total"]["saturation"] > 0


def test_a_scale_that_is_too_large_loses_what_it_stores() -> None:
    bench = Bench("tiny-hybrid", "fp8_e4m3", (3, "v", 1 << 16))
    sentinel = bench.sentinel()
    bench.play(sentinel)
    found = only(sentinel, "error")
    assert (found.layer, found.field) == ("layer 3", "v")
    assert found.value > found.limit == error_limit(codecs()["fp8_e4m3"], 64)
    assert "measure its frame again with 'truekv calibrate', or use --kv-cache-map 3=bf16" in found.sentence


def test_unrotated_blocks_are_too_coarse_for_hard_keys() -> None:
    bench = Bench("tiny-dense", "q8_0")
    sentinel = bench.sentinel()
    bench.play(sentinel)
    found = only(sentinel, "error")
    assert "k" in {finding.field for finding in sentinel.findings}
    # However close they are, the two figures are told apart.
    for item in sentinel.findings:
        ((error, limit),) = re.findall(r"error of (\S+), more than the (\S+) that", item.sentence)
        assert float(error) > float(limit)
    # Nothing was measured for such rows, so measuring again is no remedy.
    assert "calibrate" not in found.sentence


class Faulty:
    """Paged kernels that change a byte of one request's new rows, as a broken kernel or memory would."""

    def __init__(self, paged: Any, flip: Callable[[Stored], tuple[int, int]], owner: int) -> None:
        self.paged = paged
        self.flip = flip
        self.owner = owner
        self.attend = paged.attend

    def store(self, fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
        self.paged.store(fields, rows, step)
        (stored,) = (item for item in fields if item.field.name in {"v", "latent"})
        token = int((step.owner == self.owner).nonzero()[0])
        byte, mask = self.flip(stored)
        stored.data[step.page[token], byte + int(step.line[token]) * stored.format.planes(stored.field.dim)[0]] ^= mask


@pytest.mark.parametrize(
    ("model", "chosen", "mask"),
    [
        ("tiny-hybrid", "int8", 0x40),
        ("tiny-hybrid", "bf16", 0x10),
        ("tiny-hybrid", "kv4", 0x80),
        ("tiny-mla", "fp8_e4m3", 0x40),
        ("tiny-hybrid", "q8_0", 0x40),
    ],
)
def test_a_changed_byte_breaks_the_bound_and_names_whose_it_is(model: str, chosen: str, mask: int) -> None:
    bench = Bench(model, chosen)
    index, layer = bench.paged()[-1]
    # The last byte of a row's codes: of the first head, on the line that is stored.
    layer.kernels = dataclasses.replace(
        layer.kernels,
        paged=Faulty(
            layer.kernels.paged, lambda stored: (stored.start + stored.format.planes(stored.field.dim)[0] - 1, mask), 1
        ),
    )
    sentinel = bench.sentinel()
    bench.play(sentinel, len(bench.paged()))
    found = next(item for item in sentinel.findings if item.guard == "bound")
    assert not [item for item in sentinel.findings if item.guard == "error" and item.field == found.field]
    assert found.layer == f"layer {index}"
    assert found.field in {"v", "latent"}
    assert found.requests == (101,)
    assert found.value > 1
    assert {item.layer for item in sentinel.findings if item.guard == "bound"} == {found.layer}


def test_a_scale_that_became_nan_in_memory_is_the_largest_error(hybrid: Bench) -> None:
    _, layer = hybrid.paged()[0]
    kernels, sentinel = layer.kernels, hybrid.sentinel()

    def store(fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
        kernels.paged.store(fields, rows, step)
        for stored in fields:
            stored.data[step.page] = 0xFF

    rows = tuple(torch.ones(2, stored.field.heads, stored.field.dim) for stored in layer.stored)
    step = hybrid.arena.reserve([Chunk(held := hybrid.arena.open(), [5, 6])])
    layer.kernels = dataclasses.replace(kernels, paged=SimpleNamespace(store=store, attend=kernels.paged.attend))
    try:
        sentinel.before_step([100], 2)
        layer.attend((rows[0],), rows, 1.0, step)
    finally:
        layer.kernels = kernels
        hybrid.arena.close(held)
    found = next(item for item in sentinel.findings if item.guard == "bound")
    assert found.value == math.inf
    # JSON has no infinity, and a report of one must still be readable.
    assert "Infinity" not in json.dumps(sentinel.report())


class Poisoned:
    """A paged layer whose answer is NaN where one request has a token of 9, as a faulty kernel's would be."""

    def __init__(self, layer: PagedLayer) -> None:
        self.layer = layer

    def attend(self, queries: Any, rows: Any, scale: float, step: Step) -> torch.Tensor:
        out = self.layer.attend(queries, rows, scale, step)
        return out.masked_fill((step.tokens == 9)[:, None, None], math.nan)


def test_logits_that_are_not_finite_are_counted_and_the_others_go_on(
    hybrid: Bench, caplog: pytest.LogCaptureFixture
) -> None:
    layers = hybrid.arena.layers
    index, layer = hybrid.paged()[-1]
    asked = [[5, 6, 7], [5, 9, 7], [8, 5, 6]]
    sentinel = hybrid.sentinel()
    hybrid.arena.layers = (*layers[:index], Poisoned(layer), *layers[index + 1 :])
    try:
        with caplog.at_level(logging.INFO, "truekv"):
            tokens = hybrid.play(sentinel, 4, asked)
    finally:
        hybrid.arena.layers = layers
    found = only(sentinel, "finite")
    assert (found.level, found.requests) == ("error", (101,))
    assert [len(known) for known in tokens.values()] == [7, 3, 7]
    assert sentinel.report()["findings_total"]["finite"] == 1
    assert [record.levelname for record in caplog.records] == ["ERROR"]
    hybrid.arena.check()
    assert hybrid.arena.held_pages == 0


def test_the_layer_of_rows_that_are_not_finite_is_named(hybrid: Bench) -> None:
    index, layer = hybrid.paged()[0]
    step = hybrid.arena.reserve([Chunk(held := hybrid.arena.open(), [5, 6])])
    rows = tuple(torch.full((2, stored.field.heads, stored.field.dim), math.nan) for stored in layer.stored)
    with pytest.raises(Corrupted) as raised:
        layer.attend((rows[0],), rows, 1.0, step)
    hybrid.arena.close(held)
    sentinel = hybrid.sentinel()
    sentinel.fault(7, raised.value)
    found = only(sentinel, "finite")
    assert (found.layer, found.requests) == (f"layer {index}", (7,))
    assert "request 7 was ended: layer" in found.sentence


def test_every_layer_is_looked_at_first_and_one_of_them_now_and_then() -> None:
    bench = Bench("tiny-dense", "int8")
    sentinel = bench.sentinel(every=10)
    layers = [layer for _, layer in bench.paged()]
    assert len(layers) > 1
    armed: list[int | None] = []
    for _ in range(40):
        sentinel.before_step([1], 1)
        marked = [place for place, layer in enumerate(layers) if layer.probe is not None]
        assert len(marked) <= 1, "nothing was stored in the step before, as in a draft head that was not asked"
        armed.append(marked[0] if marked else None)
    looks = [place for place in armed if place is not None]
    assert [step for step, place in enumerate(armed) if place is not None] == [*range(len(layers)), 10, 20, 30]
    assert looks == [turn % len(layers) for turn in range(len(looks))]


def test_a_long_step_is_sampled_from_end_to_end(hybrid: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    picks: list[torch.Tensor] = []

    def noted(*given: Any) -> Measured:
        picks.append(given[-1])
        return measure(*given)

    monkeypatch.setattr("truekv.trust.sentinel.measure", noted)
    hybrid.play(hybrid.sentinel(), 1, [list(range(10, 310))])
    assert all(len(some) <= ROWS for some in picks)
    assert picks[0][0] == 0
    assert picks[0][-1] >= 300 - 300 / ROWS - 10


def test_tokens_that_only_fill_a_step_up_are_not_looked_at(hybrid: Bench) -> None:
    _, layer = hybrid.paged()[0]
    rows = tuple(torch.ones(3, stored.field.heads, stored.field.dim) for stored in layer.stored)
    step = hybrid.arena.reserve([Chunk(held := hybrid.arena.open(), [5, 6, 7])])
    layer.attend((rows[0],), rows, 1.0, step)
    others = tuple(values * torch.tensor([1.0, 1.0, 9.0])[:, None, None] for values in rows)
    for line, guards in ((-1, set[str]()), (2, {"bound"})):
        sentinel = hybrid.sentinel()
        sentinel.before_step([100], 3)
        assert layer.probe is not None
        layer.probe(layer.stored, others, dataclasses.replace(step, line=torch.tensor([0, 1, line])))
        assert {found.guard for found in sentinel.findings} == guards
        assert layer.probe is None
    hybrid.arena.close(held)


def test_the_ceiling_of_a_format_is_where_its_numbers_end() -> None:
    formats = codecs()
    assert ceiling(formats["fp8_e4m3"], 64) == 448
    assert ceiling(formats["fp8_e5m2"], 64) == 57344
    assert ceiling(formats["int8"], 64) == 127 * 65504
    assert ceiling(formats["bf16"], 64) == pytest.approx(3.3895e38, rel=1e-3)


def test_a_replay_measures_what_two_engines_would_differ_by() -> None:
    bench = Bench("tiny-hybrid", "kv4")
    tokens = bench.prompts[0] + LOOP * 4
    exact, stored = Bench("tiny-hybrid", "f32").logits(tokens), bench.logits(tokens)
    expected = divergence(exact, stored)
    found = bench.sentinel()._shadow.compare(tokens)
    assert expected.mean > 1e-4
    assert found.mean == pytest.approx(expected.mean, rel=1e-3)
    assert found.largest == pytest.approx(expected.largest, rel=1e-3)
    assert found.top1 == expected.top1


def test_a_replay_is_of_the_last_tokens_in_memory_of_its_own(hybrid: Bench) -> None:
    shadow = hybrid.sentinel()._shadow
    tokens = [5 + place % 90 for place in range(400)]
    before = hybrid.arena.free_pages, hybrid.arena.free_slots
    assert shadow.compare(tokens) == shadow.compare(tokens[-shadow.window :])
    assert shadow.compare(tokens) != shadow.compare(tokens[: shadow.window])
    assert (hybrid.arena.free_pages, hybrid.arena.free_slots) == before
    layout, kernels, frames = shadow._exact
    arena = Arena(hybrid.model.spec, layout, kernels, frames)
    assert arena.nbytes == shadow.nbytes == hybrid.sentinel().report()["replay_bytes"]


@pytest.mark.parametrize(
    ("model", "chosen", "level"), [("tiny-hybrid", "int8", "info"), ("tiny-dense", "q8_0", "warning")]
)
def test_an_answer_that_repeats_itself_is_replayed_once(
    model: str, chosen: str, level: str, caplog: pytest.LogCaptureFixture
) -> None:
    bench = Bench(model, chosen)
    sentinel = bench.sentinel()
    prompt = bench.prompts[0]
    tokens = list(prompt)
    with caplog.at_level(logging.INFO, "truekv"):
        for token in LOOP * 20:
            tokens.append(token)
            sentinel.after_tokens(4, tokens, len(prompt))
    found = only(sentinel, "repetition")
    assert len(sentinel.findings) == len(caplog.records) == 1
    assert (found.level, found.requests, found.limit) == (level, (4,), KL)
    assert (found.value > KL) == (level == "warning")
    assert ("--kv-cache-dtype bf16" in found.sentence) == (level == "warning")
    report = sentinel.report()
    assert (report["repetitions"], report["replays"]) == (1, 1)


def test_replays_are_a_small_share_of_what_is_computed(hybrid: Bench) -> None:
    sentinel = hybrid.sentinel()
    answer = LOOP * 10
    for request in range(3):
        sentinel.after_tokens(request, answer, 0)
    assert (sentinel.report()["repetitions"], sentinel.report()["replays"]) == (3, 1)
    sentinel.before_step([9], SHADOW_SHARE * 2 * len(answer) - 1)
    sentinel.after_tokens(3, answer, 0)
    assert sentinel.report()["replays"] == 1
    sentinel.before_step([9], 1)
    sentinel.after_tokens(4, answer, 0)
    assert sentinel.report()["replays"] == 2


def test_what_is_kept_is_bounded_and_each_layer_is_logged_once(hybrid: Bench, caplog: pytest.LogCaptureFixture) -> None:
    sentinel = hybrid.sentinel()
    with caplog.at_level(logging.INFO, "truekv"):
        for request in range(3 * KEPT):
            sentinel.fault(request, Corrupted("bad", layer=f"layer {request % 2}"))
            sentinel.after_tokens(request, [1, 2, 3], 1)
            sentinel.end(request)
    assert len(sentinel.findings) == KEPT
    assert sentinel.findings[-1].requests == (3 * KEPT - 1,)
    assert sentinel.report()["findings_total"]["finite"] == 3 * KEPT
    assert len(caplog.records) == 2
    assert not sentinel._repetitions
    assert not sentinel._known
