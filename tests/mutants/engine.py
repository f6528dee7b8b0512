"""Bugs of kernels, sampling and scheduling."""

from __future__ import annotations

import dataclasses
import itertools
from typing import TYPE_CHECKING, Any, Final

import torch
from exact import test_answers, test_invariants, test_rows
from mutants.mutant import Mutant, Patch

from truekv.engine import answer as answer_module
from truekv.engine import generate as generate_module
from truekv.engine import sample as sample_module
from truekv.engine import schedule as schedule_module
from truekv.engine import tokens as tokens_module
from truekv.engine.answer import Answer
from truekv.engine.padding import PaddedStep
from truekv.engine.schedule import Schedule
from truekv.formats.lm import Codebook
from truekv.kernels.native import paged as native

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.batch import Step
    from truekv.engine.request import Request


def tail_over_read() -> list[Patch]:
    attend = native.attend

    def one_more(queries: Any, fields: Any, scale: float, window: int | None, step: Step) -> torch.Tensor:
        # Not beyond the last page, which would be another bug.
        inside = (step.position + step.count) % fields[0].page_tokens != 0
        return attend(queries, fields, scale, window, dataclasses.replace(step, position=step.position + inside))

    return [Patch(native, "attend", one_more)]


def window_one_too_wide() -> list[Patch]:
    attend = native.attend

    def wider(queries: Any, fields: Any, scale: float, window: int | None, step: Step) -> torch.Tensor:
        return attend(queries, fields, scale, window and window + 1, step)

    return [Patch(native, "attend", wider)]


def lopsided_codebook() -> list[Patch]:
    def levels(self: Codebook) -> tuple[int, ...]:
        lower = [-level for level in reversed(self.positive)]
        return (lower[0] - 1, *lower[1:], *self.positive)

    return [Patch(Codebook, "levels", property(levels))]


def draw_of_the_call() -> list[Patch]:
    draw, calls = sample_module.draw, itertools.count()
    return [Patch(sample_module, "draw", lambda seed, index: draw(seed, next(calls)))]


def another_seed_after_preemption() -> list[Patch]:
    again, choose = Schedule.again, Answer._choose
    lost: set[int] = set()

    def remember(self: Schedule, request: Request) -> None:
        lost.add(id(request))
        again(self, request)

    def draw_anew(self: Answer, logits_NV: torch.Tensor, row: int, drawn: int | None = None) -> Any:
        if id(self.request) in lost and self.sampler.seed is not None:
            lost.discard(id(self.request))
            self.sampler.seed += 1
        return choose(self, logits_NV, row, drawn if self.sampler.greedy else None)

    return [Patch(Schedule, "again", remember), Patch(Answer, "_choose", draw_anew)]


def answer_lost_in_preemption() -> list[Patch]:
    again = Schedule.again

    def forget(self: Schedule, request: Request) -> None:
        del request.tokens[len(request.prompt) :]
        again(self, request)

    return [Patch(Schedule, "again", forget)]


def memory_of_ended_kept() -> list[Patch]:
    def forget(self: Any, request: Request, *, suspect: bool = False) -> None:
        request.held = None

    return [Patch(generate_module._Memory, "release", forget)]


def likeliest_draft_accepted() -> list[Patch]:
    taken = Answer.take

    def take(self: Answer, logits_NV: torch.Tensor, drafts: Sequence[int], drawn: Sequence[int] = ()) -> Any:
        if self.sampler.greedy:
            return taken(self, logits_NV, drafts, drawn)
        events: list[Any] = []
        for place, logits_V in enumerate(logits_NV[len(logits_NV) - 1 - len(drafts) :]):
            events += self._choose(logits_V[None], 0)
            if place == len(drafts) or not hasattr(events[-1], "token"):
                return events, place
            if int(logits_V.argmax()) == drafts[place]:
                self.request.tokens[-1] = drafts[place]
            elif events[-1].token != drafts[place]:
                return events, place
        raise ValueError

    return [Patch(Answer, "take", take)]


def rejected_drafts_punished() -> list[Patch]:
    take = Answer.take

    def count_all(self: Answer, logits_NV: torch.Tensor, drafts: Sequence[int], drawn: Sequence[int] = ()) -> Any:
        events, accepted = take(self, logits_NV, drafts, drawn)
        for token in drafts[accepted:]:
            if self.sampler._penalties is not None:
                self.sampler._penalties.count(token)
        return events, accepted

    return [Patch(Answer, "take", count_all)]


def bonus_of_the_row_before() -> list[Patch]:
    take = Answer.take

    def shifted(self: Answer, logits_NV: torch.Tensor, drafts: Sequence[int], drawn: Sequence[int] = ()) -> Any:
        if self.sampler.greedy:
            return take(self, logits_NV, drafts, drawn)
        rows = logits_NV.clone()
        if drafts:
            rows[-1] = rows[-2]
        return take(self, rows, drafts)

    return [Patch(Answer, "take", shifted)]


