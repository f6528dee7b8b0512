"""The embedded hybrid's prediction head guesses well, and its provisional rows never reach a later guess."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.engine.capture import StepGraphs
from truekv.engine.speculate.mtp import Predictor, Row
from truekv.engine.tokens import Tokenizer
from truekv.formats.choice import choose_formats
from truekv.formats.frame import load_frames
from truekv.kernels.native.library import library
from truekv.kernels.table import fastest_ops, select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint
from truekv.serve.assemble import FRAMES_FILE, locate
from truekv.serve.messages import ChatTemplate
from truekv.tiny import tasks
from truekv.trust.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Sequence as Held
    from truekv.core.protocols import Model
    from truekv.engine.speculate.mtp import Guess

DRAFTS = 3
CHECKPOINT = Checkpoint.open(locate("tiny-hybrid")).with_draft_head()
SPEC = CHECKPOINT.architecture.spec
END, UNUSED = 1010, 1020


@pytest.fixture(scope="module")
def model() -> Model:
    return CHECKPOINT.load("float32", fastest_ops())


def arena_for(kv: str = "f32", sequences: int = 4, *, check_finite: bool = True) -> Arena:
    formats, drafts = (choose_formats(SPEC, kv, "", "float32", draft=draft) for draft in (False, True))
    kernels = select(SPEC, formats, drafts)
    planned = plan(
        SPEC, formats, draft_formats=drafts, max_model_len=2048, max_num_seqs=sequences, drafts=DRAFTS, memory=16 << 20
    )
    frames = load_frames(CHECKPOINT.directory / FRAMES_FILE, SPEC)
    return Arena(SPEC, planned, kernels, frames, poison=True, check_finite=check_finite)


def prompts(task: str, count: int) -> list[list[int]]:
    tokenizer, template = Tokenizer.open(CHECKPOINT.directory), ChatTemplate.open(CHECKPOINT.directory)
    assert tokenizer is not None
    assert template is not None
    return [
        tokenizer.encode(template.render(example.messages, example.tools), add_special_tokens=False)
        for example in tasks.examples(task, "heldout", 3, count)
    ]


class Decoding:
    """Greedy decoding of one request in verified steps, as the engine does it; counts what was accepted."""

    def __init__(self, model: Model, arena: Arena, predictor: Predictor, wanted: int = DRAFTS) -> None:
        self.model, self.arena, self.predictor, self.wanted = model, arena, predictor, wanted
        self.held = arena.open()
        self.drafted = [0] * DRAFTS
        self.accepted = [0] * DRAFTS
        self.proposed: list[list[int]] = []

    def forward(self, tokens: list[int], drafts: int = 0) -> tuple[torch.Tensor, list[int]]:
        step = self.arena.reserve([Chunk(self.held, tokens, drafts=drafts, room=DRAFTS - 1)])
        with torch.inference_mode():
            hidden = self.model.forward(step, self.arena.layers)
            return hidden, self.model.logits(hidden).argmax(-1).tolist()

    def propose(self, hidden: torch.Tensor, following: list[int], wanted: int) -> list[int]:
        row = Row(self.held, self.held.position, following, range(len(following)), wanted)
        (drafts,) = self.predictor.propose([row], hidden)
        self.arena.advance(self.held, len(following))
        self.proposed.append(drafts)
        return drafts

    def prefill(self, prompt: list[int], chunk: int) -> tuple[int, list[int]]:
        """Store a prompt; return the token that follows it and the first drafts."""
        for start in range(0, len(prompt), chunk):
            part = prompt[start : start + chunk]
            hidden, best = self.forward(part)
            following = [*prompt[start + 1 : start + chunk + 1]]
            last = len(following) < len(part)
            drafts = self.propose(hidden, [*following, best[-1]] if last else following, self.wanted if last else 0)
        return best[-1], drafts

    def run(self, prompt: list[int], limit: int = 40, chunk: int = 48, spoil: Sequence[int] = ()) -> list[int]:
        """Return the tokens; the drafts of steps in `spoil` are replaced by wrong ones."""
        token, drafts = self.prefill(prompt, chunk)
        out = [token]
        while len(out) < limit and END not in out:
            guesses = [UNUSED] * len(drafts) if len(self.proposed) in spoil else drafts
            hidden, best = self.forward([out[-1], *guesses], len(guesses))
            right = next((place for place, guess in enumerate(guesses) if guess != best[place]), len(guesses))
            for place in range(min(right + 1, len(guesses))):
                self.drafted[place] += 1
                self.accepted[place] += place < right
            out += best[: right + 1]
            drafts = self.propose(hidden, best[: right + 1], self.wanted)
        self.arena.close(self.held)
        return out[: out.index(END)] if END in out else out


@pytest.mark.parametrize(
    ("task", "floors"), [("tool_call", (0.85, 0.75)), ("fact", (0.8, 0.6)), ("arithmetic", (0.75, 0.5))]
)
def test_most_first_drafts_of_the_embedded_hybrid_are_accepted(
    model: Model, task: str, floors: tuple[float, float]
) -> None:
    arena = arena_for()
    predictor = Predictor(model, arena)
    drafted, accepted = [0] * DRAFTS, [0] * DRAFTS
    for prompt in prompts(task, 5):
        speculated, plain = (Decoding(model, arena, predictor, wanted) for wanted in (DRAFTS, 0))
        assert speculated.run(prompt) == plain.run(prompt)
        assert not any(plain.drafted)
        for place in range(DRAFTS):
            drafted[place] += speculated.drafted[place]
            accepted[place] += speculated.accepted[place]
    assert drafted[0] >= 8
    for place, floor in enumerate(floors):
        assert accepted[place] / drafted[place] > floor, (accepted, drafted)


@pytest.mark.parametrize("kv", ["f32", "int8", "kv4", "fp8"])
def test_rows_of_rejected_guesses_change_no_later_proposal(model: Model, kv: str) -> None:
    """Where all drafts were wrong, the proposals are those of a request that made none before."""
    arena = arena_for(kv)
    assert [type(layer).__name__ for layer in arena.draft_layers] == ["PagedLayer"]
    predictor = Predictor(model, arena)
    (prompt,) = prompts("tool_call", 1)
    spoiled = Decoding(model, arena, predictor)
    answer = spoiled.run(prompt, spoil=range(100))
    assert not any(spoiled.accepted)
    assert spoiled.drafted[0] == len(answer), "every step rejected its first draft"
    # The same text at once: no guess was ever stored behind any of its tokens.
    checked = range(1, len(answer), 3)
    for count in checked:
        clean = Decoding(model, arena, predictor)
        token, drafts = clean.prefill([*prompt, *answer[:count]], 1 << 20)
        assert token == answer[count]
        assert drafts == spoiled.proposed[count - len(answer) - 1]
        arena.close(clean.held)
    assert len(checked) > 5


def test_the_batch_and_the_chunks_change_no_proposal(model: Model) -> None:
    arena = arena_for()
    predictor = Predictor(model, arena)
    asked = [*prompts("tool_call", 1), *prompts("arithmetic", 2)]
    wanted = (3, 0, 2)
    alone = []
    for prompt, count in zip(asked, wanted, strict=True):
        decoding = Decoding(model, arena, predictor, count)
        alone.append(decoding.prefill(prompt, 1 << 20))
        again = Decoding(model, arena, predictor, count)
        assert again.prefill(prompt, 7) == alone[-1]
        arena.close(decoding.held)
        arena.close(again.held)
    held: list[Held] = [arena.open() for _ in asked]
    step = arena.reserve([Chunk(one, prompt, room=DRAFTS) for one, prompt in zip(held, asked, strict=True)])
    with torch.inference_mode():
        hidden = model.forward(step, arena.layers)
    ends = [sum(map(len, asked[: index + 1])) for index in range(len(asked))]
    rows = [
        Row(one, 0, [*prompt[1:], first], range(end - len(prompt), end), count)
        for one, prompt, (first, _), end, count in zip(held, asked, alone, ends, wanted, strict=True)
    ]
    assert predictor.propose(rows, hidden) == [drafts for _, drafts in alone]
    assert [len(drafts) for _, drafts in alone] == list(wanted)
    assert predictor.propose([], hidden) == []


@pytest.mark.skipif(library() is None, reason="the native library is not built")
@pytest.mark.parametrize("kv", ["f32", "int8"])
def test_replayed_guesses_are_those_made_launch_by_launch(model: Model, kv: str) -> None:
    proposed: list[list[list[int]]] = []
    graphs: list[StepGraphs] = []
    for captured in (False, True):
        arena = arena_for(kv, check_finite=False)

        def replayed(run: Guess, arena: Arena = arena) -> Guess:
            graphs.append(StepGraphs(run, arena, graphs[0] if graphs else None))
            return graphs[-1]

        predictor = Predictor(model, arena, replayed if captured else None)
        for number, prompt in enumerate(prompts("tool_call", 2)):
            decoding = Decoding(model, arena, predictor, wanted=DRAFTS - number)
            decoding.run(prompt, spoil=(2, 4))
            proposed.append(decoding.proposed)
    assert proposed[2:] == proposed[:2]
    assert {len(drafts) for drafts in proposed[2]} == {0, DRAFTS}
    assert {len(drafts) for drafts in proposed[3]} == {0, DRAFTS - 1}
    assert len(graphs) == DRAFTS, "none, two, three"
    assert all(graph.replays > graph.recorded > 0 for graph in graphs[1:])


def test_numbers_that_are_not_finite_cost_their_sequence_its_drafts_and_no_other(model: Model) -> None:
    arena = arena_for()
    predictor = Predictor(model, arena)
    good, bad, worse = prompts("arithmetic", 3)
    held = [arena.open() for _ in range(3)]
    asked = [good, bad, worse]
    step = arena.reserve([Chunk(one, prompt, room=DRAFTS) for one, prompt in zip(held, asked, strict=True)])
    with torch.inference_mode():
        hidden = model.forward(step, arena.layers)
    hidden = hidden.clone()  # one that can be changed
    ends = [sum(map(len, asked[: index + 1])) for index in range(3)]
    rows = [
        Row(one, 0, [*prompt[1:], 5], range(end - len(prompt), end), 3)
        for one, prompt, end in zip(held, asked, ends, strict=True)
    ]
    (expected, _, _) = predictor.propose(rows, hidden)
    assert len(expected) == 3
    hidden[ends[0] + 1] = torch.inf  # an early token of `bad`: memory refuses the rows of the whole pass
    assert predictor.propose(rows, hidden)[0] == expected
    assert predictor.propose(rows, hidden)[1] == []
    head: Any = predictor.head
    logits = head.logits

    class Broken:
        begin, forward = head.begin, head.forward

        @staticmethod
        def logits(state: torch.Tensor) -> torch.Tensor:
            found = logits(state).clone()
            found[-1, 3] = torch.nan
            return found

    predictor.head = Broken()
    drafts = predictor.propose(rows[:1] + rows[2:], hidden)
    assert drafts[1] == []
    assert drafts[0][:1] == expected[:1]


def test_guesses_stay_inside_what_is_reserved(model: Model) -> None:
    arena = arena_for()
    predictor = Predictor(model, arena)
    held = arena.open()
    prompt = prompts("secret", 1)[0][:32]  # a whole page
    step = arena.reserve([Chunk(held, prompt)])
    with torch.inference_mode():
        hidden = model.forward(step, arena.layers)
    row = Row(held, 0, [*prompt[1:], 5], range(32), 1)
    assert len(predictor.propose([row], hidden)[0]) == 1
    with pytest.raises(Refused, match="reserve the step with more room"):
        predictor.propose([replace(row, wanted=2)], hidden)


def test_memory_without_the_heads_layers_is_refused(model: Model) -> None:
    formats = choose_formats(SPEC, "f32", "", "float32")
    arena = Arena(SPEC, plan(SPEC, formats, max_model_len=64), select(SPEC, formats))
    with pytest.raises(Refused, match="the memory was planned without the multi-token-prediction head"):
        Predictor(model, arena)


def test_calibrated_formats_of_the_heads_layers_need_their_own_frames() -> None:
    formats, drafts = (choose_formats(SPEC, "fp8", "", "float32", draft=draft) for draft in (False, True))
    frames = load_frames(CHECKPOINT.directory / FRAMES_FILE, SPEC)
    assert judge(SPEC, formats, frames, model="m", draft_formats=drafts).answer == "run"
    trunk = {place: frame for place, frame in frames.items() if place[0] < len(SPEC.layers)}
    assert judge(SPEC, formats, trunk, model="m").answer == "run"
    verdict = judge(SPEC, formats, trunk, model="m", draft_formats=drafts)
    assert verdict.answer == "calibrate"
    assert f"layer {len(SPEC.layers)} has none for its k rows" in verdict.reason
