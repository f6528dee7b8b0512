"""Questions with a known right answer, chosen among those that the plain model answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.serve.demo.case import Outcome
from truekv.tiny.tasks import correct, examples

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.memory.arena import Arena
    from truekv.serve.demo.stage import Answer, Stage
    from truekv.tiny.tasks import Example

_PATIENCE = 4
"""How many candidates are drawn for each question wanted."""


@dataclass(frozen=True, slots=True)
class Question:
    """An example, its prompt, and what the unquantized model answers."""

    example: Example
    prompt: list[int]
    reference: Answer

    @property
    def text(self) -> str:
        """The last thing the user said."""
        return str(self.example.messages[-1]["content"])


@dataclass(frozen=True, slots=True)
class Result:
    """What a memory made of some questions."""

    answers: Sequence[Answer]
    right: Sequence[bool]
    kl: float | None
    """Mean over the questions; None if numbers broke in one of them."""


def draw(stage: Stage, wanted: dict[str, int], seed: int) -> list[Question]:
    """Draw held-out questions, so many of each task, that the plain model (f32 rows) answers rightly."""
    found: list[Question] = []
    for task, count in wanted.items():
        candidates = examples(task, "heldout", seed, count * _PATIENCE)
        prompts = [stage.prompt(example) for example in candidates]
        answers = stage.answer(stage.arena("f32", sequences=len(prompts)), prompts)
        right = [
            Question(example, prompt, answer)
            for example, prompt, answer in zip(candidates, prompts, answers, strict=True)
            if correct(example, stage.text(answer.tokens))
        ]
        if len(right) < count:
            raise Refused(f"{stage.name} answers {len(right)} of {len(candidates)} questions of the task {task}")
        found += right[:count]
    return found


def ask(stage: Stage, arena: Arena, questions: Sequence[Question]) -> Result:
    """Let a memory answer the questions, and compare its logits with the plain model's along the plain answers."""
    answers = stage.answer(arena, [question.prompt for question in questions])
    right = [
        correct(question.example, stage.text(answer.tokens))
        for question, answer in zip(questions, answers, strict=True)
    ]
    kls = [stage.kl(arena, question.prompt, question.reference) for question in questions]
    known = [kl for kl in kls if kl is not None]
    return Result(answers, right, sum(known) / len(known) if len(known) == len(kls) else None)


def outcome(stage: Stage, result: Result, shown: int, detail: str = "") -> Outcome:
    """Tell a result as the demo shows it, by the answer to one of its questions."""
    answer = result.answers[shown]
    said = stage.text(answer.tokens) or answer.fault
    score = f"{sum(result.right)} of {len(result.right)} right"
    return Outcome(said, result.kl, all(result.right), f"{score}; {detail}" if detail else score)
