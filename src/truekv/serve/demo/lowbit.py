"""Failure 3: a 4-bit block format on a hybrid, without a frame and with one."""

from __future__ import annotations

from truekv.serve.demo.case import Case, Outcome
from truekv.serve.demo.questions import ask, draw, outcome
from truekv.serve.demo.stage import Stage

NAIVE = "q4_0"
FRAMED = "q4_0+hadamard"
FAMILY = ("q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl")
WANTED = {"arithmetic": 1, "fact": 2, "tool_call": 1, "secret": 2}


def run(seed: int) -> Case:
    """Ask a hybrid the same questions through plain q4_0 rows, framed q4_0 rows, and unquantized ones."""
    stage = Stage("tiny-hybrid")
    questions = draw(stage, WANTED, seed)

    def arena(name: str):  # noqa: ANN202 (Arena)
        return stage.arena(name, sequences=len(questions))

    naive = ask(stage, arena(NAIVE), questions)
    costs = {name: ask(stage, arena(f"{name}+hadamard"), questions) for name in FAMILY}
    truekv = costs[FRAMED.removesuffix("+hadamard")]
    shown = naive.right.index(False) if not all(naive.right) else 0
    kl = {name: result.kl for name, result in costs.items()}
    table = ", ".join(f"{name} {value:.1e}" if value is not None else f"{name} NaN" for name, value in kl.items())
    told = outcome(stage, truekv, shown, f"KL per token with Hadamard and measured frame: {table}")
    return Case(
        case=3,
        title="Low-bit KV on a hybrid",
        model=stage.name,
        question=questions[shown].text[-300:],
        reference=Outcome(stage.text(questions[shown].reference.tokens), 0.0, correct=True),
        naive=outcome(stage, naive, shown, f"{NAIVE} rows as they are, outliers and all"),
        truekv=told,
        passed=told.correct and not all(naive.right) and all(value is not None for value in kl.values()),
    )
