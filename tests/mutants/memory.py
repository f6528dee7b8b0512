"""Bugs of the arena and of the prefix cache: who holds what, what is published and what is found."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from exact import test_invariants
from mutants.mutant import Mutant, Patch

from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.prefix import PrefixCache
from truekv.memory.states import StateLayer
from truekv.memory.tree import Tree

if TYPE_CHECKING:
    import torch

    from truekv.core.batch import Sequence, Step


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
            lease.pages = sequence.pages[:]
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


MUTANTS: Final = (
    Mutant(
        "checkpoint before commit",
        "the state saved for others is that before the step whose tokens it is published under",
        test_invariants.test_the_second_turn_starts_from_the_first,
        checkpoint_before_commit,
    ),
    Mutant(
        "adapter not in key",
        "requests of different salts share what the prefix cache holds",
        test_invariants.test_a_salt_keeps_conversations_apart,
        salt_not_in_key,
    ),
    Mutant(
        "aborted request publishes",
        "what a step under way was to store is published when its request is aborted",
        test_invariants.test_what_was_not_committed_is_not_published,
        published_under_way,
    ),
    Mutant(
        "tokens not compared",
        "a cached page is found by its first token alone",
        test_invariants.test_a_hit_needs_the_same_tokens,
        first_token_is_key,
    ),
    Mutant(
        "hit one token too long",
        "one token more than agrees is taken from the prefix cache",
        test_invariants.test_a_hit_is_a_miss_at_every_length,
        hit_one_too_long,
    ),
    Mutant(
        "half of a page copied",
        "copy on write copies the keys of a page and not its values",
        test_invariants.test_a_hit_is_a_miss_at_every_length,
        half_of_a_page_copied,
    ),
    Mutant(
        "rows hit, state missed",
        "a hybrid starts from cached rows with the zero state",
        test_invariants.test_the_second_turn_starts_from_the_first,
        rows_hit_and_state_missed,
    ),
    Mutant(
        "page evicted while read",
        "a cached page may be evicted although a sequence reads it",
        test_invariants.test_the_second_turn_starts_from_the_first,
        evicted_while_read,
    ),
    Mutant(
        "page lost",
        "of the pages given back one never becomes free",
        test_invariants.test_one_request_after_the_other_starts_from_nothing,
        page_lost,
    ),
    Mutant(
        "page freed twice",
        "of the pages given back one becomes free twice, so two sequences get it",
        test_invariants.test_companions_change_nothing,
        page_freed_twice,
    ),
    Mutant(
        "advance off by one",
        "the last accepted draft is forgotten",
        test_invariants.test_every_vector_of_acceptance_in_a_gdn_hybrid,
        advance_one_too_few,
    ),
)
