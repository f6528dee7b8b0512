"""Watching what a model would store: real memory, with an eye on every row and query on their way in."""

# Shape suffixes: T tokens, H kv heads, Q query heads, D dim.

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal, Protocol, cast

from truekv.core.batch import Chunk
from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.spec import Paged
from truekv.engine.run import Runner
from truekv.formats.choice import choose_formats
from truekv.formats.fit import FP8_TOP, Statistics
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.batch import Step
    from truekv.core.protocols import DraftHead, LayerMemory, Model, PagedMemory
    from truekv.core.spec import Field, ModelSpec
    from truekv.formats.frame import Frame

Place = tuple[int, str]
"""A field of a layer: (layer index, field name)."""
BATCH: Final = 8
"""Most prompts that are watched together."""
_PREFILL: Final = 256
# Smallest normal number of fp8_e4m3.
_SMALLEST_NORMAL: Final = 2.0**-6


class Sink(Protocol):
    """What a watched field's rows and queries are shown to."""

    def see(self, rows_THD: torch.Tensor, queries_TQD: torch.Tensor | None) -> None:
        """Take in one step's rows, and the queries that score them where the field is scored."""
        ...


class Seen:
    """Statistics of a field's rows, and of the queries that score them."""

    def __init__(self, item: Field) -> None:
        """Start with nothing seen."""
        self.item = item
        self.rows = Statistics(item.heads, item.dim)
        self.queries: Statistics | None = None

    def see(self, rows_THD: torch.Tensor, queries_TQD: torch.Tensor | None) -> None:
        """Add to the statistics."""
        self.rows.observe(rows_THD)
        if queries_TQD is not None:
            if self.queries is None:
                self.queries = Statistics(queries_TQD.shape[1], queries_TQD.shape[2])
            self.queries.observe(queries_TQD)

    def take_in(self, other: Seen) -> None:
        """Add what another one has seen."""
        self.rows.merge(other.rows)
        if other.queries is not None:
            if self.queries is None:
                self.queries = Statistics(other.queries.heads, other.queries.dim)
            self.queries.merge(other.queries)


@dataclass(slots=True, eq=False)
class Check:
    """How many numbers fp8_e4m3 would clip, or store below its normal range, in a frame."""

    frame: Frame
    numbers: int = 0
    clipped: int = 0
    subnormal: int = 0

    def see(self, rows_THD: torch.Tensor, queries_TQD: torch.Tensor | None) -> None:
        """Count."""
        del queries_TQD
        size = self.frame.rows(rows_THD.cpu()).abs()
        self.numbers += size.numel()
        self.clipped += int((size > FP8_TOP).sum())
        self.subnormal += int(((size > 0) & (size < _SMALLEST_NORMAL)).sum())


class Watch:
    """A paged layer's memory that shows what passes to its sinks first; implements PagedMemory."""

    def __init__(self, memory: PagedMemory, layer: Paged, sinks: Sequence[Sink]) -> None:
        """Stand before the memory of one layer; one sink per field."""
        self._memory = memory
        self._layer = layer
        self._sinks = sinks

    def attend(
        self, queries: tuple[torch.Tensor, ...], rows: tuple[torch.Tensor, ...], scale: float, step: Step
    ) -> torch.Tensor:
        """Show rows and queries as they are, then let the memory do its work."""
        remaining = list(queries)
        for item, values, sink in zip(self._layer.fields, rows, self._sinks, strict=True):
            sink.see(values, None if item.role == "value" else remaining.pop(0))
        return self._memory.attend(queries, rows, scale, step)


def places(spec: ModelSpec, *, draft: bool = False) -> dict[Place, Field]:
    """Return every field of every paged layer; with `draft`, those of the prediction head too."""
    return {
        (index, item.name): item
        for index, layer in enumerate((*spec.layers, *(spec.draft_layers if draft else ())))
        if isinstance(layer, Paged)
        for item in layer.fields
    }


def watch(spec: ModelSpec, layers: Sequence[LayerMemory], sinks: Mapping[Place, Sink]) -> tuple[LayerMemory, ...]:
    """Return the memory of all layers, or of these and the prediction head's, with a watch before each paged one."""
    specs = (*spec.layers, *spec.draft_layers)[: len(layers)]
    return tuple(
        Watch(cast("PagedMemory", memory), layer, [sinks[index, item.name] for item in layer.fields])
        if isinstance(layer, Paged)
        else memory
        for index, (layer, memory) in enumerate(zip(specs, layers, strict=True))
    )


