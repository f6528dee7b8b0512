"""Failure 2: one fp8 scale for the latent and the rotary key of an MLA model."""

# Shape suffixes: T tokens, H heads, D dim.

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.core.spec import Paged
from truekv.engine.run import Runner
from truekv.formats.choice import codecs
from truekv.formats.fit import FP8_TOP
from truekv.models.weights import Checkpoint
from truekv.serve.assemble import locate
from truekv.serve.demo.case import Case, Outcome
from truekv.serve.demo.questions import Question
from truekv.serve.demo.stage import Stage
from truekv.tiny.tasks import Example, correct, scenarios
from truekv.trust.observe import Seen, places, watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Step
    from truekv.core.protocols import PagedMemory
    from truekv.memory.arena import Arena
    from truekv.serve.demo.stage import Answer
    from truekv.tiny.tasks import Scenario

SCENARIOS: Final = 20
CANDIDATES: Final = 120
"""Conversations drawn; the shortest SCENARIOS of them are played, to keep the demo short."""
COMPARED: Final = 5
"""Scenarios whose logits are compared."""
LONGEST: Final = 24
TOLERANCE: Final = 0.01
FORMATS: Final = ("int8/int8", "kv4/int8")


@dataclass(frozen=True, slots=True)
class Score:
    """What a memory made of the scenarios."""

    answers: Sequence[Answer]
    right: Sequence[bool]
    kl: float

    @property
    def share(self) -> float:
        """Of the scenarios, how many ended with the right answer."""
        return sum(self.right) / len(self.right)


def run(seed: int) -> Case:
    """Play multi-turn scenarios through one shared scale, through truekv's formats, and unquantized."""
    stage = Stage("tiny-mla")
    questions = draw_scenarios(stage, seed)
    reference = [correct(item.example, stage.text(item.reference.tokens)) for item in questions]
    gains = latent_gains(stage.name)
    shared = shared_scale(stage, gains, questions[0].prompt)
    naive = play(stage, shared_arena(stage, gains, shared), questions)
    shipped = divergence_of(stage, shared_arena(stage, gains, 1.0, sequences=1), questions)
    ours = {name: play(stage, stage.arena(name, sequences=len(questions)), questions) for name in FORMATS}
    chosen = ours[FORMATS[0]]
    goal = sum(reference) / len(reference)
    lost = [place for place, good in enumerate(reference) if good and not naive.right[place]]
    shown = lost[0] if lost else 0
    close = goal > 0 and all(goal - score.share <= TOLERANCE for score in ours.values())
    return Case(
        case=2,
        title="FP8 on MLA latents",
        model=stage.name,
        question=questions[shown].text,
        reference=Outcome(
            stage.text(questions[shown].reference.tokens),
            0.0,
            correct=reference[shown],
            detail=f"{sum(reference)} of {len(reference)} scenarios right",
        ),
        naive=_outcome(
            stage,
            naive,
            shown,
            good=goal - naive.share <= TOLERANCE < goal,
            more=f"one scale {shared:.2g} from the latent; with scale 1 as shipped: KL {shipped:.1e}",
        ),
        truekv=_outcome(
            stage, chosen, shown, good=close, more="; ".join(f"{name}: {_told(score)}" for name, score in ours.items())
        ),
        passed=reference[shown] and close and goal - naive.share > TOLERANCE and chosen.kl < min(naive.kl, shipped),
    )


def draw_scenarios(stage: Stage, seed: int, count: int = SCENARIOS) -> list[Question]:
    """Draw conversations with a question at their end, and what the plain model answers to it."""
    drawn = [ending(scenario) for scenario in scenarios(seed, CANDIDATES)]
    prompts = sorted(((stage.prompt(example), example) for example in drawn), key=lambda pair: len(pair[0]))[:count]
    arena = stage.arena("f32", sequences=count)
    answers = stage.answer(arena, [prompt for prompt, _ in prompts], LONGEST)
    return [Question(example, prompt, answer) for (prompt, example), answer in zip(prompts, answers, strict=True)]


def ending(scenario: Scenario) -> Example:
    """Return a scenario up to its last graded question; the history holds the right answers."""
    last = max(place for place, turn in enumerate(scenario.turns) if turn.task)
    messages: list[dict[str, str]] = [{"role": "system", "content": scenario.system}]
    for turn in scenario.turns[:last]:
        messages += [{"role": "user", "content": turn.user}, {"role": "assistant", "content": turn.answer}]
    asked = scenario.turns[last]
    return Example([*messages, {"role": "user", "content": asked.user}], asked.answer, asked.task)


