"""The state of one recurrent layer: a slot per sequence, the log of its last drafts, and saved states.

A slot holds the state after every token that is certain. Drafts are only logged: what the rule needs
of each one to fold it in. The next step folds those that were accepted; the others are forgotten,
because nothing was ever changed by them.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from truekv.core.errors import Corrupted
from truekv.core.lazy import torch
from truekv.core.untouched import untouched

if TYPE_CHECKING:
    from collections.abc import Mapping
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.spec import Recurrent, Slab
    from truekv.kernels.table import Kernels

ITEM_BYTES = {"float32": 4, "bfloat16": 2}
# The count of folded tokens that each slot carries, so that a wrong slot shows.
_COUNT_BYTES = 8


def state_bytes(layer: Recurrent, dtype: str) -> int:
    """Bytes of one slot: the state itself and an int64 count of the tokens in it."""
    return _COUNT_BYTES + sum(_slab_bytes(slab, dtype) for slab in layer.state)


def log_bytes(layer: Recurrent, dtype: str, drafts: int) -> int:
    """Bytes of one slot's log of `drafts` tokens."""
    return drafts * sum(_slab_bytes(slab, dtype) for slab in layer.log)


def slot_bytes(layer: Recurrent, dtype: str, drafts: int) -> int:
    """Bytes of one slot, state and log: what is planned, and what is allocated."""
    return state_bytes(layer, dtype) + log_bytes(layer, dtype, drafts)


def _slab_bytes(slab: Slab, dtype: str) -> int:
    return math.prod(slab.shape) * ITEM_BYTES[dtype if slab.dtype == "model" else slab.dtype]


class StateLayer:
    """Owns the state of one layer; implements core.protocols.StateMemory."""

    def __init__(
        self,
        name: str,
        layer: Recurrent,
        kernels: Kernels,
        *,
        slots: int,
        checkpoints: int,
        drafts: int,
        dtype: str,
        poison: bool,
        check_finite: bool,
        device: torch.device | str,
    ) -> None:
        """Allocate [slots + checkpoints, *shape] per state slab and [slots, drafts, *shape] per log slab."""
        self.name = name
        self.layer = layer
        self.kernels = kernels
        self.check_finite = check_finite

        def slab(slab: Slab, *leading: int) -> torch.Tensor:
            kind = getattr(torch, dtype if slab.dtype == "model" else slab.dtype)
            data = untouched((*leading, *slab.shape), kind, device, piece=_slab_bytes(slab, dtype))
            return data.fill_(math.nan) if poison else data

        self.state = {item.name: slab(item, slots + checkpoints) for item in layer.state}
        self.log = {item.name: slab(item, slots, drafts) for item in layer.log}
        self.folded = torch.full((slots + checkpoints,), -1, dtype=torch.int64, device=device)

    def scan(self, inputs: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor], step: Step) -> torch.Tensor:
        """Carry the state through the step; see core.protocols.StateMemory.

        Raises Corrupted when an input or the new state is not finite, or when a slot does not hold
        exactly the tokens that the step believes it holds.
        """
        if self.check_finite:
            self._check_slots(step)
            self._check_finite("the input", inputs)
        out = self.kernels.scan(self.layer, inputs, weights, self.state, self.log, step)
        # Who does not check does not count either: on a GPU those are two launches a layer.
        if self.check_finite:
            self.folded.index_copy_(0, step.slot, step.position + step.certain)
            self._check_finite("the state", self.state, step.slot)
        return out

    def open(self, slot: int) -> None:
        """Zero a slot: a sequence starts from no tokens, not from whatever was there."""
        for slab in self.state.values():
            # Memory that nobody has written to is zero and takes none as long as it is only read.
            bits = slab[slot].view(torch.int32 if slab.element_size() == 4 else torch.int16)
            if slab.device.type != "cpu" or not bits.numel() or any(map(bool, torch.aminmax(bits))):
                slab[slot] = 0
        self.folded[slot] = 0

    def copy(self, source: int, target: int) -> None:
        """Copy a state, and how many tokens are in it, from a slot or saved row to another."""
        for slab in (*self.state.values(), self.folded):
            slab[target] = slab[source]

    def expect(self, slot: int, tokens: int) -> None:
        """Raise Corrupted unless a slot holds the state after so many tokens, with check_finite."""
        if self.check_finite and int(self.folded[slot]) != tokens:
            raise self._misplaced(slot, int(self.folded[slot]), tokens)

    def erase(self, row: int) -> None:
        """Fill a slot and its log, or a saved row, with poison."""
        for slab in self.state.values():
            slab[row] = math.nan
        self.folded[row] = -1
        self.erase_log(row, 0)

    def erase_log(self, slot: int, accepted: int) -> None:
        """Fill the log with poison from the first draft that was not accepted; saved rows have none."""
        for slab in self.log.values():
            slab[slot : slot + 1, accepted:] = math.nan

    def tensors(self) -> Seq[torch.Tensor]:
        """Every tensor this layer allocated."""
        return (*self.state.values(), *self.log.values(), self.folded)

    def _check_slots(self, step: Step) -> None:
        held = self.folded.index_select(0, step.slot)
        expected = step.position - step.replay
        if not torch.equal(held, expected):
            row = int((held != expected).nonzero()[0, 0])
            raise self._misplaced(int(step.slot[row]), int(held[row]), int(expected[row]))

    def _misplaced(self, slot: int, held: int, expected: int) -> Corrupted:
        return Corrupted(
            f"{self.name}: slot {slot} holds the state after {held} tokens, but the step "
            f"expects {expected}; the sequence must be closed and computed again",
            layer=self.name,
        )

    def _check_finite(self, what: str, tensors: Mapping[str, torch.Tensor], rows: torch.Tensor | None = None) -> None:
        finite = self.kernels.ops.finite
        if not finite(*tensors.values(), rows=rows):
            name = next(name for name, tensor in tensors.items() if not finite(tensor, rows=rows))
            raise Corrupted(
                f"{self.name}: {what} '{name}' of the rule {self.layer.rule} holds NaN or infinity: "
                "check the weights and the compute dtype",
                layer=self.name,
            )
