"""Bugs of memory: pages, states, what is published and what is found."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

import torch
from exact import test_invariants as tests
from mutants.mutant import Mutant, Patch

from truekv.formats.choice import codecs
from truekv.kernels.reference.paged import planes
from truekv.kernels.table import Kernels
from truekv.memory import arena as arena_module
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.prefix import PrefixCache
from truekv.memory.states import StateLayer
from truekv.memory.tree import Tree

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


def checkpoint_before_commit() -> list[Patch]:
    reserve, copy = Arena.reserve, Arena._copy_state
    before: dict[tuple[int, int, str], torch.Tensor] = {}

    def reserve_and_save(self: Arena, chunks: Any) -> Step:
        for chunk in chunks:
            for layer in self._states():
                for name, slab in layer.state.items():
                    before[id(layer), chunk.sequence.slot, name] = slab[chunk.sequence.slot].clone()
        return reserve(self, chunks)

    def copy_saved(self: Arena, source: int, target: int) -> None:
        copy(self, source, target)
        for layer in self._states():
            for name, slab in layer.state.items():
                slab[target] = before[id(layer), source, name]

    return [Patch(Arena, "reserve", reserve_and_save), Patch(Arena, "_copy_state", copy_saved)]


def published_under_way() -> list[Patch]:
    close = Arena.close

    def publish_and_close(self: Arena, sequence: Sequence, *, suspect: bool = False) -> None:
        lease = self._leases[sequence.slot]
        if self._cache and lease.reserved:
            lease.tokens += lease.pending
            self._cache.publish(lease, sequence.pages)
            lease.pages = tuple(sequence.pages)
        close(self, sequence, suspect=suspect)

    return [Patch(Arena, "close", publish_and_close)]


def salt_not_in_key() -> list[Patch]:
    opened = Arena.open
    return [Patch(Arena, "open", lambda self, tokens=(), **given: opened(self, tokens, reuse=given.get("reuse", True)))]


def first_token_is_key() -> list[Patch]:
    def match(self: Tree, salt: str, tokens: Any, page_tokens: int) -> list[Any]:
        path: list[Any] = []
        node = self.roots.get(salt)
        for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
            children = node.children.items() if node else ()
            node = next((one for key, one in children if len(key) == page_tokens and key[0] == tokens[start]), None)
            if node is None:
                break
            path.append(node)
        return path

    return [Patch(Tree, "match", match)]


def hit_one_too_long() -> list[Patch]:
    find = PrefixCache.open

    def find_more(self: PrefixCache, lease: Any, tokens: Any, free_pages: int) -> Any:
        source, lines = find(self, lease, tokens, free_pages)
        if source is not None and lines < len(source.tokens) and len(lease.tokens) < len(tokens) - 1:
            lines += 1
            lease.tokens.append(tokens[len(lease.tokens)])
        return source, lines

    return [Patch(PrefixCache, "open", find_more)]


def half_of_a_page_copied() -> list[Patch]:
    def copy(self: PagedLayer, source: int, target: int) -> None:
        half = self.data.shape[1] // 2
        self.data[target] = self.data[source].roll(1)
        self.data[target, :half] = self.data[source, :half]

    return [Patch(PagedLayer, "copy", copy)]


def rows_hit_and_state_missed() -> list[Patch]:
    def copy(self: StateLayer, source: int, target: int) -> None:
        for slab in self.state.values():
            slab[target] = 0
        self.folded[target] = self.folded[source]

    return [Patch(StateLayer, "copy", copy)]


def evicted_while_read() -> list[Patch]:
    def hold(self: Tree, node: Any) -> None:
        node.holders += 1

    return [Patch(Tree, "hold", hold)]


def page_lost() -> list[Patch]:
    release = Arena._release
    return [Patch(Arena, "_release", lambda self, pages, **given: release(self, pages[1:], **given))]


def page_freed_twice() -> list[Patch]:
    release = Arena._release
    return [Patch(Arena, "_release", lambda self, pages, **given: release(self, [*pages, *pages[:1]], **given))]


def advance_one_too_few() -> list[Patch]:
    advance = Arena.advance

    def fewer(self: Arena, sequence: Sequence, count: int) -> None:
        assert sequence.reserved is not None
        tokens, drafts = sequence.reserved
        advance(self, sequence, count - (count > tokens - drafts))

    return [Patch(Arena, "advance", fewer)]


def rejected_rows_kept() -> list[Patch]:
    advance, store = Arena.advance, Kernels.store
    rejected: set[int] = set()

    def remember(self: Arena, sequence: Sequence, count: int) -> None:
        assert sequence.reserved is not None
        rejected.discard(sequence.slot)
        if count < sequence.reserved[0] and sequence.position + count < len(sequence.pages) * self.plan.page_tokens:
            rejected.add(sequence.slot)
        advance(self, sequence, count)

    def write_once(self: Kernels, stored: Stored, rows: torch.Tensor, step: Step) -> None:
        slots = step.slot[step.owner].tolist()
        kept = [place for place, slot in enumerate(slots) if slot in rejected and not int(step.offset[place])]
        page, line = step.page[kept], step.line[kept]
        before = [plane[page, :, line].clone() for plane in planes(stored)]
        store(self, stored, rows, step)
        for plane, saved in zip(planes(stored), before, strict=True):
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
        for stored, copy, values in zip(self.stored, copies, rows, strict=True):
            self.kernels.store(stored, values, step)
            self.kernels.paged.store(copy, values, step)
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
            self.kernels.paged.store(dataclasses.replace(second, frame=frame), rows[-1], step)
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
        tests.test_every_vector_of_acceptance_in_a_gdn_hybrid,
        lambda: seen_step(
            lambda step: dataclasses.replace(step, certain=step.count, replay=torch.zeros_like(step.replay))
        ),
    ),
    Mutant(
        "state not zeroed on open",
        "a sequence starts from the state of the one that had its slot before",
        tests.test_one_request_after_the_other_starts_from_nothing,
        state_not_zeroed,
    ),
    Mutant(
        "checkpoint before commit",
        "the state saved for others is that before the step whose tokens it is published under",
        tests.test_the_second_turn_starts_from_the_first,
        checkpoint_before_commit,
    ),
    Mutant(
        "raw instead of stored rows",
        "a chunk attends to its own rows as they were before quantization",
        tests.test_a_prompt_in_chunks_is_a_prompt_in_one,
        raw_rows,
    ),
    Mutant(
        "adapter not in key",
        "requests of different salts share what the prefix cache holds",
        tests.test_a_salt_keeps_conversations_apart,
        salt_not_in_key,
    ),
    Mutant(
        "one scale for latent and rope",
        "the rotary key is stored with the scale of the latent",
        tests.test_rows_come_back_within_their_bound,
        one_scale,
    ),
    Mutant(
        "wrong slot on zero drafts",
        "a row without drafts uses the slot of the first row when others have drafts",
        tests.test_rows_without_drafts_beside_rows_with_drafts,
        slot_of_the_first,
    ),
    Mutant(
        "aborted request publishes",
        "what a step under way was to store is published when its request is aborted",
        tests.test_what_was_not_committed_is_not_published,
        published_under_way,
    ),
    Mutant(
        "tokens not compared",
        "a cached page is found by its first token alone",
        tests.test_a_hit_needs_the_same_tokens,
        first_token_is_key,
    ),
    Mutant(
        "hit one token too long",
        "one token more than agrees is taken from the prefix cache",
        tests.test_a_hit_is_a_miss_at_every_length,
        hit_one_too_long,
    ),
    Mutant(
        "half of a page copied",
        "copy on write copies the keys of a page and not its values",
        tests.test_a_hit_is_a_miss_at_every_length,
        half_of_a_page_copied,
    ),
    Mutant(
        "rows hit, state missed",
        "a hybrid starts from cached rows with the zero state",
        tests.test_the_second_turn_starts_from_the_first,
        rows_hit_and_state_missed,
    ),
    Mutant(
        "page evicted while read",
        "a cached page may be evicted although a sequence reads it",
        tests.test_the_second_turn_starts_from_the_first,
        evicted_while_read,
    ),
    Mutant(
        "page lost",
        "of the pages given back one never becomes free",
        tests.test_one_request_after_the_other_starts_from_nothing,
        page_lost,
    ),
    Mutant(
        "page freed twice",
        "of the pages given back one becomes free twice, so two sequences get it",
        tests.test_companions_change_nothing,
        page_freed_twice,
    ),
    Mutant(
        "advance off by one",
        "the last accepted draft is forgotten",
        tests.test_every_vector_of_acceptance_in_a_gdn_hybrid,
        advance_one_too_few,
    ),
    Mutant(
        "replay off by one",
        "one accepted draft too few is folded into the state",
        tests.test_every_vector_of_acceptance_in_a_mamba2_hybrid,
        lambda: seen_step(lambda step: dataclasses.replace(step, replay=(step.replay - 1).clamp(min=0))),
    ),
    Mutant(
        "accepted count of another request",
        "each row replays as many drafts as the row opposite to it accepted",
        tests.test_every_vector_of_acceptance_in_a_gdn_hybrid,
        lambda: laid_out(lambda step: dataclasses.replace(step, replay=step.replay.flip(0))),
    ),
    Mutant(
        "rejected rows kept",
        "the row of a rejected draft stays where the row of the right token belongs",
        tests.test_every_vector_of_acceptance_in_rows_alone,
        rejected_rows_kept,
    ),
    Mutant(
        "convolution tail not saved",
        "the convolution starts every step from the inputs of the first",
        tests.test_a_prompt_in_chunks_is_a_prompt_in_one,
        conv_tail_not_saved,
    ),
    Mutant(
        "folded count not advanced",
        "a slot does not say how many tokens are in its state",
        tests.test_one_request_after_the_other_starts_from_nothing,
        count_not_advanced,
    ),
    Mutant(
        "scale of another layer",
        "each layer quantizes with the frame measured on the next one",
        tests.test_rows_come_back_within_their_bound,
        scale_of_the_next_layer,
    ),
    Mutant(
        "positions restart in each chunk",
        "rotary positions count from the beginning of the chunk",
        tests.test_a_prompt_in_chunks_is_a_prompt_in_one,
        lambda: laid_out(lambda step: dataclasses.replace(step, positions=step.offset)),
    ),
    Mutant(
        "page tables swapped",
        "each row reads the pages of its neighbour",
        tests.test_companions_change_nothing,
        lambda: laid_out(lambda step: dataclasses.replace(step, pages=step.pages.roll(1, 0))),
    ),
)
