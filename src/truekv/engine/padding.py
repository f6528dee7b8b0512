"""A step of a fixed size: any smaller step is laid into it, and what is left belongs to nobody.

Rows that are left have no tokens, so kernels do nothing for them; they name a slot and a page of scratch, since an
index must lead somewhere. Tokens that are left follow those of the last row, are owned by a row without tokens and
go to line -1: no row reads them and they are stored nowhere.
"""

from __future__ import annotations

import math
import operator
from dataclasses import fields
from typing import TYPE_CHECKING, Final, NamedTuple

from truekv.core.batch import Step
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

_FIELDS: Final = operator.attrgetter(*(field.name for field in fields(Step)))
_KNOWN: Final = 256
"""Smaller steps of which it is known where their numbers go."""
_NUMBERS: Final = 1 << 17
"""Of all of them together, but for the last: page tables of long sequences are large, and every size keeps its own."""


class StepSize(NamedTuple):
    """The shape of a step."""

    tokens: int
    """T."""
    rows: int
    """B."""
    longest: int
    """Q, most tokens of a row."""
    pages: int
    """W, width of the page table."""

    @classmethod
    def of(cls, step: Step) -> StepSize:
        """Measure a step."""
        rows, longest = step.gather.shape
        return cls(step.tokens.shape[0], rows, longest, step.pages.shape[1])

    def __str__(self) -> str:
        """Say it in words."""
        return f"{self.tokens} tokens, {self.rows} rows of up to {self.longest} and {self.pages} pages"

    def holds(self, step: StepSize) -> bool:
        """Whether a step of another size can be laid into this one."""
        # Tokens that are left need a row without tokens to own them.
        rows = step.rows + (self.tokens > step.tokens)
        return (
            self.tokens >= step.tokens
            and self.rows >= rows
            and self.longest >= step.longest
            and self.pages >= step.pages
        )


def buffers(size: StepSize) -> int:
    """Return the most bytes that a PaddedStep of this size keeps on its device."""
    numbers = 6 * size.tokens + size.rows * (size.longest + size.pages + 5)
    return 8 * (2 * numbers + min(_KNOWN * numbers, _NUMBERS + numbers))


def nobody(size: StepSize, slot: int, page: int, device: torch.device) -> Step:
    """Describe a step of this size without a row that has tokens; indices lead to this slot and this page."""
    tokens, rows = (size.tokens,), (size.rows,)

    def filled(shape: tuple[int, ...], value: int = 0) -> torch.Tensor:
        return torch.full(shape, value, dtype=torch.int64, device=device)

    return Step(
        tokens=filled(tokens),
        positions=filled(tokens),
        owner=filled(tokens, size.rows - 1),
        offset=filled(tokens),
        gather=filled((size.rows, size.longest)),
        position=filled(rows),
        count=filled(rows),
        certain=filled(rows),
        replay=filled(rows),
        slot=filled(rows, slot),
        pages=filled((size.rows, size.pages), page),
        page=filled(tokens, page),
        line=filled(tokens, -1),
    )


class PaddedStep:
    """Buffers that hold one step after the other, and the first one wherever a later one leaves room."""

    def __init__(self, step: Step, tensors: Seq[torch.Tensor] = ()) -> None:
        """Copy the first step, and tensors [T, ...] that go with it."""
        values = _FIELDS(step)
        self._first = torch.cat([value.flatten() for value in values])
        self._numbers = self._first.clone()
        parts = torch.split(self._numbers, [math.prod(value.shape) for value in values])
        views = [part.view(value.shape) for part, value in zip(parts, values, strict=True)]
        self.step = Step(*views)
        """The buffers, which stay where they are."""
        self.tensors = tuple(tensor.clone() for tensor in tensors)
        """Those that go with it."""
        self._places: dict[StepSize, torch.Tensor] = {}
        self._known = 0

    def put(self, step: Step, tensors: Seq[torch.Tensor] = ()) -> None:
        """Lay in a step that is no larger; nothing of the one before stays."""
        self._numbers.copy_(self._first)
        # Launches cost more than what they copy, so all fields are laid in by one.
        numbers = torch.cat([value.reshape(-1) if value.ndim > 1 else value for value in _FIELDS(step)])
        self._numbers.index_copy_(0, self._places_of(step), numbers)
        for tensor, buffer in zip(tensors, self.tensors, strict=True):
            count = len(tensor)
            buffer[:count] = tensor
            if count < len(buffer):
                buffer[count:] = 0

    def _places_of(self, step: Step) -> torch.Tensor:
        """Where the numbers of a step of this size lie among the buffers', in the order of its fields."""
        size = StepSize.of(step)
        known = self._places.get(size)
        if known is None:
            if len(self._places) == _KNOWN or self._known > _NUMBERS:
                self._places.clear()
                self._known = 0
            places = torch.arange(len(self._numbers), device=self._numbers.device)
            parts: list[torch.Tensor] = []
            start = 0
            for value, buffer in zip(_FIELDS(step), _FIELDS(self.step), strict=True):
                part = places[start : start + buffer.numel()].view(buffer.shape)
                for dim, length in enumerate(value.shape):
                    part = part.narrow(dim, 0, length)
                parts.append(part.flatten())
                start += buffer.numel()
            known = self._places[size] = torch.cat(parts)
            self._known += len(known)
        return known