def play(stage: Stage, arena: Arena, questions: Sequence[Question]) -> Score:
    """Let a memory answer all questions, and compare its logits with the plain model's on some of them."""
    answers = stage.answer(arena, [item.prompt for item in questions], LONGEST)
    right = [correct(item.example, stage.text(said.tokens)) for item, said in zip(questions, answers, strict=True)]
    return Score(answers, right, divergence_of(stage, arena, questions))


def divergence_of(stage: Stage, arena: Arena, questions: Sequence[Question]) -> float:
    """Mean KL to the plain model along its own answers to some of the questions; infinite if numbers broke."""
    kls = [stage.kl(arena, item.prompt, item.reference) for item in questions[:COMPARED]]
    return sum(math.inf if kl is None else kl for kl in kls) / len(kls)


class SharedScale:
    """A paged memory that stores all fields through one static fp8 scale, as one-scale engines do.

    They keep the latent as the checkpoint's norm leaves it; ours keeps it at unit RMS, with the norm's
    weight folded into the projections. So the weight is put back before the cast and taken out after.
    """

    def __init__(self, memory: PagedMemory, gains: Sequence[torch.Tensor], scale: float) -> None:
        """`gains`: for each field what its rows are multiplied by in those engines, [D]."""
        self._memory = memory
        self._gains = gains
        self._scale = scale
        self._codec = codecs()["fp8_e4m3"]

    def attend(
        self, queries: tuple[torch.Tensor, ...], rows: tuple[torch.Tensor, ...], scale: float, step: Step
    ) -> torch.Tensor:
        """Round the rows to fp8 with the one scale, then store them as they are."""
        rounded = tuple(self._round(values, gain) for values, gain in zip(rows, self._gains, strict=True))
        return self._memory.attend(queries, rounded, scale, step)

    def _round(self, rows_THD: torch.Tensor, gain_D: torch.Tensor) -> torch.Tensor:
        data = self._codec.encode(rows_THD.float() * gain_D / self._scale)
        return self._codec.decode(data, rows_THD.shape[-1]) * self._scale / gain_D


def shared_arena(stage: Stage, gains: dict[int, torch.Tensor], scale: float, sequences: int = SCENARIOS) -> Arena:
    """Build a float32 memory behind one shared fp8 scale."""
    arena = stage.arena("f32", sequences=sequences)
    arena.layers = tuple(
        SharedScale(cast("PagedMemory", memory), [gains[index], torch.ones(layer.fields[1].dim)], scale)
        if isinstance(layer, Paged)
        else memory
        for index, (layer, memory) in enumerate(zip(stage.spec.layers, arena.layers, strict=True))
    )
    return arena


def shared_scale(stage: Stage, gains: dict[int, torch.Tensor], prompt: list[int]) -> float:
    """Return amax / 448 of the latents, as those engines store them, of a real prompt."""
    seen = {place: Seen(item) for place, item in places(stage.spec).items()}
    arena = stage.arena("f32")
    arena.layers = watch(stage.spec, arena.layers, seen)
    Runner(stage.model, arena).step([Chunk(arena.open(), prompt)], [0])
    largest = (
        torch.maximum(one.rows.high, -one.rows.low)[0] * gains[layer]
        for (layer, name), one in seen.items()
        if name == "latent"
    )
    return max(float(size.max()) for size in largest) / FP8_TOP


def latent_gains(model: str) -> dict[int, torch.Tensor]:
    """Read the weight of every layer's latent norm, [latent rank], from the checkpoint."""
    from safetensors import safe_open

    checkpoint = Checkpoint.open(locate(model))
    gains: dict[int, torch.Tensor] = {}
    for name, header in checkpoint.headers.items():
        if found := re.fullmatch(r"model\.layers\.(\d+)\.self_attn\.kv_a_layernorm\.weight", name):
            with safe_open(checkpoint.directory / header.file, framework="pt") as file:  # pyright: ignore[reportUnknownVariableType] (untyped library)
                gains[int(found[1])] = file.get_tensor(name).float()
    return gains


def _told(score: Score) -> str:
    return f"{sum(score.right)} of {len(score.right)} scenarios right, KL {score.kl:.1e}"


def _outcome(stage: Stage, score: Score, shown: int, *, good: bool, more: str) -> Outcome:
    answer = score.answers[shown]
    said = stage.text(answer.tokens) or answer.fault
    return Outcome(said, score.kl, good, f"{sum(score.right)} of {len(score.right)} scenarios right; {more}")
