"""What moves: a Sequence lives on the host, a Step is one trip through the model."""

from __future__ import annotations

from array import array
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truekv.core.lazy import torch


@dataclass(slots=True, eq=False)
class Sequence:
    """One request as memory knows it. Host only, no tensors."""

    position: int = 0
    """How many tokens memory really holds: the only truth about it."""
    pages: array[int] = field(default_factory=lambda: array("q"))
    """As int64, so that a step takes over a long table as it lies there."""
    slot: int = -1
    """The state slot of every recurrent layer; -1 once closed."""
    replay: int = 0
    """Logged draft tokens that were accepted and are not folded into the state yet."""
    reserved: tuple[int, int] | None = None
    """(tokens, drafts) of the step under way; None between steps."""


@dataclass(frozen=True, slots=True)
class Chunk:
    """What one sequence brings to a step: `tokens`, of which the last `drafts` are guesses.

    The others are certain: prompt tokens, or the token sampled last. A step folds certain tokens
    into recurrent state at once and only logs the drafts, so prefill needs no log at all.
    """

    sequence: Sequence
    tokens: list[int]
    drafts: int = 0
    room: int = 0
    """Lines after these tokens that the draft layers may write guesses of their own to."""


@dataclass(frozen=True, slots=True)
class Step:
    """Everything one forward pass may read: T new tokens of B sequences, ragged.

    All integers are int64 tensors on the model's device, so a forward needs no host value and a
    captured graph replays with other contents. Q is the longest chunk, W the width of the page
    table. Row b owns `count[b]` new tokens at positions `position[b] ...`; the first `certain[b]`
    of them are real already, the others are drafts.
    """

    tokens: torch.Tensor
    """[T] token ids, the chunks one after the other."""
    positions: torch.Tensor
    """[T] absolute position of each token."""
    owner: torch.Tensor
    """[T] the row that owns each token."""
    offset: torch.Tensor
    """[T] place of each token in its chunk, so padded[owner, offset] is ragged again."""
    gather: torch.Tensor
    """[B, Q] index into T of each row's q-th token; entries beyond count[b] repeat a valid index."""
    position: torch.Tensor
    """[B] tokens in memory before this step."""
    count: torch.Tensor
    """[B] new tokens."""
    certain: torch.Tensor
    """[B] how many of them are real whatever verification says."""
    replay: torch.Tensor
    """[B] logged tokens of the previous step to fold into the state first."""
    slot: torch.Tensor
    """[B] state slot."""
    pages: torch.Tensor
    """[B, W] page table; entries beyond the sequence's pages repeat a valid page."""
    page: torch.Tensor
    """[T] page each new token is written to."""
    line: torch.Tensor
    """[T] line inside that page."""
