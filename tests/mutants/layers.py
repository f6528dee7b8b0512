"""Bugs of what a layer remembers: rows, states, and the steps that describe them."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
from exact import test_invariants, test_rows
from mutants.mutant import Mutant, Patch

from truekv.formats.choice import codecs
from truekv.kernels.reference.paged import planes
from truekv.kernels.table import Kernels
from truekv.memory import arena as arena_module
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.states import StateLayer

if TYPE_CHECKING:
    from truekv.core.batch import Sequence, Step
    from truekv.core.protocols import Stored


def seen_step(change: Any) -> list[Patch]:
    """Scan kernels are given a changed step."""
    scan = Kernels.scan
    return [Patch(Kernels, "scan", lambda *given: scan(*given[:-1], change(given[-1])))]


def state_not_zeroed() -> list[Patch]:
    def open_slot(self: StateLayer, slot: int) -> None:
        for slab in self.state.values():
            slab[slot] = slab[slot].nan_to_num()
        self.folded[slot] = 0

    def erase(self: StateLayer, row: int) -> None:
        self.folded[row] = -1

    return [Patch(StateLayer, "open", open_slot), Patch(StateLayer, "erase", erase)]


def rejected_rows_kept() -> list[Patch]:
    advance, store = Arena.advance, Kernels.store
    rejected: set[int] = set()

    def remember(self: Arena, sequence: Sequence, count: int) -> None:
        assert sequence.reserved is not None
        rejected.discard(sequence.slot)
        if count < sequence.reserved[0] and sequence.position + count < len(sequence.pages) * self.plan.page_tokens:
            rejected.add(sequence.slot)
        advance(self, sequence, count)

    def write_once(self: Kernels, fields: tuple[Stored, ...], rows: Any, step: Step) -> None:
        slots = step.slot[step.owner].tolist()
        kept = [place for place, slot in enumerate(slots) if slot in rejected and not int(step.offset[place])]
        page, line = step.page[kept], step.line[kept]
        every = [plane for stored in fields for plane in planes(stored)]
        before = [plane[page, :, line].clone() for plane in every]
        store(self, fields, rows, step)
        for plane, saved in zip(every, before, strict=True):
            plane[page, :, line] = saved

    nothing = Patch(Arena, "_erase_lines", lambda self, page, line: None)
    return [Patch(Arena, "advance", remember), Patch(Kernels, "store", write_once), nothing]


def conv_tail_not_saved() -> list[Patch]:
    scan = Kernels.scan

    def forget(self: Kernels, layer: Any, inputs: Any, weights: Any, state: Any, log: Any, step: Step) -> torch.Tensor:
        before = state["conv"][step.slot].clone()
        out = scan(self, layer, inputs, weights, state, log, step)
        state["conv"][step.slot] = before
        return out

    return [Patch(Kernels, "scan", forget)]


def count_not_advanced() -> list[Patch]:
    scan = StateLayer.scan

    def forget(self: StateLayer, inputs: Any, weights: Any, step: Step) -> torch.Tensor:
        before = self.folded.clone()
        out = scan(self, inputs, weights, step)
        self.folded.copy_(before)
        return out

    return [Patch(StateLayer, "scan", forget)]


def slot_of_the_first() -> list[Patch]:
    def shifted(step: Step) -> Step:
        none = step.count == step.certain
        return step if bool(none.all()) else dataclasses.replace(step, slot=torch.where(none, step.slot[0], step.slot))

    return seen_step(shifted)


def raw_rows() -> list[Patch]:
    def raw(stored: Stored) -> Stored:
        codec, dim = codecs()["f32"], stored.field.dim
        size = stored.field.heads * stored.page_tokens * 4 * dim
        data = torch.zeros(len(stored.data), size, dtype=torch.uint8)
        copy = dataclasses.replace(stored, format=codec, data=data, start=0)
        decoded = stored.format.decode(torch.cat(planes(stored), -1), dim).nan_to_num()
        planes(copy)[0][:] = decoded.contiguous().view(torch.uint8)
        return copy

    def attend(self: PagedLayer, queries: Any, rows: Any, scale: float, step: Step) -> torch.Tensor:
        copies = tuple(raw(stored) for stored in self.stored)
        self.kernels.store(self.stored, rows, step)
        self.kernels.paged.store(copies, rows, step)
        return self.kernels.attend(queries, copies, scale, self.layer.window, step)

    return [Patch(PagedLayer, "attend", attend)]


def one_scale() -> list[Patch]:
    attend = PagedLayer.attend

    def mixed(self: PagedLayer, queries: Any, rows: Any, scale: float, step: Step) -> torch.Tensor:
        out = attend(self, queries, rows, scale, step)
        first, second = self.stored[0], self.stored[-1]
        if second.frame.scale is not None and first.frame.scale is not None:
            shared = torch.full_like(second.frame.scale, float(first.frame.scale.mean()))
            frame = dataclasses.replace(second.frame, scale=shared)
            self.kernels.paged.store((dataclasses.replace(second, frame=frame),), rows[-1:], step)
        return out

    return [Patch(PagedLayer, "attend", mixed)]


def scale_of_the_next_layer() -> list[Patch]:
    allocate = arena_module.allocate

    def shifted(spec: Any, plan: Any, kernels: Any, frames: Any, **given: Any) -> Any:
        moved = {(index, name): frames.get((index + 1, name), frame) for (index, name), frame in frames.items()}
        return allocate(spec, plan, kernels, moved, **given)

    return [Patch(arena_module, "allocate", shifted)]


def laid_out(change: Any) -> list[Patch]:
    """Steps are described wrongly."""
    lay_out = arena_module.lay_out
    return [Patch(arena_module, "lay_out", lambda *given: change(lay_out(*given)))]


MUTANTS: Final = (
    Mutant(
        "state kept after reject",
        "drafts are folded into the recurrent state before they are verified",
        test_invariants.test_every_vector_of_acceptance_in_a_gdn_hybrid,
        lambda: seen_step(
            lambda step: dataclasses.replace(step, certain=step.count, replay=torch.zeros_like(step.replay))
        ),
    ),
    Mutant(
        "state not zeroed on open",
        "a sequence starts from the state of the one that had its slot before",
        test_invariants.test_one_request_after_the_other_starts_from_nothing,
        state_not_zeroed,
    ),
    Mutant(
        "raw instead of stored rows",
        "a chunk attends to its own rows as they were before quantization",
        test_invariants.test_a_prompt_in_chunks_is_a_prompt_in_one,
        raw_rows,
    ),
    Mutant(
        "one scale for latent and rope",
        "the rotary key is stored with the scale of the latent",
        test_rows.test_rows_come_back_within_their_bound,
        one_scale,
    ),
    Mutant(
        "wrong slot on zero drafts",
        "a row without drafts uses the slot of the first row when others have drafts",
        test_invariants.test_rows_without_drafts_beside_rows_with_drafts,
        slot_of_the_first,
    ),
    Mutant(
        "replay off by one",
        "one accepted draft too few is folded into the state",
        test_invariants.test_every_vector_of_acceptance_in_a_mamba2_hybrid,
        lambda: seen_step(lambda step: dataclasses.replace(step, replay=(step.replay - 1).clamp(min=0))),
    ),
    Mutant(
        "accepted count of another request",
        "each row replays as many drafts as the row opposite to it accepted",
        test_invariants.test_every_vector_of_acceptance_in_a_gdn_hybrid,
        lambda: laid_out(lambda step: dataclasses.replace(step, replay=step.replay.flip(0))),
    ),
    Mutant(
        "rejected rows kept",
        "the row of a rejected draft stays where the row of the right token belongs",
        test_invariants.test_every_vector_of_acceptance_in_rows_alone,
        rejected_rows_kept,
    ),
    Mutant(
        "convolution tail not saved",
        "the convolution starts every step from the inputs of the first",
        test_invariants.test_a_prompt_in_chunks_is_a_prompt_in_one,
        conv_tail_not_saved,
    ),
    Mutant(
        "folded count not advanced",
        "a slot does not say how many tokens are in its state",
        test_invariants.test_one_request_after_the_other_starts_from_nothing,
        count_not_advanced,
    ),
    Mutant(
        "scale of another layer",
        "each layer quantizes with the frame measured on the next one",
        test_rows.test_rows_come_back_within_their_bound,
        scale_of_the_next_layer,
    ),
    Mutant(
        "positions restart in each chunk",
        "rotary positions count from the beginning of the chunk",
        test_invariants.test_a_prompt_in_chunks_is_a_prompt_in_one,
        lambda: laid_out(lambda step: dataclasses.replace(step, positions=step.offset)),
    ),
    Mutant(
        "page tables swapped",
        "each row reads the pages of its neighbour",
        test_invariants.test_companions_change_nothing,
        lambda: laid_out(lambda step: dataclasses.replace(step, pages=step.pages.roll(1, 0))),
    ),
)
