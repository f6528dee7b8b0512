"""An embedded model on which methods are tried: same weights, same questions, another memory."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from truekv.core.batch import Chunk
from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.options import EngineOptions, Speculation
from truekv.engine.run import Runner
from truekv.engine.tokens import end_tokens
from truekv.memory.arena import Arena
from truekv.serve.assemble import design
from truekv.trust.measure import divergence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.protocols import Model
    from truekv.kernels.table import Kernels
    from truekv.memory.arena import Frames
    from truekv.serve.assemble import Blueprint
    from truekv.tiny.tasks import Example

PREFILL = 512
"""Tokens of a prefill step."""
ROOM = 2560
"""Tokens that a conversation may take: 2,000 of filler, the turns around it, and the answer."""


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer, and what stopped it."""

    tokens: list[int]
    """The chosen ids, the end token included."""
    logits: torch.Tensor
    """The logits behind each token, float32 [len(tokens), vocab]."""
    fault: str = ""
    """The sentence with which the engine refused to go on, if it did."""


class Stage:
    """One embedded model, loaded once, in float32."""

    def __init__(self, model: str) -> None:
        """Load an embedded model by name, such as tiny-hybrid."""
        self.name = model
        blueprint = self._design("f32", 1, 0)
        if blueprint.tokenizer is None or blueprint.template is None:
            raise Refused(f"{model} has no tokenizer or no chat template; install the package again")
        self.tokenizer = blueprint.tokenizer
        self.template = blueprint.template
        self.model: Model = blueprint.checkpoint.load("float32", blueprint.kernels.ops)
        self.spec = self.model.spec
        self.ends = end_tokens(blueprint.checkpoint.directory, self.tokenizer)

    def arena(
        self,
        kv_cache_dtype: str,
        *,
        sequences: int = 1,
        drafts: int = 0,
        frames: Frames | None = None,
        kernels: Kernels | None = None,
        kind: type[Arena] = Arena,
        guards: bool = True,
    ) -> Arena:
        """Build the memory that `--kv-cache-dtype` would; naive methods replace frames, kernels, arena or guards."""
        plan = self._design(kv_cache_dtype, sequences, drafts)
        return kind(
            self.spec,
            plan.plan,
            plan.kernels if kernels is None else kernels,
            plan.frames if frames is None else frames,
            poison=guards,
            check_finite=guards,
        )

    def prompt(self, example: Example) -> list[int]:
        """Return the ids of an example's conversation, up to where the assistant speaks."""
        text = self.template.render(example.messages, example.tools)
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text(self, tokens: list[int]) -> str:
        """Return the text of an answer, its end token left out."""
        return self.tokenizer.decode(tokens).strip()

    def answer(self, arena: Arena, prompts: Sequence[list[int]], limit: int = 64) -> list[Answer]:
        """Decode every prompt greedily, all together, until the end token, `limit` tokens, or a fault."""
        runner = Runner(self.model, arena)
        running = [_Running(arena.open(), list(prompt)) for prompt in prompts]
        for each in running:
            while len(each.pending) > PREFILL:
                each.take(*runner.step([Chunk(each.held, each.shift(PREFILL))], [0]))
        while active := [each for each in running if each.wants(limit, self.ends)]:
            results = _step(runner, [Chunk(each.held, each.shift(PREFILL)) for each in active])
            for each, result in zip(active, results, strict=True):
                each.take(result)
        for each in running:
            arena.close(each.held)
        return [each.answer(self.spec.vocab_size) for each in running]

    def score(self, arena: Arena, prompt: list[int], answer: list[int]) -> torch.Tensor:
        """Return the logits behind each token of a forced answer: float32 [len(answer), vocab]."""
        runner = Runner(self.model, arena)
        held = arena.open()
        forced = [*prompt, *answer[:-1]]
        logits = list(runner.teacher_force(held, forced, itertools.repeat(PREFILL)))
        arena.close(held)
        return torch.cat(logits)[-len(answer) :]

    def kl(self, arena: Arena, prompt: list[int], reference: Answer) -> float | None:
        """Mean KL(reference || this memory) over the reference's answer, nats per token; None if numbers broke."""
        try:
            return divergence(reference.logits, self.score(arena, prompt, reference.tokens)).mean
        except Corrupted:
            return None

    def _design(self, kv_cache_dtype: str, sequences: int, drafts: int) -> Blueprint:
        options = EngineOptions(
            device="cpu",
            dtype="float32",
            kv_cache_dtype=kv_cache_dtype,
            max_model_len=ROOM,
            max_num_seqs=sequences,
            speculative_config=Speculation(num_speculative_tokens=drafts) if drafts else None,
            enable_prefix_caching=False,
        )
        return design(self.name, options)


@dataclass(slots=True)
class _Running:
    """One prompt on its way to an answer."""

    held: Held
    pending: list[int]
    tokens: list[int] = field(default_factory=list[int])
    rows: list[torch.Tensor] = field(default_factory=list["torch.Tensor"])
    fault: str = ""

    def shift(self, count: int) -> list[int]:
        part, self.pending = self.pending[:count], self.pending[count:]
        return part

    def wants(self, limit: int, ends: frozenset[int]) -> bool:
        done = bool(self.tokens) and (len(self.tokens) >= limit or self.tokens[-1] in ends)
        return not self.fault and not done

    def take(self, result: torch.Tensor | Corrupted) -> None:
        if isinstance(result, Corrupted):
            self.fault = str(result)
        elif len(result):
            self.rows.append(result[-1])
            self.tokens.append(int(result[-1].argmax()))
            self.pending = self.tokens[-1:]

    def answer(self, vocab_size: int) -> Answer:
        logits = torch.stack(self.rows) if self.rows else torch.empty(0, vocab_size)
        return Answer(self.tokens, logits, self.fault)


def _step(runner: Runner, chunks: list[Chunk]) -> Sequence[torch.Tensor | Corrupted]:
    """Run one step; a guard that stops the whole step stops every sequence in it."""
    try:
        return runner.step(chunks, [1] * len(chunks))
    except Corrupted as error:
        return [error] * len(chunks)
