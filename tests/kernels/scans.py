"""One step of a recurrent rule over ragged rows, with everything that it may not read full of NaN."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, cast

import torch

from truekv.core.batch import Step

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent

SLOTS, DRAFTS = 7, 5


def name_of(value: object) -> str:
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    layer = cast("Recurrent", value)
    return f"{layer.rule}-{'x'.join(map(str, layer.state[0].shape))}-{layer.state[1].shape[1] + 1}"


@dataclasses.dataclass
class Case:
    """A layer's inputs, weights and memory, and a step over some of its slots."""

    layer: Recurrent
    inputs: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]
    state: dict[str, torch.Tensor]
    log: dict[str, torch.Tensor]
    step: Step

    def run(self, scan: ScanKernel) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        """Return the output and what memory holds afterwards; the case stays as it is."""
        state = {name: slab.clone() for name, slab in self.state.items()}
        log = {name: slab.clone() for name, slab in self.log.items()}
        return scan(self.layer, self.inputs, self.weights, state, log, self.step), state, log

    def to(self, device: str) -> Case:
        """The same on a device."""
        parts = ({name: part.to(device) for name, part in each.items()} for each in self._tensors())
        step = {field.name: getattr(self.step, field.name).to(device) for field in dataclasses.fields(self.step)}
        return Case(self.layer, *parts, Step(**step))

    def _tensors(self) -> tuple[dict[str, torch.Tensor], ...]:
        return self.inputs, self.weights, self.state, self.log


def random_case(
    layer: Recurrent,
    dtype: torch.dtype,
    seed: int,
    lengths: Sequence[int] = (0, 1, 1, 2, 5, 31, 32, 33, 70),
    most_drafts: int = DRAFTS,
) -> Case:
    """Rows of any of the lengths in any slots, any number replayed, some of them drafts; all else in memory is NaN."""
    chance, make = random.Random(seed), torch.Generator().manual_seed(seed)
    rows = chance.randint(1, 5)
    counts = [chance.choice(lengths) for _ in range(rows)]
    counts[chance.randrange(rows)] = chance.randint(1, max(lengths))
    drafts = [chance.randint(0, min(count, most_drafts)) for count in counts]
    replay = [chance.randint(0, DRAFTS) for _ in counts]
    slots = chance.sample(range(SLOTS), rows)
    heads, tokens = layer.state[0].shape[0], sum(counts)

    def some(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=make)

    def per_head(*leading: int) -> dict[str, torch.Tensor]:
        if layer.rule == "gdn":
            return {"beta": some(*leading, heads).sigmoid(), "decay": -some(*leading, heads).abs()}
        return {"dt": some(*leading, heads).abs()}

    channels, width = layer.state[1].shape
    weights = {"conv": some(channels, width + 1).to(dtype)}
    if layer.rule == "mamba2":
        weights |= {"conv_bias": some(channels).to(dtype), "A": -some(heads).abs(), "D": some(heads)}
    state = {"state": some(SLOTS, *layer.state[0].shape), "conv": some(SLOTS, channels, width).to(dtype)}
    log = {"conv": some(SLOTS, DRAFTS, channels).to(dtype), **per_head(SLOTS, DRAFTS)}
    for slot in range(SLOTS):
        logged = replay[slots.index(slot)] if slot in slots else 0
        for slab in log.values():
            slab[slot, logged:] = torch.nan
        for slab in () if slot in slots else state.values():
            slab[slot] = torch.nan
    inputs = {"conv": some(tokens, channels + 3)[:, 2:-1].to(dtype), **per_head(tokens)}
    return Case(layer, inputs, weights, state, log, make_step(counts, drafts, replay, slots))


def make_step(counts: list[int], drafts: list[int], replay: list[int], slots: list[int]) -> Step:
    starts = [sum(counts[:row]) for row in range(len(counts))]
    tokens, longest = sum(counts), max(counts)
    unused = torch.zeros(tokens, dtype=torch.int64)
    return Step(
        tokens=unused,
        positions=unused,
        owner=torch.tensor([row for row, count in enumerate(counts) for _ in range(count)]),
        offset=torch.tensor([place for count in counts for place in range(count)]),
        gather=torch.tensor(
            [
                [min(start + min(place, max(count - 1, 0)), tokens - 1) for place in range(longest)]
                for start, count in zip(starts, counts, strict=True)
            ]
        ),
        position=torch.tensor(replay),
        count=torch.tensor(counts),
        certain=torch.tensor([count - drafted for count, drafted in zip(counts, drafts, strict=True)]),
        replay=torch.tensor(replay),
        slot=torch.tensor(slots),
        pages=unused[None],
        page=unused,
        line=unused,
    )


def far(got: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, as a fraction of the largest number."""
    return float((got - expected).abs().max() / expected.abs().max())