class Headed:
    """A model whose prediction head follows each of its passes, over the same tokens, and stores its rows too."""

    def __init__(self, model: Model, head: DraftHead, arena: Arena) -> None:
        """`arena` has the head's layers."""
        self.spec = model.spec
        self.draft_head = head
        self.logits = model.logits
        self.following: list[int] = []
        """The token that follows the pass, where it is known: the prompt goes on."""
        self._model = model
        self._arena = arena

    def forward(self, step: Step, memory: Sequence[LayerMemory]) -> torch.Tensor:
        """Return the model's residuals, once the head has passed over them."""
        hidden_TC = self._model.forward(step, memory)
        last = step.count.cumsum(0) - 1
        tokens = step.tokens.roll(-1)
        known = torch.tensor(self.following, dtype=tokens.dtype, device=tokens.device)
        tokens[last] = known if self.following else self.logits(hidden_TC[last]).argmax(-1)
        state_TC = self.draft_head.begin(hidden_TC)
        self.draft_head.forward(state_TC, replace(step, tokens=tokens), self._arena.draft_layers)
        return hidden_TC


class Session:
    """A model and an unquantized memory whose paged layers are watched, those of its prediction head included."""

    def __init__(
        self,
        model: Model,
        dtype: Literal["float32", "bfloat16"],
        longest: int,
        ends: frozenset[int],
        decode: int,
        device: torch.device | str = "cpu",
    ) -> None:
        """Allocate float32 rows for BATCH sequences of `longest` tokens; refuse a model without rows."""
        spec, head = model.spec, model.draft_head
        self.fields = places(spec, draft=head is not None)
        if not self.fields:
            raise Refused("this model has no layer with a KV cache, so there is nothing to calibrate")
        if longest > spec.max_positions:
            raise Refused(
                f"the longest prompt and its {decode} decoded tokens take {longest} positions, but the checkpoint has "
                f"{spec.max_positions}; shorten the prompts"
            )
        formats = [chosen or () for chosen in choose_formats(spec, "f32", "", dtype)]
        drafts = [chosen or () for chosen in choose_formats(spec, "f32", "", dtype, draft=True)] if head else None
        layout = plan(spec, formats, draft_formats=drafts, max_model_len=longest, max_num_seqs=BATCH, dtype=dtype)
        self._arena = Arena(spec, layout, select(spec, formats, drafts or (), device=device), device=device)
        self._spec, self._layers = spec, (*self._arena.layers, *self._arena.draft_layers)
        self._headed = None if head is None else Headed(model, head, self._arena)
        self._runner = Runner(self._headed or model, self._arena)
        self._ends = ends
        self._decode = decode
        self.decoded = 0
        """Tokens that the model generated itself."""

    def run(self, prompts: Sequence[Sequence[int]], sinks: Mapping[Place, Sink]) -> None:
        """Store prompts one by one, then continue them together; at most BATCH of them."""
        watched = watch(self._spec, self._layers, sinks)
        trunk = len(self._arena.layers)
        self._arena.layers, self._arena.draft_layers = watched[:trunk], watched[trunk:]
        sequences = [self._arena.open() for _ in prompts]
        try:
            self._continue(
                [(held, self._store(held, list(prompt))) for held, prompt in zip(sequences, prompts, strict=True)]
            )
        finally:
            for held in sequences:
                self._arena.close(held)

    def _store(self, held: Held, prompt: list[int]) -> int:
        """Store a prompt and return the token that follows it."""
        following = -1
        for start in range(0, len(prompt), _PREFILL):
            end = start + _PREFILL
            if self._headed is not None:
                self._headed.following = prompt[end : end + 1]
            (following,) = self._step([Chunk(held, prompt[start:end])])
        return following

    def _continue(self, running: list[tuple[Held, int]]) -> None:
        for _ in range(self._decode):
            running = [(held, token) for held, token in running if token not in self._ends]
            if not running:
                return
            self.decoded += len(running)
            following = self._step([Chunk(held, [token]) for held, token in running])
            running = [(held, token) for (held, _), token in zip(running, following, strict=True)]

    def _step(self, chunks: list[Chunk]) -> list[int]:
        found: list[int] = []
        for logits_QV in self._runner.step(chunks, [1] * len(chunks)):
            if isinstance(logits_QV, Corrupted):
                raise logits_QV
            found.append(int(logits_QV[-1].argmax()))
        return found
