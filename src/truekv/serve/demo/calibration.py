"""Failure 1: fp8 scales taken from one dummy pass through recurrent state that nobody opened."""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.engine.run import Runner
from truekv.formats.fit import FP8_TOP
from truekv.formats.frame import Frame
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer
from truekv.serve.demo.case import Case, Outcome
from truekv.serve.demo.questions import ask, draw, outcome
from truekv.serve.demo.stage import Stage
from truekv.trust.observe import Seen, places, watch

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.spec import ModelSpec
    from truekv.serve.demo.questions import Question, Result
    from truekv.trust.observe import Place

FORMAT = "fp8_e4m3"
WANTED = {"arithmetic": 2, "fact": 8, "tool_call": 2}
NEGLIGIBLE = 1e-5
"""Nats per token below which two memories are equally close to the plain model: rounding decides which is closer."""
PADDING = "<|endoftext|>"
DUMMY_TOKENS = 256
"""Length of a profiling pass: as many tokens as a step may have, all of them padding."""


class Unopened(Arena):
    """Hands out a state slot as its last user left it, which is what a profiling pass gets."""

    def open(self, tokens: Sequence[int] = (), *, salt: str = "", reuse: bool = True) -> Held:
        """Give a slot without zeroing it."""
        slot = self._free_slots[-1]
        kept = [
            (slab, slab[slot].clone())
            for layer in self.layers
            if isinstance(layer, StateLayer)
            for slab in layer.state.values()
        ]
        held = super().open(tokens, salt=salt, reuse=reuse)
        for slab, values in kept:
            slab[slot] = values
        return held


def run(seed: int) -> Case:
    """Answer through fp8 with a dummy pass's scales, with scale 1, with measured frames, and unquantized."""
    stage = Stage("tiny-hybrid")
    questions = draw(stage, WANTED, seed)
    frozen = dummy_scales(stage, questions[0].prompt)
    real = prompt_scales(stage, questions)

    def through(scales: dict[Place, float] | None) -> Result:
        frames = None if scales is None else per_tensor(stage.spec, scales)
        return ask(stage, stage.arena(FORMAT, sequences=len(questions), frames=frames), questions)

    naive, unit, ours = through(frozen), through(dict.fromkeys(frozen, 1.0)), through(None)
    shown = naive.right.index(False) if not all(naive.right) else 0
    short = min(frozen[place] / real[place] for place in frozen)
    told = outcome(stage, ours, shown, "frames measured on real prompts through opened state")
    known = ours.kl is not None and unit.kl is not None
    return Case(
        case=1,
        title="Calibration through recurrent state that nobody opened",
        model=stage.name,
        question=questions[shown].text,
        reference=Outcome(stage.text(questions[shown].reference.tokens), 0.0, correct=True),
        naive=outcome(
            stage,
            naive,
            shown,
            f"scales of a dummy pass, down to {short:.0%} of what these prompts need; scale 1 instead: "
            f"{sum(unit.right)} of {len(unit.right)} right, KL {_number(unit.kl)}",
        ),
        truekv=told,
        passed=told.correct and not all(naive.right) and known and (ours.kl or 0.0) <= max(unit.kl or 0.0, NEGLIGIBLE),
    )


def dummy_scales(stage: Stage, used: list[int]) -> dict[Place, float]:
    """Run one pass over dummy tokens through unopened state, and freeze amax / 448 of every field.

    `used`: the conversation whose rows lay before in the memory that the pass is given.
    """
    arena = stage.arena("f32", kind=Unopened, guards=False)
    _leave_behind(stage, used, arena)
    (padding,) = stage.tokenizer.encode(PADDING, add_special_tokens=False)
    return _largest(stage, arena, [[padding] * DUMMY_TOKENS])


def prompt_scales(stage: Stage, questions: Sequence[Question]) -> dict[Place, float]:
    """Return amax / 448 of every field over real prompts through opened state."""
    return _largest(stage, stage.arena("f32", sequences=len(questions)), [item.prompt for item in questions])


def per_tensor(spec: ModelSpec, scales: dict[Place, float]) -> dict[Place, Frame]:
    """Return frames with one scale for all heads and channels of a field, and no centre."""
    return {
        place: Frame(scale=torch.full((item.heads, item.dim), scales[place])) for place, item in places(spec).items()
    }


def _largest(stage: Stage, arena: Arena, prompts: Sequence[list[int]]) -> dict[Place, float]:
    seen = {place: Seen(item) for place, item in places(stage.spec).items()}
    arena.layers = watch(stage.spec, arena.layers, seen)
    for prompt in prompts:
        held = arena.open()
        Runner(stage.model, arena).step([Chunk(held, prompt)], [0])
        arena.close(held)
    return {place: float(one.rows.amax.max()) / FP8_TOP for place, one in seen.items()}


def _leave_behind(stage: Stage, used: list[int], arena: Arena) -> None:
    """Fill the state slots with what a conversation left in other memory: its keys and values, read as state.

    Memory that is handed out again holds whatever its last owner wrote. The bytes are those of float32
    rows, so every number is finite.
    """
    earlier = stage.arena("f32", guards=False)
    Runner(stage.model, earlier).step([Chunk(earlier.open(), used)], [0])
    left = torch.cat([layer.data.flatten() for layer in earlier.layers if isinstance(layer, PagedLayer)])
    numbers = left.view(torch.float32)
    for layer in arena.layers:
        if isinstance(layer, StateLayer):
            for slab in layer.state.values():
                repeats = -(-slab.numel() // numbers.numel())
                slab.copy_(numbers.repeat(repeats)[: slab.numel()].reshape(slab.shape))


def _number(kl: float | None) -> str:
    return "NaN" if kl is None else f"{kl:.1e}"
