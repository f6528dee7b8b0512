"""Failure 5: drafts verified in a captured step, on a hybrid with 3-bit rows."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from truekv.core.batch import Chunk
from truekv.core.errors import Corrupted
from truekv.core.lazy import torch
from truekv.engine.capture import Captured
from truekv.engine.run import Runner
from truekv.engine.speculate.ngram import Ngram
from truekv.memory.arena import Arena
from truekv.serve.demo.case import Case, Outcome
from truekv.serve.demo.questions import Result, ask, draw, outcome
from truekv.serve.demo.stage import PREFILL, Answer, Stage
from truekv.tiny.tasks import correct
from truekv.trust.measure import divergence

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, LayerMemory, Model, Stored
    from truekv.core.spec import ModelSpec, Paged
    from truekv.kernels.table import PagedKernels
    from truekv.serve.demo.questions import Question

FORMAT: Final = "turboquant_3bit_nc"
DRAFTS: Final = 3
WANTED: Final = {"tool_call": 1, "secret": 2}


def run(seed: int) -> Case:
    """Answer with n-gram drafts and captured verify steps: naively twice, then as truekv does."""
    stage = Stage("tiny-hybrid")
    questions = draw(stage, WANTED, seed)
    plain = ask(stage, stage.arena(FORMAT, sequences=len(questions)), questions)
    kernels = stage.arena(FORMAT).kernels
    baked = stage.arena(
        FORMAT, sequences=2, drafts=DRAFTS, kernels=replace(kernels, paged=FreshTokensOnly(kernels.paged)), guards=False
    )
    kept = stage.arena(FORMAT, sequences=2, drafts=DRAFTS, kind=KeepsRejected, guards=False)
    naive = speculated(stage, baked, questions)
    stale = speculated(stage, kept, questions)
    ours = speculated(stage, stage.arena(FORMAT, sequences=2, drafts=DRAFTS), questions)
    same = max(difference(a, b) for a, b in zip(ours.answers, plain.answers, strict=True))
    shown = naive.right.index(False) if not all(naive.right) else 0
    return Case(
        case=5,
        title="Speculation, 3-bit rows and a captured step",
        model=stage.name,
        question=questions[shown].text[-300:],
        reference=Outcome(stage.text(questions[shown].reference.tokens), 0.0, correct=True),
        naive=outcome(
            stage,
            naive,
            shown,
            f"the capture baked 'attend to the new tokens'; state kept after a rejected draft: KL {stale.kl:.2g}"
            if stale.kl is not None
            else "the capture baked 'attend to the new tokens'; state kept after a rejected draft: NaN",
        ),
        truekv=outcome(
            stage,
            ours,
            shown,
            f"{ours.accepted} drafts accepted, {ours.rejected} rejected; logits differ from those without drafts and "
            f"capture by at most {same:.1e}",
        ),
        passed=all(ours.right)
        and ours.accepted > 0
        and ours.rejected > 0
        and same <= 1e-4
        and not all(naive.right)
        and (stale.kl is None or plain.kl is None or stale.kl > plain.kl),
    )


@dataclass(frozen=True, slots=True)
class Speculated(Result):
    """A result, and how the guesses fared."""

    accepted: int = 0
    rejected: int = 0


def speculated(stage: Stage, arena: Arena, questions: Sequence[Question]) -> Speculated:
    """Answer questions with drafts verified in captured steps; KL along each answer's own tokens."""
    model = Replayed(stage.model, arena, width=-(-max(len(question.prompt) for question in questions) // 32) + 3)
    answers: list[Answer] = []
    kls: list[float] = []
    accepted = rejected = 0
    for question in questions:
        answer, good, bad = speculate(stage, model, arena, question.prompt)
        answers.append(answer)
        accepted, rejected = accepted + good, rejected + bad
        plain = stage.score(stage.arena("f32"), question.prompt, answer.tokens)
        kls.append(divergence(plain, answer.logits).mean)
    right = [
        correct(question.example, stage.text(answer.tokens))
        for question, answer in zip(questions, answers, strict=True)
    ]
    finite = not any(answer.fault for answer in answers)
    return Speculated(answers, right, sum(kls) / len(kls) if finite else None, accepted, rejected)


def speculate(stage: Stage, model: Model, arena: Arena, prompt: list[int], limit: int = 64) -> tuple[Answer, int, int]:
    """Decode greedily, guessing ahead; return the answer and how many drafts were accepted and rejected."""
    runner, proposer, held = Runner(model, arena), Ngram(), arena.open()
    *_, prefilled = runner.teacher_force(held, prompt, itertools.repeat(PREFILL))
    first = prefilled[-1]
    rows, tokens, fault, rejected = [first], [int(first.argmax())], "", 0
    steps = 0
    while len(tokens) < limit and tokens[-1] not in stage.ends:
        guess = proposer.propose([*prompt, *tokens], DRAFTS)
        # A captured step has one size: a short guess is filled up with one that will be rejected.
        guess += [0] * (DRAFTS - len(guess))
        (logits,) = runner.step([Chunk(held, [tokens[-1], *guess], DRAFTS)], [1 + DRAFTS])
        if isinstance(logits, Corrupted):
            fault = str(logits)
            break
        chosen = [int(token) for token in logits.argmax(-1)]
        good = next((place for place in range(DRAFTS) if guess[place] != chosen[place]), DRAFTS)
        arena.advance(held, 1 + good)
        rejected += DRAFTS - good
        steps += 1
        for place in range(good + 1):
            rows.append(logits[place])
            tokens.append(chosen[place])
            if chosen[place] in stage.ends:
                break
    arena.close(held)
    return Answer(tokens, torch.stack(rows), fault), max(len(tokens) - 1 - steps, 0), rejected


def difference(one: Answer, other: Answer) -> float:
    """Largest difference of two answers' logits, position by position; infinite if the tokens differ."""
    if one.tokens != other.tokens:
        return float("inf")
    return float((one.logits - other.logits).abs().max())


class Replayed:
    """A model whose verify steps replay one capture, made on a scratch sequence as a server would at start."""

    draft_head: None = None

    def __init__(self, model: Model, arena: Arena, width: int) -> None:
        """Capture a verify step of one sequence and a page table of `width` pages."""
        self._model = model
        self._width = width
        scratch = arena.open()
        step = self._padded(arena.reserve([Chunk(scratch, [0] * (1 + DRAFTS), DRAFTS)]))

        def forward(recorded: Step) -> torch.Tensor:
            return model.forward(recorded, arena.layers)

        self._captured = Captured(forward, step)
        arena.close(scratch)

    @property
    def spec(self) -> ModelSpec:
        """What the model is."""
        return self._model.spec

    def forward(self, step: Step, memory: Sequence[LayerMemory]) -> torch.Tensor:
        """Replay a verify step; run any other as it is."""
        if len(step.tokens) == 1 + DRAFTS:
            return self._captured(self._padded(step))
        return self._model.forward(step, memory)

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Map the residual to logits."""
        return self._model.logits(hidden)

    def _padded(self, step: Step) -> Step:
        missing = self._width - step.pages.shape[1]
        return replace(step, pages=torch.cat([step.pages, step.pages[:, -1:].expand(-1, missing)], 1))


class FreshTokensOnly:
    """Naive: without context there is nothing to read but the new tokens, decided on the host."""

    def __init__(self, kernels: PagedKernels) -> None:
        """Wrap the kernels that would be right."""
        self._kernels = kernels

    def refusal(self, layer: Paged, formats: tuple[CacheFormat, ...]) -> str | None:
        """Refuse nothing that the kernels would run."""
        return self._kernels.refusal(layer, formats)

    def store(self, fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
        """Store rows as the kernels do."""
        self._kernels.store(fields, rows, step)

    def attend(
        self,
        queries: tuple[torch.Tensor, ...],
        fields: tuple[Stored, ...],
        scale: float,
        window: int | None,
        step: Step,
    ) -> torch.Tensor:
        """Attend, taking the shortcut where the host sees no context: right eagerly, baked by a capture."""
        if int(step.position.max()) == 0:
            window = int(step.count.max())
        return self._kernels.attend(queries, fields, scale, window, step)


class KeepsRejected(Arena):
    """Naive: the recurrent state goes on from the last draft, accepted or not."""

    def reserve(self, chunks: Sequence[Chunk]) -> Step:
        """Describe the step, claiming that every logged draft became real."""
        step = super().reserve(chunks)
        verified = torch.tensor([chunk.drafts > 0 for chunk in chunks])
        decoding = verified & (step.position > 0) & self._verified_before(chunks)
        return replace(step, replay=torch.where(decoding, self.plan.drafts, step.replay))

    def _verified_before(self, chunks: Sequence[Chunk]) -> torch.Tensor:
        seen = getattr(self, "_seen", set[int]())
        known = torch.tensor([chunk.sequence.slot in seen for chunk in chunks])
        self._seen = seen | {chunk.sequence.slot for chunk in chunks if chunk.drafts}
        return known
