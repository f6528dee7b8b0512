"""The tree of cached pages: which tokens each page and each checkpoint row holds, and which of them go first.

A node is a page. Its place says what the page depends on: the tokens of its ancestors and its own.
Tokens are compared, never only their hash. Pure bookkeeping: no tensors and no clock, so every run
can be replayed.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

from truekv.core.errors import Corrupted

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from collections.abc import Sequence as Seq

Key = tuple[int, ...]


class FreePages(Protocol):
    """Takes back pages that nobody holds."""

    def __call__(self, pages: Seq[int], *, wipe: bool = False) -> None:
        """With `wipe` their bytes must be gone before they are handed out again."""
        ...


@dataclass(slots=True, eq=False)
class Node:
    """One page of the tree; a root stands for no page.

    Only a leaf may hold fewer tokens than a page has lines. Siblings are never prefixes of one
    another, so the sibling that agrees longest with given tokens is next to them in sorted order.
    """

    tokens: Key = ()
    page: int = -1
    parent: Node | None = None
    publisher: int = 0
    """The sequence that computed it; a number that is never used again."""
    source: int = 0
    """The sequence whose lines or state its publisher started from, 0 for none."""
    holders: int = 0
    """Open sequences that read it."""
    alive: bool = True
    """Still in the tree; a page that only its holders know is not."""
    checkpoint: int = -1
    """The row with the state after exactly the tokens up to this page's last, -1 for none."""
    saver: int = 0
    """The sequence that saved the checkpoint."""
    rolling: bool = False
    """The checkpoint is its saver's to move on with."""
    useful: int = 0
    """Its own checkpoint and its children with one at or below them."""
    children: dict[Key, Node] = field(default_factory=dict[Key, "Node"])
    order: list[Key] = field(default_factory=list[Key])
    """The keys of the children, sorted."""
    salt: str = ""
    """Of a root."""

    def nearest(self, tokens: Key) -> tuple[Node | None, int]:
        """Return the child that begins most like `tokens`, and how many tokens agree."""
        place = bisect_left(self.order, tokens)
        best: tuple[Node | None, int] = (None, 0)
        for key in self.order[max(0, place - 1) : place + 1]:
            common = next((at for at, pair in enumerate(zip(key, tokens, strict=False)) if pair[0] != pair[1]), None)
            common = min(len(key), len(tokens)) if common is None else common
            if common > best[1]:
                best = self.children[key], common
        return best


