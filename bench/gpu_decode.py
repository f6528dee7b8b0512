"""Decode speed of whole models on a GPU: random weights drawn there, caches of any depth, steps eager or as graphs.

What is timed is a step as the engine runs it for greedy requests: its tensors laid out on the host, the pass, the
logits, and back on the host whether all is finite and the likeliest token of every row. With guesses, a step verifies
three drafts of every row and the prediction head makes the next three; none is accepted, as weights are random, so
tokens/s are what every accepted draft adds to.
"""

from __future__ import annotations

import functools
import gc
import math
import time
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast
from unittest import mock

from bench.checkpoints import CONFIGS
from truekv.core.batch import Chunk
from truekv.core.config import Config
from truekv.core.errors import DoesNotFit
from truekv.core.lazy import torch
from truekv.core.weights import Weights
from truekv.engine.capture import StepGraphs
from truekv.engine.speculate.mtp import Predictor, Row
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.layout import lay_out
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import PAGE_TOKENS, plan
from truekv.memory.states import StateLayer
from truekv.models.weights import understand

if TYPE_CHECKING:
    from collections.abc import Iterator
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Sequence, Step
    from truekv.core.protocols import Architecture, Model

DRAFTS: Final = 3
_DENSE: Final = CONFIGS["dense"] | {
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "num_attention_heads": 32,
    "intermediate_size": 12288,
    "vocab_size": 151936,
    "tie_word_embeddings": False,
}
_HYBRID: Final = CONFIGS["hybrid"] | {
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "intermediate_size": 12288,
    "vocab_size": 248320,
    "linear_num_value_heads": 32,
    "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 8,
    "mtp_num_hidden_layers": 1,
    "tie_word_embeddings": False,
}
MODELS: Final[dict[str, dict[str, Any]]] = {"dense-8b": _DENSE, "hybrid-9b": _HYBRID}
DESCRIPTIONS: Final = {
    "dense-8b": "Qwen3-8B: 36 layers, 32 query / 8 kv heads of 128",
    "hybrid-9b": "Qwen3.5-9B: 24 GDN layers, 8 of attention with 16 query / 4 kv heads of 256",
}
Precision = Literal["float32", "bfloat16"]


@dataclass(frozen=True, slots=True)
class Ask:
    """What is decoded, and how."""

    kv: str
    batch: int
    depth: int
    capture: bool = True
    drafts: int = 0


class Drawn:
    """A model with random weights that were drawn on its device."""

    def __init__(
        self, name: str, config: dict[str, Any], device: Literal["cuda", "cpu"], dtype: Precision = "bfloat16"
    ) -> None:
        """Draw every tensor, once for all formats, with the operations that one of them has."""
        self.name = name
        self.device: Literal["cuda", "cpu"] = device
        self.dtype: Precision = dtype
        architecture = understand(Config(dict(config)))
        self.drafting = bool(config.get("mtp_num_hidden_layers"))
        self.architecture: Architecture = architecture.with_draft_head() if self.drafting else architecture
        self.spec = self.architecture.spec
        formats = choose_formats(self.spec, "bf16", "", dtype)
        kernels = select(self.spec, formats, device=device)
        drawn = Random(self.architecture.tensors, config, device, getattr(torch, dtype))
        self.model: Model = self.architecture.build(Weights(drawn, kernels.ops, torch.device(device)))


class Random(Mapping[str, torch.Tensor]):
    """Random weights by name, each drawn when it is looked up, from a seed of its own."""

    def __init__(
        self, shapes: Mapping[str, tuple[int, ...]], config: dict[str, Any], device: str, dtype: torch.dtype
    ) -> None:
        """Draw nothing yet."""
        self._shapes = shapes
        self._config = config
        self._generator = torch.Generator(device)
        self._dtype = dtype

    def __getitem__(self, name: str) -> torch.Tensor:
        """Draw one."""
        self._generator.manual_seed(zlib.crc32(name.encode()))
        return _draw(name, self._shapes[name], self._config, self._generator).to(self._dtype)

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._shapes)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._shapes)


def _draw(name: str, shape: tuple[int, ...], config: dict[str, Any], generator: torch.Generator) -> torch.Tensor:
    """Draw one tensor on the generator's device, of sizes that keep what passes through it; see checkpoints.py."""
    device = generator.device
    if name.endswith("A_log"):
        return torch.linspace(-5.0, 0.0, shape[0], device=device)
    if name.endswith("dt_bias"):
        return torch.zeros(shape, device=device)
    if len(shape) == 1:
        zero_centred = config["model_type"] == "qwen3_5_text" and "linear_attn" not in name
        return (torch.zeros if zero_centred else torch.ones)(shape, device=device)
    drawn = torch.randn(shape, generator=generator, device=device, dtype=torch.bfloat16)
    layers = 2 * config["num_hidden_layers"]
    writes = name.endswith(("o_proj.weight", "down_proj.weight", "out_proj.weight"))
    return drawn.mul_(shape[-1] ** -0.5 / (math.sqrt(layers) if writes else 1.0))


