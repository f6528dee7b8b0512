"""What a model says and remembers when nothing is cached: every prefix from nothing, in one chunk, alone."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from truekv.core.batch import Chunk
from truekv.engine.sample import Sampler
from truekv.kernels.reference.paged import planes
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq
    from contextlib import AbstractContextManager

    from truekv import LLM, SamplingParams
    from truekv.core.batch import Sequence


@dataclass(frozen=True)
class Seen:
    """All of one pass over T tokens."""

    logits: torch.Tensor
    """[T, vocab]"""
    rows: list[torch.Tensor]
    """Per plane of every field of every paged layer: the bytes stored, [T, heads, width]."""
    states: list[torch.Tensor]
    """Per slab of every recurrent layer: the state after the last token."""


class Oracle:
    """Computes with the weights, formats and frames of an LLM, and with nothing else of it."""

    def __init__(self, llm: LLM, apart: Callable[[], AbstractContextManager[None]] = nullcontext) -> None:
        """`apart`: what it computes in; whoever changes the code under test keeps the change from it there."""
        self.model = llm._engine.runner.model
        self.blueprint = llm._blueprint
        self.longest = llm.max_model_len
        self._apart = apart
        self._seen: dict[tuple[int, ...], Seen] = {}
        self._answers: dict[tuple[Any, ...], list[int]] = {}

    def look(self, tokens: Seq[int]) -> Seen:
        """Pass over a prefix; what was seen once is remembered."""
        key = tuple(tokens)
        if key not in self._seen:
            with self._apart():
                self._seen[key] = self._look(list(tokens))
        return self._seen[key]

    def answer(self, prompt: Seq[int], params: SamplingParams) -> list[int]:
        """The tokens that follow a prompt, each chosen after a pass over all before it."""
        key = (*prompt, params)
        if key not in self._answers:
            with self._apart():
                self._answers[key] = self._answer(prompt, params)
        return self._answers[key]

    def _answer(self, prompt: Seq[int], params: SamplingParams) -> list[int]:
        sampler = Sampler(params, prompt, self.model.spec.vocab_size, frozenset())
        tokens = list(prompt)
        for _ in range(min(params.max_tokens, self.longest - len(prompt))):
            tokens.append(sampler.choose(self.look(tokens).logits[-1]))
        return tokens[len(prompt) :]

    def _look(self, tokens: list[int]) -> Seen:
        blueprint, spec = self.blueprint, self.model.spec
        planned = plan(spec, blueprint.formats, max_model_len=self.longest, dtype=blueprint.plan.dtype)
        arena = Arena(spec, planned, blueprint.kernels, blueprint.frames)
        sequence = arena.open()
        with torch.inference_mode():
            hidden = self.model.forward(arena.reserve([Chunk(sequence, tokens)]), arena.layers)
            logits = self.model.logits(hidden)
        arena.advance(sequence, len(tokens))
        return Seen(logits, stored_rows(arena, sequence), states(arena, sequence))


def stored_rows(arena: Arena, sequence: Sequence) -> list[torch.Tensor]:
    """The bytes of every real token of a sequence: per plane of every field [T, heads, width]."""
    found: list[torch.Tensor] = []
    for layer in arena.layers:
        if isinstance(layer, PagedLayer):
            for stored in layer.stored:
                for plane in planes(stored):
                    lines = plane[sequence.pages].transpose(1, 2).flatten(0, 1)
                    found.append(lines[: sequence.position].clone())
    return found


def states(arena: Arena, sequence: Sequence) -> list[torch.Tensor]:
    """The state of a sequence in every recurrent layer; accepted drafts may still be in the log."""
    layers = [layer for layer in arena.layers if isinstance(layer, StateLayer)]
    return [slab[sequence.slot].clone() for layer in layers for slab in layer.state.values()]
