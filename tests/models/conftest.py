"""Tiny checkpoints saved by transformers itself, and the two ways through them: its own and ours.

The reference is transformers without its cache, whose cached paths are wrong for some families. Ours
is the arena with float32 rows and poison: whatever is read without having been written is NaN.
"""

import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from truekv.core.batch import Chunk
from truekv.core.protocols import Model
from truekv.formats.choice import choose_formats
from truekv.kernels.native.library import library
from truekv.kernels.native.ops import OPS as NATIVE
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint

PROMPT, DECODED = 200, 32
TOKENS = PROMPT + DECODED


@pytest.fixture(scope="session", autouse=True)
def _quiet_transformers() -> Iterator[None]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@dataclass(frozen=True)
class Tiny:
    """A saved checkpoint and the transformers model that saved it."""

    directory: Path
    reference: Any

    @property
    def checkpoint(self) -> Checkpoint:
        return Checkpoint.open(str(self.directory))

    def expected(self, tokens: Sequence[int]) -> torch.Tensor:
        """Transformers' logits, float32 [T, V], without its cache."""
        with torch.inference_mode():
            return self.reference(input_ids=torch.tensor([list(tokens)]), use_cache=False).logits[0].float()


def randomised(model: Any, seed: int, branch: float = 0.8) -> Any:
    """Replace every weight by one that matters: no unit norms, no zero biases, no flat attention.

    `branch` is the gain of the maps that write to the residual: the larger, the more a rounding error
    of one layer grows in the next.
    """
    generator = torch.Generator().manual_seed(seed)
    # A tied head reads the embedding, whose size then sets that of the logits.
    embedding = 0.25 if model.config.tie_word_embeddings else 1.0

    def normal(like: torch.Tensor, deviation: float, mean: float = 0.0) -> torch.Tensor:
        return torch.randn(like.shape, generator=generator) * deviation + mean

    named = dict(model.named_parameters())
    named |= {name: buffer for name, buffer in model.named_buffers() if name.endswith("e_score_correction_bias")}
    with torch.no_grad():
        for name, weight in named.items():
            if name.endswith(("A_log", "dt_bias")):
                weight.copy_(normal(weight, 1.0, -1.0))
            elif name.endswith("bias"):
                weight.copy_(normal(weight, 0.2))
            elif weight.ndim == 1:  # norms, about where they start from, which says whether they are zero-centred
                weight.copy_(weight + normal(weight, 0.3))
            elif "embed_tokens" in name:
                weight.copy_(normal(weight, embedding))
            elif "conv1d" in name:
                weight.copy_(normal(weight, 0.6))
            else:
                residual = any(part in name for part in ("o_proj", "out_proj", "down_proj"))
                gain = 2.0 if "q_proj" in name else branch * embedding if residual else 1.2
                weight.copy_(normal(weight, gain * weight.shape[-1] ** -0.5))
    return model.eval()


@pytest.fixture(scope="session")
def save(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Tiny]:
    """Build, randomise and save a transformers model of a config."""

    def saved(
        model_class: Any,
        config: Any,
        *,
        seed: int = 0,
        branch: float = 0.8,
        prepare: Callable[[Any], None] | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> Tiny:
        torch.manual_seed(seed)
        config._attn_implementation = "eager"
        model = randomised(model_class(config), seed, branch)
        if prepare is not None:
            prepare(model)
        model = model.to(dtype)
        directory = tmp_path_factory.mktemp(config.model_type)
        model.save_pretrained(directory)
        return Tiny(directory, model)

    return saved


def tokens_of(vocabulary: int, seed: int = 7, count: int = TOKENS) -> list[int]:
    source = random.Random(seed)
    return [source.randrange(vocabulary) for _ in range(count)]


def chunkings(seed: int) -> dict[str, list[int]]:
    """The ways to cut the prompt; 32 single tokens follow each."""
    source = random.Random(seed)
    cuts: list[int] = []
    while sum(cuts) < PROMPT:
        cuts.append(min(source.randint(1, source.choice((3, 17, PROMPT))), PROMPT - sum(cuts)))
    ways = {"one shot": [PROMPT], "single tokens": [1] * PROMPT, "random cuts": cuts}
    return {name: way + [1] * DECODED for name, way in ways.items()}


def _replay(
    model: Model, tokens: Sequence[int], cuts: Iterable[int], *, dtype: str = "float32", kv: str = ""
) -> tuple[torch.Tensor, Counter[str]]:
    """Teacher-force tokens through a poisoned arena; return logits [T, V] and which kernels ran how often."""
    formats = choose_formats(model.spec, kv or {"float32": "f32", "bfloat16": "bf16"}[dtype], "", dtype)
    kernels = select(model.spec, [chosen or () for chosen in formats])
    planned = plan(model.spec, formats, max_model_len=len(tokens), max_num_seqs=2, dtype=dtype)
    arena = Arena(model.spec, planned, kernels, poison=True)
    arena.open()  # takes slot and pages, so that ours are not the first
    sequence = arena.open()
    logits: list[torch.Tensor] = []
    start = 0
    with torch.inference_mode():
        for cut in cuts:
            part = list(tokens[start : start + cut])
            hidden = model.forward(arena.reserve([Chunk(sequence, part)]), arena.layers)
            logits.append(model.logits(hidden))
            arena.advance(sequence, len(part))
            start += cut
    assert start == len(tokens)
    return torch.cat(logits), kernels.calls


def _parity(tiny: Tiny, *, bar: float = 1e-4, seed: int = 0) -> None:
    """Every chunking gives transformers' float32 logits within the bar, through the kernels it should.

    With native operations all chunkings give the same bits.
    """
    tokens = tokens_of(128, seed)
    expected = tiny.expected(tokens)
    assert 0.8 < expected.std() < 10.0, "the tiny model says nothing, or shouts"
    model = tiny.checkpoint.load("float32")
    kinds = Counter(type(layer).__name__ for layer in model.spec.layers)
    for name, cuts in chunkings(seed).items():
        logits, calls = _replay(model, tokens, cuts)
        assert logits.dtype == torch.float32
        error = (logits - expected).abs().max().item()
        assert error <= bar, f"{name}: {error:.2e}"
        steps = len(cuts)
        assert sum(count for kernel, count in calls.items() if kernel.startswith("attend")) == steps * kinds["Paged"]
        assert sum(count for kernel, count in calls.items() if kernel.startswith("scan")) == steps * kinds["Recurrent"]
    if library() is None:
        return
    model = tiny.checkpoint.load("float32", NATIVE)
    once, _ = _replay(model, tokens, [TOKENS])
    error = (once - expected).abs().max().item()
    assert error <= bar, f"native: {error:.2e}"
    cut, _ = _replay(model, tokens, chunkings(seed)["random cuts"])
    assert torch.equal(once, cut)


@pytest.fixture(scope="session")
def parity() -> Callable[..., None]:
    return _parity


@pytest.fixture(scope="session")
def replay() -> Callable[..., tuple[torch.Tensor, Counter[str]]]:
    return _replay
