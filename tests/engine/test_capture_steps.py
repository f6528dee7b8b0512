"""Captured and eager steps of any mix give the same bits, in hidden states and in memory."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_dense, save_hybrid, save_latent, save_mamba

from truekv.core.batch import Chunk, Step
from truekv.core.errors import Refused
from truekv.engine import capture, padding
from truekv.engine.capture import StepGraphs
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

    def __init__(self, checkpoint: Checkpoint, kv: str, backend: str, dtype: Any = "float32") -> None:
        spec = checkpoint.architecture.spec
        formats = choose_formats(spec, kv, "", dtype)
        kernels = select(spec, formats, backend=backend)
        planned = plan(
            spec, formats, max_model_len=LONGEST, max_num_seqs=SEQUENCES + 1, drafts=DRAFTS, dtype=dtype
        )
        self.model: Model = checkpoint.load(dtype, kernels.ops)
        self.eager, self.captured = (
            Arena(spec, planned, kernels, poison=True, check_finite=False) for _ in range(2)
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
                hidden.append(self.graphs(step) if side else self.model.forward(step, arena.layers))
            for chunk, (tokens, drafts, accepted) in zip(chunks, asked.values(), strict=True):
                arena.advance(chunk.sequence, len(tokens) - drafts + accepted)
        return hidden[0], hidden[1]

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