def deepen(arena: Arena, depth: int, sequences: int) -> list[Sequence]:
    """Open sequences of `depth` tokens: random rows encoded into one page of every layer, its bytes copied to all."""
    opened = [arena.open() for _ in range(sequences)]
    # The step of so many tokens is nobody's, and would take the host seconds to lay out.
    with mock.patch("truekv.memory.arena.lay_out"):
        for sequence in opened:
            arena.reserve([Chunk(sequence, [0] * depth)])
            arena.advance(sequence, depth)
    first = opened[0].pages[0]
    described = (opened[0], 0, [0] * PAGE_TOKENS, 0)
    step = lay_out([described], PAGE_TOKENS, arena.device)
    for layer in (*arena.layers, *arena.draft_layers):
        if isinstance(layer, PagedLayer):
            shapes = [(PAGE_TOKENS, stored.field.heads, stored.field.dim) for stored in layer.stored]
            rows = tuple(torch.randn(shape, device=arena.device) for shape in shapes)
            arena.kernels.store(layer.stored, rows, step)
            layer.data[:] = layer.data[first].clone()
        elif isinstance(layer, StateLayer):
            layer.folded[[sequence.slot for sequence in opened]] = depth
    return opened


def decode(drawn: Drawn, ask: Ask, steps: int, warm: int = 3) -> dict[str, Any]:
    """Run so many steps after a few that are not counted; the median step counts."""
    spec, drafts = drawn.spec, ask.drafts
    formats, draft_formats = _formats(drawn, ask.kv, drafts)
    kernels = select(spec, formats, device=drawn.device)
    planned = plan(
        spec,
        formats,
        max_model_len=ask.depth + (steps + warm + 1) + drafts,
        max_num_seqs=ask.batch + 1,
        drafts=drafts,
        dtype=drawn.dtype,
        draft_formats=draft_formats,
    )
    arena = Arena(spec, planned, kernels, check_finite=False, device=drawn.device)

    def eager(step: Step) -> torch.Tensor:
        return drawn.model.forward(step, arena.layers)

    graphs = StepGraphs(eager, arena) if ask.capture else None
    predictor = None
    if drafts:
        replayed = None if graphs is None else functools.partial(StepGraphs, arena=arena, beside=graphs)
        predictor = Predictor(drawn.model, arena, replayed)
    held = deepen(arena, ask.depth, ask.batch)
    whole: list[float] = []
    laid: list[float] = []
    for _ in range(steps + warm):
        begin = time.perf_counter()
        tokens = [row % 97 for row in range(ask.batch)]
        step = arena.reserve(
            [Chunk(item, [token, *[1] * drafts], drafts) for item, token in zip(held, tokens, strict=True)]
        )
        laid.append(time.perf_counter() - begin)
        with torch.inference_mode():
            hidden_TC = (graphs or eager)(step)
            found = [kernels.ops.largest(part) for part in (hidden_TC, drawn.model.logits(hidden_TC))]
            best = cast("list[int]", torch.cat(found).tolist())
        assert len(best) == 2 * ask.batch * (1 + drafts)
        assert min(best) >= 0, "all numbers were to be finite"
        if predictor:
            rows = [Row(item, item.position, [1], [index * (1 + drafts)], drafts) for index, item in enumerate(held)]
            predictor.propose(rows, hidden_TC)
        for item in held:
            arena.advance(item, 1)
        whole.append(time.perf_counter() - begin)
    if graphs is not None:
        assert graphs.replays >= steps, "steps were to be replayed"
    seconds = sorted(whole[warm:])[steps // 2]
    return {
        "model": drawn.name,
        "kv": ask.kv,
        "batch": ask.batch,
        "depth": ask.depth,
        "captured": ask.capture,
        "drafts": drafts,
        "ms": seconds * 1e3,
        "host_ms": sorted(laid[warm:])[steps // 2] * 1e3,
        "rate": ask.batch / seconds,
        "cache_gib": arena.nbytes / 2**30,
    }


def _formats(drawn: Drawn, kv: str, drafts: int) -> tuple[Seq[Any], Seq[Any] | None]:
    """Return the formats of the layers and, for drafts, of the prediction head's, which are stored alike."""
    every = choose_formats(drawn.spec, kv, "", drawn.dtype)
    formats = every[: len(drawn.spec.layers)]
    if not drafts:
        return formats, None
    chosen = next(item for item in formats if item)
    return formats, tuple(chosen for _ in drawn.spec.draft_layers)


def fits(name: str, kv: str, memory: int, depth: int) -> int:
    """Return how many sequences of `depth` tokens have room in so many bytes of cache; needs no device."""
    spec = understand(Config(dict(MODELS[name]))).spec
    formats = choose_formats(spec, kv, "", "bfloat16")
    least, most = 0, 1
    while _has_room(spec, formats, memory, depth, most):
        least, most = most, 2 * most
    while most - least > 1:
        middle = (least + most) // 2
        least, most = (middle, most) if _has_room(spec, formats, memory, depth, middle) else (least, middle)
    return least


def _has_room(spec: Any, formats: Any, memory: int, depth: int, sequences: int) -> bool:  # noqa: ANN401
    try:
        found = plan(spec, formats, memory=memory, max_model_len=depth, max_num_seqs=sequences, dtype="bfloat16")
    except DoesNotFit:
        return False
    return found.pages >= sequences * found.pages_for(depth)


def asks(*, quick: bool, drafting: bool, kinds: Seq[str], depths: Seq[int], batches: Seq[int]) -> Iterator[Ask]:
    """Yield what is decoded with one model, what matters most first."""
    for depth in depths:
        for kv in kinds:
            for batch in (batches[0], batches[-1]) if quick else batches:
                yield Ask(kv, batch, depth)
                if not quick or (batch == batches[0] and kv in {kinds[0], kinds[-1]}):
                    yield Ask(kv, batch, depth, capture=False)
                if drafting and (not quick or (depth == depths[0] and kv == kinds[-1])):
                    yield Ask(kv, batch, depth, drafts=DRAFTS)


def forget() -> None:
    """Give the memory of what was measured back."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
