"""What steps need on a GPU beside weights, rows and states: an upper bound, from sizes alone.

It is left out of what the cache gets. What torch's allocator rounds and cannot join again, the libraries' workspaces
and the code of kernels are not among it, nor log-probabilities of prompts, which want the whole vocabulary for every
token: a step that has no room for them is taken in smaller ones.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final

from truekv.engine.capture import KEPT, StepSizes
from truekv.engine.padding import buffers
from truekv.engine.settle import ROOM
from truekv.engine.settle import SPAN as DRAWN

if TYPE_CHECKING:
    from truekv.core.protocols import Architecture
    from truekv.memory.plan import MemoryPlan

SPAN: Final = 512
"""Keys that attention sums apart on a GPU where a row's queries fit into one tile; see kernels/triton/tiles.py."""
TILE: Final = 64
"""Most query rows of a tile. More of them take longer spans, so that sums do not grow with both."""
RESIDUALS: Final = 10
"""Tensors [T, hidden_size] at once: residuals and changes of two layers, norms, and what the head of guesses joins."""
LOGITS: Final = 8
"""Bytes of one logit of a row that is sampled from: float32, and a copy of the rows that are alike."""
KEYS: Final = 8
"""Bytes of one logit of a row of which the best are looked for."""
RECORDED_LOGITS: Final = 12
"""Bytes of one logit of a row in a recording: as the product gives it, widened and scaled."""


@dataclass(frozen=True, slots=True)
class Parts:
    """How many sums of attention a step may leave to be merged: one for each token and span of the page table."""

    group: int
    """Query heads that share a kv head; the fewest of any layer."""
    page_tokens: int
    most: int = 0
    """In one step; what was planned for."""

    def of(self, tokens: int, longest: int, pages: int) -> int:
        """Return those of a step of so many tokens, at most `longest` of a row, and a table of so many pages."""
        tiles = -(-self.group * longest // TILE)
        return tokens * -(-pages * self.page_tokens // (SPAN << (tiles - 1).bit_length()))

    def planned(self, sequences: int, each: int, step_tokens: int, pages: int) -> Parts:
        """Return the same with room for a prompt's chunk of any length beside `each` tokens of all other sequences.

        Of no more than `step_tokens` together, in tables of so many pages. More prompts than one wait, where contexts
        are so long that they would leave more; see Schedule.
        """
        beside = (sequences - 1) * each
        # The longest chunks of so many tiles, as longer ones take longer spans.
        longest = [max(1, (TILE << power) // self.group) for power in range(step_tokens.bit_length())]
        lengths = {each, step_tokens, *longest}
        most = max(self.of(min(step_tokens, beside + length), length, pages) for length in lengths)
        return replace(self, most=most)


@dataclass(frozen=True, slots=True)
class Activations:
    """Bytes of a device that are kept for steps."""

    step: int
    """Of the largest step that is run launch by launch."""
    captured: int
    """Of the largest one that is captured, which all recordings share."""
    recordings: int
    """Of what each recording keeps."""
    parts: Parts

    @property
    def nbytes(self) -> int:
        """All of them: what recordings hold, no other step can take."""
        return self.step + self.captured + self.recordings


def activations(architecture: Architecture, plan: MemoryPlan, step_tokens: int, *, captured: bool) -> Activations:
    """Bound what steps of up to `step_tokens` tokens need, with the slots, drafts and context of a plan."""
    spec, drafts = architecture.spec, plan.drafts
    size = 4 if plan.dtype == "float32" else 2
    sequences = plan.slots - captured
    pages = plan.pages_for(plan.longest + drafts)
    group = min((half.group for half in architecture.live if half.merged), default=1)
    parts = Parts(group, plan.page_tokens).planned(sequences, 1 + drafts, step_tokens, pages)

    def step(tokens: int, rows: int, sums: int, logits: int) -> int:
        integers = 8 * (8 * tokens + rows * (tokens + 2 * pages + 8))
        halves = [
            (tokens + half.places * rows * drafts) * (half.model * size + 4 * half.single) + 4 * half.merged * sums
            for half in architecture.live
        ]
        return integers + RESIDUALS * tokens * spec.hidden_size * size + max(*halves, logits)

    sampled = min(step_tokens, sequences * (1 + drafts))
    logits = sampled * spec.vocab_size
    # As engine/settle.py makes them: all weights of a few rows, then one span of each and its sums.
    spans = -(-spec.vocab_size // DRAWN)
    rows = min(sampled, max(1, ROOM // (8 * DRAWN * spans)))
    weights = 8 * rows * (2 * DRAWN * spans + 6 * DRAWN + 4 * spans)
    eager = step(step_tokens, sequences, parts.most, LOGITS * logits + max(KEYS * logits, weights))
    if not captured:
        return Activations(eager, 0, 0, parts)
    sizes = StepSizes(plan, cpu=False)
    largest = sizes.within(pages)[0]
    recorded = step(
        largest.tokens,
        largest.rows,
        parts.of(largest.tokens, 1, largest.pages),
        RECORDED_LOGITS * largest.tokens * spec.vocab_size,
    )
    kept = [buffers(one) + one.tokens * spec.hidden_size * size for one in sizes.within(pages)]
    # A head of guesses has recordings of its own for every number of them.
    graphs = 2 + drafts if plan.draft_layers else 1
    return Activations(eager, recorded, graphs * min(sum(kept), KEPT + max(kept)), parts)
