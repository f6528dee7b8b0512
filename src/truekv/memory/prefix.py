"""The prefix cache: what a new sequence may start from, and what an open one leaves for others.

An arena has one model, one format per field and one set of frames, so tokens and salt are the whole
key: nothing else that a row or a state depends on can differ between two sequences of one arena.
Rows of a draft layer also depend on the token that follows theirs, so the last one of a hit may have
been made for another continuation: it is a worse guess, never a wrong answer.

Attention layers can start anywhere, recurrent ones only where a state was saved. A state is worth
saving (as Marconi, arXiv 2411.19379, argues) where prompts part, at the end of a prompt, every so many
tokens of a long one, and at the end of an answer, because the next turn of a chat goes on from there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.errors import Corrupted
from truekv.memory.tree import Node, Tree, descend

if TYPE_CHECKING:
    from array import array
    from collections.abc import Callable, Iterable
    from collections.abc import Sequence as Seq

    from truekv.memory.lease import Lease

UNLIMITED = 1 << 30
"""More tokens than any step has."""


@dataclass(frozen=True, slots=True)
class PrefixStats:
    """What the prefix cache has done so far, and what it holds."""

    hits: int = 0
    """Sequences that started from cached tokens."""
    misses: int = 0
    """Sequences that looked and found none."""
    tokens_hit: int = 0
    tokens_asked: int = 0
    """Tokens of all sequences that looked."""
    evicted_pages: int = 0
    evicted_checkpoints: int = 0
    cached_pages: int = 0
    """Pages that the cache alone holds."""
    checkpoints: int = 0
    """Saved states."""


class PrefixCache:
    """Decides what is reused, published and saved. Owns no tensor: the arena moves the bytes."""

    def __init__(self, tree: Tree, *, page_tokens: int, interval: int, recurrent: bool) -> None:
        """Let a prompt leave a state every `interval` tokens, rounded up to pages."""
        self.tree = tree
        self._page_tokens = page_tokens
        self._interval = -(-interval // page_tokens) * page_tokens
        self._recurrent = recurrent
        self._hits = self._misses = self._tokens_hit = self._tokens_asked = 0

    @property
    def stats(self) -> PrefixStats:
        """A snapshot."""
        tree = self.tree
        return PrefixStats(
            self._hits,
            self._misses,
            self._tokens_hit,
            self._tokens_asked,
            tree.evicted_pages,
            tree.evicted_checkpoints,
            tree.idle,
            len(tree.checkpoints),
        )

    def open(self, lease: Lease, tokens: Seq[int], free_pages: int) -> tuple[Node | None, int]:
        """Let a lease hold the cached pages its tokens begin with, all but the last token.

        Returns the page whose first lines go on from there, which is held until the caller has
        copied them, and how many do.
        """
        tree, known = self.tree, tokens[: max(0, len(tokens) - 1)]
        path = tree.match(lease.salt, known, self._page_tokens)
        source, lines = None, 0
        if self._recurrent:
            depth = _usable(path)
            lease.branch = len(path) * self._page_tokens if depth < len(path) else 0
            del path[depth:]
        elif above := path[-1] if path else tree.roots.get(lease.salt):
            start = len(path) * self._page_tokens
            source, lines = above.nearest(tuple(known[start : start + self._page_tokens]))
        for node in path:
            tree.hold(node)
        if source is not None:
            tree.hold(source)
            if not free_pages + tree.idle:
                tree.release(source)
                source, lines = None, 0
        if self._recurrent and path:
            # Somebody starts from here, so it is nobody's to move on with.
            path[-1].rolling = False
            tree.checkpoints.move_to_end(path[-1])
            lease.source = path[-1].saver
        if source is not None:
            lease.source = source.publisher
        lease.nodes = path
        lease.tokens = list(tokens[: len(path) * self._page_tokens + lines])
        self._count(len(tokens), len(lease.tokens))
        return source, lines

    def shared(self, salt: str, tokens: Seq[int]) -> int:
        """How many pages a sequence would start from that open ones hold already."""
        path = self.tree.match(salt, tokens[: max(0, len(tokens) - 1)], self._page_tokens)
        return sum(node.holders > 0 for node in (path[: _usable(path)] if self._recurrent else path))

    def publish(self, lease: Lease, pages: array[int]) -> None:
        """Show the complete pages of a lease to others; where one shows the same already, that one is held instead."""
        size, tree = self._page_tokens, self.tree
        while (len(lease.nodes) + 1) * size <= len(lease.tokens) and self._publishes(lease):
            index = len(lease.nodes)
            key = tuple(lease.tokens[index * size : (index + 1) * size])
            parent = lease.nodes[-1] if index else None
            node = tree.extend(lease.salt, parent, key, pages[index], lease.serial, lease.source)
            tree.hold(node)
            lease.nodes.append(node)
            if node.page != pages[index]:
                tree.free_pages([pages[index]])
                pages[index] = node.page

    def due(self, lease: Lease, count: int) -> bool:
        """Whether a state after `count` tokens of a lease is worth a checkpoint."""
        size = self._page_tokens
        return self._recurrent and self._publishes(lease) and count > 0 and self._next(lease, count - size) == count

    def save(self, lease: Lease, count: int, copy: Callable[[int], None]) -> None:
        """Keep the state after `count` tokens, all of them published: `copy` brings it to a row."""
        if not self._publishes(lease) or len(lease.nodes) * self._page_tokens < count:
            return
        tree, node = self.tree, lease.nodes[count // self._page_tokens - 1]
        # One long prompt must not push out what all others left: when rows are short, it moves on with one.
        spaced = count not in {self._last(lease), lease.branch}
        rolling = spaced and (count > self._last(lease) or not tree.free_rows)
        if node.checkpoint >= 0:
            if node.saver != lease.serial:
                # Two sequences came by here, so it is nobody's to move on with.
                node.rolling = False
                self._drop_rolling(lease)
            tree.checkpoints.move_to_end(node)
            return
        if rolling:
            self._drop_rolling(lease)
        row = tree.take_row()
        copy(row)
        tree.set_checkpoint(node, row, lease.serial, rolling=rolling)
        lease.rolling = node if rolling else None

    def close(self, lease: Lease, page: int | None) -> bool:
        """Leave a lease's pages to others; say whether `page`, its last and incomplete one, is the tree's now."""
        size, tree, kept = self._page_tokens, self.tree, False
        start = len(lease.nodes) * size
        tail = tuple(lease.tokens[start:])
        if page is not None and tail and len(tail) < size and not self._recurrent and self._publishes(lease):
            parent = lease.nodes[-1] if lease.nodes else None
            above = parent or tree.roots.get(lease.salt)
            near, common = above.nearest(tail) if above else (None, 0)
            # Whoever agrees with all of the tail makes it superfluous.
            kept = near is None or common < len(tail)
            if kept:
                near = tree.extend(lease.salt, parent, tail, page, lease.serial, lease.source)
            if near is not None and not near.holders:
                tree.rest(near)
        if lease.rolling is not None and lease.rolling.saver == lease.serial:
            lease.rolling.rolling = False
        self._release(lease)
        return kept

    def expel(self, lease: Lease, others: Iterable[Lease]) -> None:
        """Take out of the tree what a lease computed, and what was computed from that."""
        nodes = [node for root in self.tree.roots.values() for node in descend(root) if node.page >= 0]
        pairs = [(node.source, node.publisher) for node in nodes] + [(other.source, other.serial) for other in others]
        tainted: set[int] = set()
        found = {lease.serial}
        while not found <= tainted:
            tainted |= found
            found = {serial for source, serial in pairs if source in tainted}
        for other in others:
            other.publishes &= other.serial not in tainted
        for node in nodes:
            if node.alive and node.publisher in tainted:
                self.tree.remove(node, wipe=True)
            elif node.saver in tainted:
                self.tree.drop_checkpoint(node)
        self._release(lease)

    def certain_limit(self, lease: Lease) -> int:
        """Most certain tokens of the next step, so that it ends where a state is worth saving."""
        if not self._recurrent or not self._publishes(lease):
            return UNLIMITED
        return self._next(lease, lease.position) - lease.position

    def draft_limit(self, lease: Lease) -> int:
        """Most drafts after one certain token, so that accepting them leaves the next state worth saving ahead."""
        ahead = self.certain_limit(lease)
        # From the token before the boundary the certain token alone brings the state there.
        return UNLIMITED if ahead in {1, UNLIMITED} else max(0, ahead - 2)

    def check(self, leases: Iterable[Lease]) -> list[int]:
        """Raise Corrupted unless leases and tree agree; return the pages that are the tree's."""
        held: dict[Node, int] = {}
        for lease in leases:
            for node, page in zip(lease.nodes, lease.pages, strict=False):
                held[node] = held.get(node, 0) + 1
                if node.page != page:
                    raise Corrupted(f"a sequence reads page {page}, but holds page {node.page} of the prefix cache")
            known = [token for node in lease.nodes for token in node.tokens]
            if len(lease.tokens) != lease.position or lease.tokens[: len(known)] != known:
                raise Corrupted(f"the sequence in slot {lease.sequence.slot} holds pages of other tokens than its own")
        return self.tree.check(held)

    def _publishes(self, lease: Lease) -> bool:
        return lease.publishes and (not lease.nodes or lease.nodes[-1].alive)

    def _last(self, lease: Lease) -> int:
        """Return the last page boundary that the same prompt could start from."""
        return max(0, lease.planned - 1) // self._page_tokens * self._page_tokens

    def _next(self, lease: Lease, position: int) -> int:
        """Return the first page boundary after a position where the state is worth saving."""
        last = self._last(lease)
        if position >= last:
            # In an answer every one: it may end anywhere.
            return (position // self._page_tokens + 1) * self._page_tokens
        spaced = (position // self._interval + 1) * self._interval
        return min(at for at in (spaced, lease.branch, last) if at > position)

    def _drop_rolling(self, lease: Lease) -> None:
        node, lease.rolling = lease.rolling, None
        if node is not None and node.rolling and node.saver == lease.serial:
            self.tree.drop_checkpoint(node)

    def _release(self, lease: Lease) -> None:
        for node in reversed(lease.nodes):
            self.tree.release(node)
        lease.nodes = []

    def _count(self, asked: int, hit: int) -> None:
        self._hits += hit > 0
        self._misses += hit == 0
        self._tokens_hit += hit
        self._tokens_asked += asked


def _usable(path: Seq[Node]) -> int:
    """Return how many pages of a path end with a saved state: what a recurrent layer can start from."""
    return next((at for at in range(len(path), 0, -1) if path[at - 1].checkpoint >= 0), 0)
