"""Captured and eager steps of any mix give the same bits, in hidden states and in memory."""

from __future__ import annotations

import dataclasses
import functools
import gc
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_dense, save_hybrid, save_latent, save_mamba

from truekv.core.batch import Chunk, Step
from truekv.core.errors import Refused
from truekv.engine import capture, padding, recording
from truekv.engine.capture import Captured, StepGraphs
from truekv.formats.choice import choose_formats
from truekv.kernels.native.library import library
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan
from truekv.memory.states import StateLayer
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from truekv.core.protocols import Model

DRAFTS, SEQUENCES, LONGEST = 3, 4, 300
FAMILIES = {"dense": save_dense, "gdn": save_hybrid, "mamba2": save_mamba, "mla": save_latent}
native_only = pytest.mark.skipif(library() is None, reason="the native library is not built")


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Checkpoint]:
    saved: dict[str, Path] = {}

    def opened(family: str) -> Checkpoint:
        if family not in saved:
            saved[family] = FAMILIES[family](tmp_path_factory.mktemp(family))
        return Checkpoint.open(str(saved[family]))

    return opened


@pytest.fixture(autouse=True)
def _narrow_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short sequences outgrow their page tables too."""
    monkeypatch.setattr(capture, "NARROWEST", 1)


class Twins:
    """One model, and the same sequences in two arenas: one run eagerly, the other captured."""

    def __init__(
        self, checkpoint: Checkpoint, kv: str, backend: str, dtype: Any = "float32", device: str = "cpu"
    ) -> None:
        spec = checkpoint.architecture.spec
        formats = choose_formats(spec, kv, "", dtype)
        kernels = select(spec, formats, backend=backend, device=device)
        planned = plan(spec, formats, max_model_len=LONGEST, max_num_seqs=SEQUENCES + 1, drafts=DRAFTS, dtype=dtype)
        self.model: Model = checkpoint.load(dtype, kernels.ops, device)
        self.eager, self.captured = (
            Arena(spec, planned, kernels, poison=True, check_finite=False, device=device) for _ in range(2)
        )
        self.graphs = StepGraphs(lambda step: self.model.forward(step, self.captured.layers), self.captured)
        # The twin gives the same slot and page away, so that all later ones are the same.
        self.eager.reserve([Chunk(self.eager.open(), [0])])
        self.held = [(self.eager.open(), self.captured.open()) for _ in range(SEQUENCES)]

    def step(self, asked: dict[int, tuple[list[int], int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        """Run (tokens, drafts, accepted) of some sequences in both arenas; return both hidden states."""
        hidden: list[torch.Tensor] = []
        for side, arena in enumerate((self.eager, self.captured)):
            chunks = [Chunk(self.held[index][side], tokens, drafts) for index, (tokens, drafts, _) in asked.items()]
            step = arena.reserve(chunks)
            with torch.inference_mode():
                hidden.append(self.graphs(step) if side else self.eagerly(step))
            for chunk, (tokens, drafts, accepted) in zip(chunks, asked.values(), strict=True):
                arena.advance(chunk.sequence, len(tokens) - drafts + accepted)
        return hidden[0], hidden[1]

    def eagerly(self, step: Step) -> torch.Tensor:
        """Run a step as it is."""
        return self.model.forward(step, self.eager.layers)

    def memories(self) -> Iterator[tuple[str, torch.Tensor, torch.Tensor]]:
        """Every page and slot of every layer in both arenas, but those of the scratch."""
        slot, (page, *_) = self.graphs.scratch.slot, self.graphs.scratch.pages
        for one, other in zip(self.eager.layers, self.captured.layers, strict=True):
            if isinstance(one, PagedLayer) and isinstance(other, PagedLayer):
                pages = [index for index in range(len(one.data)) if index != page]
                yield one.name, one.data[pages], other.data[pages]
            elif isinstance(one, StateLayer) and isinstance(other, StateLayer):
                slots = [index for index in range(len(one.folded)) if index != slot]
                for ours, theirs in zip(one.tensors(), other.tensors(), strict=True):
                    yield one.name, ours[slots], theirs[slots]


def mixes(seed: int, steps: int) -> Iterator[dict[int, tuple[list[int], int, int]]]:
    """Prompts in chunks first, then any mix of rows of 1 + k tokens, of which any number is accepted."""
    source = random.Random(seed)

    def tokens(count: int) -> list[int]:
        return [source.randrange(300) for _ in range(count)]

    for index in range(SEQUENCES):
        yield {index: (tokens(source.choice((2, 5, 31, 40, 70))), 0, 0)}
    for _ in range(steps):
        rows = source.sample(range(SEQUENCES), source.randint(1, SEQUENCES))
        asked: dict[int, tuple[list[int], int, int]] = {}
        limit = source.choice((0, DRAFTS))
        for index in rows:
            drafts = source.randint(0, limit)
            asked[index] = tokens(1 + drafts), drafts, source.randint(0, drafts)
        yield asked


def differences(twins: Twins, seed: int = 0, steps: int = 16) -> Iterator[str]:
    """Name whatever differs in any bit after each step."""
    for number, asked in enumerate(mixes(seed, steps)):
        eager, captured = twins.step(asked)
        if not torch.equal(eager, captured):
            yield f"hidden states of step {number}"
        for name, ours, theirs in twins.memories():
            if not torch.equal(ours.contiguous().view(torch.uint8), theirs.contiguous().view(torch.uint8)):
                yield f"memory of {name} after step {number}"


@native_only
@pytest.mark.parametrize(
    ("kv", "dtype"),
    [("f32", "float32"), ("bf16", "bfloat16"), ("int8", "float32"), ("turboquant_3bit_nc", "bfloat16")],
)
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_steps_are_bitwise_those_run_eagerly(
    checkpoint: Callable[[str], Checkpoint], family: str, kv: str, dtype: str
) -> None:
    twins = Twins(checkpoint(family), kv, "native", dtype)
    assert twins.eager.kernels.backend == "native"
    assert not list(differences(twins))
    assert twins.graphs.replays >= 16
    assert 0 < twins.graphs.eager <= SEQUENCES
    assert 4 <= twins.graphs.recorded < twins.graphs.replays
    twins.captured.check()


@pytest.mark.parametrize("kv", ["f32", "int8"])
@pytest.mark.parametrize("family", FAMILIES)
def test_replayed_reference_kernels_agree(checkpoint: Callable[[str], Checkpoint], family: str, kv: str) -> None:
    twins = Twins(checkpoint(family), kv, "reference")
    for asked in mixes(0, 6):
        eager, captured = twins.step(asked)
        assert float((eager - captured).abs().max()) <= 1e-5 * float(eager.abs().max())
    assert twins.graphs.replays >= 6


@native_only
def test_two_captures_share_a_scratch_and_take_tensors_beside_the_step(
    checkpoint: Callable[[str], Checkpoint],
) -> None:
    twins = Twins(checkpoint("dense"), "int8", "native")

    def shifted(model: Model, step: Step, arena: Arena, by: torch.Tensor) -> torch.Tensor:
        return model.forward(step, arena.layers) + by

    graphs = StepGraphs(lambda step, by: shifted(twins.model, step, twins.captured, by), twins.captured, twins.graphs)
    assert graphs.scratch is twins.graphs.scratch
    for number in range(1, 4):
        sides: list[torch.Tensor] = []
        by = torch.randn(number, 64)
        for side, arena in enumerate((twins.eager, twins.captured)):
            chunks = [Chunk(held[side], [number]) for held in twins.held[:number]]
            step = arena.reserve(chunks)
            with torch.inference_mode():
                sides.append(graphs(step, by) if side else shifted(twins.model, step, arena, by))
            for chunk in chunks:
                arena.advance(chunk.sequence, 1)
        assert torch.equal(*sides)
    assert (graphs.replays, graphs.recorded, graphs.eager) == (3, 3, 0)


@native_only
@pytest.mark.parametrize("kv", ["bf16", "int8", "turboquant_3bit_nc"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_of_nan_spoils_no_companion(checkpoint: Callable[[str], Checkpoint], family: str, kv: str) -> None:
    twins = Twins(checkpoint(family), kv, "native")
    nowhere = 1 << 20  # a token without an embedding, whose row is NaN
    for asked in mixes(3, 3):
        twins.step(asked)
    with torch.inference_mode():
        alone, _ = twins.step({0: ([7], 0, 0), 1: ([8, 9], 1, 1)})
    for index, held in enumerate(twins.held):
        assert index > 1 or held[1].position == held[0].position
    steps = twins.graphs.replays
    broken = twins.captured.reserve([Chunk(twins.held[0][1], [7]), Chunk(twins.held[2][1], [nowhere])])
    sound = twins.eager.reserve([Chunk(twins.held[0][0], [7])])
    with torch.inference_mode():
        hidden, expected = twins.graphs(broken), twins.model.forward(sound, twins.eager.layers)
    assert twins.graphs.replays == steps + 1
    assert alone.isfinite().all()
    assert hidden[1].isnan().any()
    assert torch.equal(hidden[:1], expected)
    for side, arena in enumerate((twins.eager, twins.captured)):
        arena.advance(twins.held[0][side], 1)
        arena.close(twins.held[2][side])
    # And the size that was replayed with NaN holds none of it afterwards.
    again, replayed = twins.step({0: ([3], 0, 0), 1: ([4], 0, 0)})
    assert torch.equal(again, replayed)


@native_only
def test_steps_that_fit_no_size_run_as_they_are(checkpoint: Callable[[str], Checkpoint]) -> None:
    twins = Twins(checkpoint("dense"), "f32", "native")
    eager, captured = twins.step({0: (list(range(1 + DRAFTS + 1)), 0, 0)})
    assert torch.equal(eager, captured)
    assert (twins.graphs.replays, twins.graphs.recorded, twins.graphs.eager) == (0, 0, 1)
    twins.step({0: (list(range(1 + DRAFTS)), 0, 0)})
    assert (twins.graphs.replays, twins.graphs.recorded, twins.graphs.eager) == (1, 1, 1)


@native_only
def test_a_step_whose_rows_are_looked_at_is_not_replayed(checkpoint: Callable[[str], Checkpoint]) -> None:
    twins = Twins(checkpoint("dense"), "int8", "native")
    twins.step({0: ([5], 0, 0)})
    seen: list[int] = []
    layer = next(layer for layer in twins.captured.layers if isinstance(layer, PagedLayer))
    layer.probe = lambda _stored, _rows, step: seen.append(len(step.tokens))
    before = (twins.graphs.replays, twins.graphs.eager)
    eager, captured = twins.step({0: ([6], 0, 0)})
    assert torch.equal(eager, captured)
    assert seen == [1]
    layer.probe = None
    twins.step({0: ([7], 0, 0)})
    assert (twins.graphs.replays, twins.graphs.eager) == (before[0] + 1, before[1] + 1)
    assert seen == [1]


@native_only
def test_warming_up_records_every_size_and_changes_no_memory(checkpoint: Callable[[str], Checkpoint]) -> None:
    twins = Twins(checkpoint("gdn"), "int8", "native")
    for asked in mixes(1, 2):
        twins.step(asked)
    seen: list[tuple[int, int]] = []
    twins.graphs.warm(4, progress=lambda done, total: seen.append((done, total)))
    # 1 to 16 tokens in rows of 1 and of 1 + DRAFTS, in tables of 1 and of 4 pages, and one in the widest.
    assert seen == [(done, 65) for done in range(66)]
    assert all(torch.equal(ours.view(torch.uint8), theirs.view(torch.uint8)) for _, ours, theirs in twins.memories())
    recorded = twins.graphs.recorded
    assert not list(differences(twins, seed=2, steps=0))
    assert twins.graphs.recorded == recorded


@native_only
def test_no_table_is_wider_than_the_longest_sequence(checkpoint: Callable[[str], Checkpoint]) -> None:
    twins = Twins(checkpoint("dense"), "f32", "native")
    plan, sizes = twins.captured.plan, twins.graphs.sizes
    widest = plan.pages_for(LONGEST + DRAFTS)
    assert {size.pages for size in sizes.within(10 * widest)} == {1, 4, widest}
    assert sizes.within(10 * widest)[0].pages == widest
    assert widest % 4, "four times a narrower one"
    step = twins.captured.reserve([Chunk(twins.held[0][1], list(range(LONGEST)))])
    held = sizes.holding(dataclasses.replace(step, tokens=step.tokens[:1], gather=step.gather[:, :1]))
    assert held is not None
    assert held.pages == widest


def test_what_is_known_of_smaller_steps_takes_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(padding, "_NUMBERS", 500)
    size = padding.StepSize(1, 1, 1, 100)
    padded = padding.PaddedStep(padding.nobody(size, 0, 0, torch.device("cpu")))
    for width in (*range(1, 101), *range(1, 101)):
        step = padding.nobody(size._replace(pages=width), 7, 5, torch.device("cpu"))
        padded.put(step)
        assert padded.step.pages[0].tolist() == [5] * width + [0] * (100 - width)
        assert padded.step.slot.tolist() == [7]
        assert sum(map(len, padded._places.values())) <= 500 + 112


@native_only
def test_only_so_many_sizes_are_kept(checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "MOST_CAPTURED", 2)
    twins = Twins(checkpoint("dense"), "f32", "native")
    for rows, recorded in ((1, 1), (2, 2), (1, 2), (4, 3), (1, 3), (2, 4)):
        eager, captured = twins.step({index: ([5], 0, 0) for index in range(rows)})
        assert torch.equal(eager, captured)
        assert twins.graphs.recorded == recorded


@native_only
def test_a_size_without_room_runs_as_it_is_and_says_so_once(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    class Full(recording.Recording):
        def __init__(self, function: Callable[[], torch.Tensor]) -> None:
            super().__init__(function)
            if len(self.output) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(capture, "recorder", lambda _: Full)
    twins = Twins(checkpoint("gdn"), "int8", "native")
    assert not list(differences(twins, steps=24))
    assert twins.graphs.replays > 0
    assert twins.graphs.eager > SEQUENCES
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == list(twins.graphs._captured.values()).count(None) > 1
    assert all(text.startswith("steps of ") and "give the cache less memory" in text for text in said)
    # What was refused once is not tried again.
    recorded = twins.graphs.recorded
    twins.graphs.warm(1, progress=lambda _done, _total: None)
    twins.graphs.warm(1, progress=lambda _done, _total: None)
    assert twins.graphs.recorded - recorded <= 2 * 2
    assert len({record.getMessage() for record in caplog.records}) == len(caplog.records)


def test_on_a_gpu_sizes_are_few_and_tables_that_are_warmed_hold_usual_contexts(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "NARROWEST", 16)
    spec = checkpoint("dense").architecture.spec
    formats = choose_formats(spec, "int8", "", "float32")
    planned = plan(spec, formats, max_model_len=32, max_num_seqs=257, drafts=3)
    sizes = capture.StepSizes(planned, cpu=False).within(capture.WARMED_PAGES)
    assert sizes[0] == padding.StepSize(512, 257, 4, 2)
    assert sizes[-1] == padding.StepSize(1, 1, 1, 2)
    assert len(sizes) == 2 * 23
    sizes = capture.StepSizes(dataclasses.replace(planned, longest=262_144), cpu=False).within(capture.WARMED_PAGES)
    # The smallest of the widest table launches what its others will.
    *sizes, last = sizes
    assert (last.tokens, last.rows, last.longest) == (1, 1, 1)
    assert last.pages * planned.page_tokens >= 262_144
    assert sorted({size.pages for size in sizes}) == [16, 64, 256]
    # The largest first: what it lets go of is enough for every other.
    assert [size.pages * size.rows for size in sizes[:2]] == [256 * 257] * 2
    assert all(most >= count for size in sizes for most, count in zip(sizes[0], size, strict=True))


@native_only
def test_on_a_gpu_a_size_is_dropped_for_memory_alone(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(capture, "MOST_CAPTURED", 1)
    twins = Twins(checkpoint("dense"), "f32", "native")
    monkeypatch.setattr(twins.graphs, "_cpu", False)
    for rows in (1, 2, 3, 4, 1, 2, 3, 4):
        twins.step({index: ([5], 0, 0) for index in range(rows)})
    assert twins.graphs.recorded == 4
    kept = sum(one.nbytes for one in twins.graphs._captured.values() if one)
    # What a size really keeps is no more than is said of it.
    for one in twins.graphs._captured.values():
        assert one is not None
        padded = one._padded
        held = [padded._first, padded._numbers, *padded._places.values(), one._recording.output]
        assert sum(tensor.nbytes for tensor in held) <= one.nbytes
    monkeypatch.setattr(capture, "KEPT", kept)
    twins.step({0: ([5, 6], 1, 0)})
    assert twins.graphs.recorded == 5
    assert sum(one.nbytes for one in twins.graphs._captured.values() if one) <= kept
    before = [size.rows for size, *_ in twins.graphs._captured]
    assert before[:1] != [1], "that was used longest ago"


@native_only
def test_recordings_share_their_memory(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    pool = recording.Pool()
    monkeypatch.setattr(capture, "recorder", lambda _: functools.partial(recording.Recording, pool=pool))
    twins = Twins(checkpoint("dense"), "f32", "native")
    twins.step({index: ([5], 0, 0) for index in range(3)})
    alone = pool.nbytes
    assert alone > 0
    # As many tokens in another shape: what is new is what it returns.
    eager, captured = twins.step({0: ([5] * 4, 3, 0)})
    assert torch.equal(eager, captured)
    assert twins.graphs.recorded == 2
    assert pool.nbytes <= 1.2 * alone


@native_only
def test_a_recording_keeps_what_its_calls_point_to(checkpoint: Callable[[str], Checkpoint]) -> None:
    twins = Twins(checkpoint("dense"), "f32", "native")
    page, slot = twins.graphs.scratch.pages[0], twins.graphs.scratch.slot
    empty = padding.nobody(padding.StepSize(2, 2, 1, 1), slot, page, twins.captured.device)
    alone = Captured(lambda step: twins.model.forward(step, twins.captured.layers), empty)
    gc.collect()
    overwriting = [torch.full((size,), torch.nan) for size in (16, 32, 64, 128, 256, 512) for _ in range(64)]
    sides: list[torch.Tensor] = []
    for side, arena in enumerate((twins.eager, twins.captured)):
        step = arena.reserve([Chunk(twins.held[0][side], [5])])
        with torch.inference_mode():
            sides.append(alone(step) if side else twins.model.forward(step, arena.layers))
    assert torch.equal(*sides)
    assert all(block.isnan().all() for block in overwriting)


def test_an_arena_that_checks_on_the_host_is_refused(checkpoint: Callable[[str], Checkpoint]) -> None:
    twins = Twins(checkpoint("dense"), "f32", "auto")
    spec, kernels = twins.model.spec, twins.captured.kernels
    checking = Arena(spec, twins.captured.plan, kernels)
    with pytest.raises(Refused, match="check_finite=False"):
        StepGraphs(lambda step: twins.model.forward(step, checking.layers), checking)


# What a capture must never do. Each mutant is a change of the code above that the comparison has to notice.


def longest_context(step: Step) -> torch.Tensor:
    return torch.full((), int(step.position.max()))


def item_branch(step: Step) -> torch.Tensor:
    return step.position.new_ones(()) if step.position.max().item() > 40 else step.position.new_zeros(())


@pytest.mark.parametrize("read", [longest_context, item_branch])
def test_a_forward_that_reads_the_host_is_refused(
    checkpoint: Callable[[str], Checkpoint], read: Callable[[Step], torch.Tensor]
) -> None:
    twins = Twins(checkpoint("dense"), "f32", "auto")
    graphs = StepGraphs(
        lambda step: twins.model.forward(step, twins.captured.layers) + read(step),
        twins.captured,
        twins.graphs,
    )
    with pytest.raises(Refused, match="reads on the host what its numbers decide \\(_local_scalar_dense\\)"):
        graphs(twins.captured.reserve([Chunk(twins.held[0][1], [5])]))


@native_only
@pytest.mark.parametrize("read", [longest_context, item_branch])
def test_mutant_a_length_or_a_branch_that_the_host_decides_is_caught(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch, read: Callable[[Step], torch.Tensor]
) -> None:
    twins = Twins(checkpoint("dense"), "f32", "native")
    forward = twins.model.forward
    monkeypatch.setattr(twins.model, "forward", lambda step, memory: forward(step, memory) + read(step))
    monkeypatch.setattr(recording, "_reads_on_host", lambda *_: False)
    assert any(found.startswith("hidden") for found in differences(twins))


@native_only
def test_mutant_rows_of_an_earlier_step_that_stay_are_caught(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def put(self: padding.PaddedStep, step: Step, tensors: Any = ()) -> None:
        assert not tensors
        for field in dataclasses.fields(step):
            value, buffer = getattr(step, field.name), getattr(self.step, field.name)
            buffer[tuple(slice(length) for length in value.shape)] = value

    twins = Twins(checkpoint("gdn"), "int8", "native")
    monkeypatch.setattr(padding.PaddedStep, "put", put)
    # Long enough that steps of as many tokens have fewer rows.
    assert any(found.startswith("memory") for found in differences(twins, steps=64))


@native_only
def test_mutant_padding_that_is_stored_is_caught(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    def somewhere(size: padding.StepSize, slot: int, page: int, device: torch.device) -> Step:
        step = padding.nobody(size, slot, page, device)
        return dataclasses.replace(step, page=torch.ones_like(step.page), line=torch.zeros_like(step.line))

    monkeypatch.setattr(capture, "nobody", somewhere)
    twins = Twins(checkpoint("dense"), "int8", "native")
    assert any(found.startswith("memory") for found in differences(twins))


@native_only
def test_mutant_memory_that_is_reused_too_early_is_caught(
    checkpoint: Callable[[str], Checkpoint], monkeypatch: pytest.MonkeyPatch
) -> None:
    blocks: dict[int, torch.Tensor] = {}

    def like(_: object, tensor: torch.Tensor) -> torch.Tensor:
        block = blocks.setdefault(tensor.nbytes, torch.empty(tensor.nbytes, dtype=torch.uint8))
        return block.view(tensor.dtype).view(tensor.shape)

    monkeypatch.setattr(recording.Pool, "like", like)
    twins = Twins(checkpoint("dense"), "f32", "native")
    assert any(found.startswith("hidden") for found in differences(twins))