class Tree:
    """Owns the nodes, the order in which they may go, and the checkpoint rows.

    Whatever an open sequence holds stays. The rest goes in the order in which it was given back, a
    child always before its parent. With recurrent layers nobody can start from a page that has no
    checkpoint at or below it, so those go before all others.
    """

    def __init__(
        self,
        rows: Seq[int],
        *,
        recurrent: bool,
        free_pages: FreePages,
        free_row: Callable[[int], None],
    ) -> None:
        """`rows` take checkpoints; the callables are told what is free again."""
        self.roots: dict[str, Node] = {}
        self.rows = tuple(rows)
        self.free_rows = list(reversed(rows))
        self.checkpoints: OrderedDict[Node, None] = OrderedDict()
        self.evicted_pages = 0
        self.evicted_checkpoints = 0
        self._recurrent = recurrent
        self.free_pages = free_pages
        self._free_row = free_row
        self._useless: OrderedDict[Node, None] = OrderedDict()
        self._idle: OrderedDict[Node, None] = OrderedDict()

    @property
    def idle(self) -> int:
        """Pages that no open sequence holds: all of them can go."""
        return len(self._useless) + len(self._idle)

    def match(self, salt: str, tokens: Seq[int], page_tokens: int) -> list[Node]:
        """Return the pages that hold the first tokens, whole pages only."""
        path: list[Node] = []
        node = self.roots.get(salt)
        for start in range(0, len(tokens) - page_tokens + 1, page_tokens):
            node = node and node.children.get(tuple(tokens[start : start + page_tokens]))
            if node is None:
                break
            path.append(node)
        return path

    def extend(self, salt: str, parent: Node | None, tokens: Key, page: int, publisher: int, source: int) -> Node:
        """Return the child of `parent` (None: of the root) that holds `tokens`, a new one if there is none."""
        above = parent or self.roots.setdefault(salt, Node(salt=salt))
        if found := above.children.get(tokens):
            return found
        near, common = above.nearest(tokens)
        node = above.children[tokens] = Node(tokens, page, above, publisher, source)
        insort(above.order, tokens)
        if near is not None and common == len(near.tokens):
            # A shorter tail of the same tokens: what is found through it is found through the new page.
            self.remove(near)
        return node

    def hold(self, node: Node) -> None:
        """Keep a page for an open sequence."""
        node.holders += 1
        self._idle.pop(node, None)
        self._useless.pop(node, None)

    def release(self, node: Node) -> None:
        """Give a page back; of several the deepest comes first, so that children go before parents."""
        node.holders -= 1
        if not node.holders and node.alive:
            self.rest(node)
        elif not node.holders:
            self.free_pages([node.page], wipe=True)

    def rest(self, node: Node) -> None:
        """Note that a page was used just now and is held by nobody."""
        queue = self._useless if self._recurrent and not node.useful else self._idle
        queue[node] = None
        queue.move_to_end(node)

    def evict(self, count: int) -> None:
        """Give back the `count` pages that go first."""
        for _ in range(count):
            node = next(iter(self._useless or self._idle))
            self.evicted_pages += 1
            self.evicted_checkpoints += node.checkpoint >= 0
            self.remove(node)

    def remove(self, top: Node, *, wipe: bool = False) -> None:
        """Take a node and all below it out of the tree; pages that are held go when their last holder does."""
        below = list(descend(top))
        parent = top.parent
        for node in reversed(below):
            self.drop_checkpoint(node)
            node.alive = False
            self._idle.pop(node, None)
            self._useless.pop(node, None)
        if parent is not None:
            del parent.children[top.tokens]
            parent.order.remove(top.tokens)
            if parent.page < 0 and not parent.children:
                del self.roots[parent.salt]
        self.free_pages([node.page for node in below if not node.holders], wipe=wipe)

    def clear(self) -> None:
        """Take out all nodes."""
        for root in list(self.roots.values()):
            for node in list(root.children.values()):
                self.remove(node)

    def take_row(self) -> int:
        """Return a free checkpoint row; when there is none, the one that was used least recently."""
        if not self.free_rows:
            self.evicted_checkpoints += 1
            self.drop_checkpoint(next(iter(self.checkpoints)))
        return self.free_rows.pop()

    def set_checkpoint(self, node: Node, row: int, saver: int, *, rolling: bool) -> None:
        """Publish a row that holds the state after exactly the tokens up to this node."""
        node.checkpoint, node.saver, node.rolling = row, saver, rolling
        self.checkpoints[node] = None
        self._count(node, 1)

    def drop_checkpoint(self, node: Node) -> None:
        """Give a node's checkpoint row back, if it has one."""
        if node.checkpoint < 0:
            return
        self.free_rows.append(node.checkpoint)
        self._free_row(node.checkpoint)
        node.checkpoint, node.rolling = -1, False
        del self.checkpoints[node]
        self._count(node, -1)

    def check(self, held: dict[Node, int]) -> list[int]:
        """Raise Corrupted unless all counts are right; return the pages of the tree, and those removed but held."""
        nodes = [node for root in self.roots.values() for node in descend(root) if node.page >= 0]
        queued = [*self._useless, *self._idle]
        wrong = next((node for node in {*nodes, *held} if node.holders != held.get(node, 0)), None)
        if wrong is not None:
            raise Corrupted(f"page {wrong.page} has {held.get(wrong, 0)} holders, but counts {wrong.holders}")
        if len(queued) != len(set(queued)) or set(queued) != {node for node in nodes if not node.holders}:
            raise Corrupted(f"{len(queued)} cached pages may be evicted, but other pages are held by nobody")
        if sorted([*self.free_rows, *(node.checkpoint for node in self.checkpoints)]) != sorted(self.rows):
            raise Corrupted(f"{len(self.rows)} checkpoint rows are not each free or in the tree exactly once")
        for node in nodes:
            useful = (node.checkpoint >= 0) + sum(child.useful > 0 for child in node.children.values())
            if node.useful != useful or (node.checkpoint >= 0) != (node in self.checkpoints):
                raise Corrupted(f"page {node.page} counts {node.useful} checkpoints at and below it, not {useful}")
            if node in self._useless and (useful or not self._recurrent):
                raise Corrupted(f"page {node.page} can be started from, but goes before those that cannot")
            if node.order != sorted(node.children) or (self._recurrent and node in self._idle and not useful):
                raise Corrupted(f"page {node.page} is out of order")
        return [node.page for node in {*nodes, *held}]

    def _count(self, node: Node, change: int) -> None:
        """Carry a checkpoint that came or went up the tree, as far as it decides whether a page is of use."""
        above: Node | None = node
        while above is not None and above.page >= 0:
            before = above.useful
            above.useful += change
            if before and above.useful:
                return
            if not above.useful and above in self._idle:
                del self._idle[above]
                self._useless[above] = None
            above = above.parent


def descend(top: Node) -> Iterator[Node]:
    """Walk through a node and all below it, parents first."""
    ahead = [top]
    while ahead:
        node = ahead.pop()
        yield node
        ahead += node.children.values()
