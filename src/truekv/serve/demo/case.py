"""One failure, shown three ways: the plain model, the naive method, and truekv."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Outcome:
    """What one method made of the questions of a case."""

    answer: str
    """What the model visibly said, or the sentence with which it was refused."""
    kl: float | None
    """Mean KL to the reference over the answer's positions, nats per token; None where no logits exist."""
    correct: bool
    detail: str = ""
    """A measured fact worth reading: scores, scales, bytes."""


@dataclass(frozen=True, slots=True)
class Case:
    """A failure of FAILURES.md, run on an embedded model."""

    case: int
    title: str
    model: str
    question: str
    reference: Outcome
    naive: Outcome
    truekv: Outcome
    passed: bool
    """The reference and truekv are right, the naive method is not, and every bound of the case holds."""