def largest_of_the_row_before() -> list[Patch]:
    take = Answer.take

    def shifted(self: Answer, logits_NV: torch.Tensor, drafts: Sequence[int], drawn: Sequence[int] = ()) -> Any:
        return take(self, logits_NV, drafts, [*drawn[:1], *drawn[:-1]])

    return [Patch(Answer, "take", shifted)]


def logprobs_after_temperature() -> list[Patch]:
    logprobs = answer_module.logprobs
    return [Patch(answer_module, "logprobs", lambda kernels, rows, *asked: logprobs(kernels, rows / 2, *asked))]


def length_baked() -> list[Patch]:
    attend = native.attend
    alive: list[torch.Tensor] = []

    def bake(queries: Any, fields: Any, scale: float, window: int | None, step: Step) -> torch.Tensor:
        alive.append(torch.from_numpy(step.position.numpy().copy()))
        return attend(queries, fields, scale, window, dataclasses.replace(step, position=alive[-1]))

    return [Patch(native, "attend", bake)]


def padding_stale() -> list[Patch]:
    def put(self: PaddedStep, step: Step, tensors: Any = ()) -> None:
        for field in dataclasses.fields(step):
            value, buffer = getattr(step, field.name), getattr(self.step, field.name)
            for dim, length in enumerate(value.shape):
                buffer = buffer.narrow(dim, 0, length)
            buffer.copy_(value)

    return [Patch(PaddedStep, "put", put)]


def priority_inverted() -> list[Patch]:
    return [Patch(Schedule, "_rank", lambda self, request: (-request.priority, request.arrival))]


MUTANTS: Final = (
    Mutant(
        "page tail over-read",
        "attention reads one line beyond the last token",
        test_invariants.test_one_request_after_the_other_starts_from_nothing,
        tail_over_read,
    ),
    Mutant(
        "capture bakes a length",
        "a captured step attends to as many tokens as when it was recorded",
        test_invariants.test_a_replayed_step_computes_with_its_own_contents,
        length_baked,
    ),
    Mutant(
        "stale padded rows",
        "rows of the step before stay in a captured step where the next one has fewer",
        test_invariants.test_a_replayed_step_computes_with_its_own_contents,
        padding_stale,
    ),
    Mutant(
        "window off by one",
        "a sliding window is one token too wide",
        test_rows.test_a_window_sees_exactly_its_tokens,
        window_one_too_wide,
    ),
    Mutant(
        "codebook not antisymmetric",
        "the lowest level is one further from zero than the highest",
        test_rows.test_codes_of_a_row_and_of_its_negative_are_opposite,
        lopsided_codebook,
    ),
    Mutant(
        "draw depends on the batch",
        "the number drawn for a token depends on how many were drawn before, by anyone",
        test_answers.test_the_same_seed_gives_the_same_tokens_in_any_company,
        draw_of_the_call,
    ),
    Mutant(
        "another seed after preemption",
        "a request that lost its memory goes on with another seed",
        test_invariants.test_memory_may_be_lost_after_any_step,
        another_seed_after_preemption,
    ),
    Mutant(
        "answer lost in preemption",
        "a request that loses its memory loses what it had generated",
        test_invariants.test_whoever_loses_memory_goes_on_as_if_nothing_had_happened,
        answer_lost_in_preemption,
    ),
    Mutant(
        "memory of ended requests kept",
        "an ended or aborted request keeps its pages and its slot",
        test_invariants.test_a_request_may_be_aborted_after_any_step,
        memory_of_ended_kept,
    ),
    Mutant(
        "likeliest draft accepted",
        "a sampled request accepts a draft that is the most likely token, whatever was sampled",
        test_invariants.test_drafts_change_no_sampled_token,
        likeliest_draft_accepted,
    ),
    Mutant(
        "rejected drafts punished",
        "rejected drafts count as said when repetition is penalised",
        test_invariants.test_drafts_change_no_sampled_token,
        rejected_drafts_punished,
    ),
    Mutant(
        "largest of the row before",
        "a greedy request takes the most likely token of the row before where a draft was accepted",
        test_invariants.test_guesses_of_the_prediction_head_change_nothing,
        largest_of_the_row_before,
    ),
    Mutant(
        "bonus of the row before",
        "the token after accepted drafts is drawn from the logits before the last draft",
        test_invariants.test_drafts_change_no_sampled_token,
        bonus_of_the_row_before,
    ),
    Mutant(
        "stop string missed across tokens",
        "nothing is held back that may become a stop string",
        test_answers.test_a_stop_string_is_found_wherever_tokens_divide_it,
        lambda: [Patch(tokens_module, "_overlap", lambda text, stop: 0)],
    ),
    Mutant(
        "logprobs after temperature",
        "log-probabilities are those after temperature",
        test_answers.test_logprobs_are_the_models_whatever_the_temperature,
        logprobs_after_temperature,
    ),
    Mutant(
        "priority inverted",
        "higher priority numbers go first",
        test_answers.test_a_lower_priority_number_goes_first,
        priority_inverted,
    ),
    Mutant(
        "starvation",
        "waiting is worth nothing",
        test_answers.test_nobody_waits_for_ever,
        lambda: [Patch(schedule_module, "AGEING", 1 << 40)],
    ),
)
