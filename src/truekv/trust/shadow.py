"""The shadow: a few tokens once more through the model, stored and unquantized, to see what the cache changes.

Both passes start from nothing, in memory of their own that exists only while they run: without prefix
cache, speculation or capture. They differ in one thing, how rows are stored.
"""

# Shape suffixes: T tokens, H hidden size, V vocabulary.

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from truekv.core.batch import Chunk
from truekv.core.lazy import torch
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.pages import PagedLayer
from truekv.memory.plan import plan
from truekv.trust.measure import Divergence, kl

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from truekv.core.protocols import CacheFormat, Model
    from truekv.formats.frame import Frame
    from truekv.kernels.table import Kernels
    from truekv.memory.plan import MemoryPlan

WINDOW: Final = 256
"""Most tokens of a replay: both passes together take about as long as one full prefill step."""
# Logits compared at once: with a large vocabulary they are what takes memory.
_LOGITS: Final = 1 << 21


class Shadow:
    """Replays tokens through a model as its cache stores them, and unquantized."""

    def __init__(self, model: Model, arena: Arena, window: int = WINDOW) -> None:
        """Plan both passes after the engine's arena, without allocating; Refused where float32 rows cannot run."""
        spec = model.spec
        self.window = min(window, arena.plan.max_context_one_sequence)
        self._model = model
        self._device = arena.device
        frames = {
            (index, stored.field.name): cast("Frame", stored.frame)
            for index, layer in enumerate(arena.layers)
            if isinstance(layer, PagedLayer)
            for stored in layer.stored
        }
        formats = [layer.formats for layer in arena.plan.layers]
        exact = [chosen or () for chosen in choose_formats(spec, "f32", "", arena.plan.dtype)]
        self._exact = self._planned(arena, exact, {})
        self._stored = self._planned(arena, formats, frames)
        self.formats = " and ".join(dict.fromkeys(item.name for chosen in formats for item in chosen))
        """What the engine stores rows in, as a sentence says it."""

    @property
    def nbytes(self) -> int:
        """Bytes of rows and states while a comparison runs, 0 before and after: one pass is freed before the next."""
        return max(self._exact[0].total_bytes, self._stored[0].total_bytes)

    def compare(self, tokens: Sequence[int]) -> Divergence:
        """Replay the last `window` tokens of a request both ways; how far the stored way is from the exact one."""
        replayed = list(tokens[-self.window :])
        size = max(1, _LOGITS // self._model.spec.vocab_size)
        kls: list[torch.Tensor] = []
        same = 0
        with torch.inference_mode():
            exact_TH, stored_TH = self._residuals(replayed, *self._exact), self._residuals(replayed, *self._stored)
            for start in range(0, len(replayed), size):
                rows = slice(start, start + size)
                exact_TV, stored_TV = (self._model.logits(part[rows]).float().cpu() for part in (exact_TH, stored_TH))
                kls.append(kl(exact_TV, stored_TV))
                same += int((exact_TV.argmax(-1) == stored_TV.argmax(-1)).sum())
        kl_T = torch.cat(kls)
        return Divergence(float(kl_T.mean()), float(kl_T.max()), same / len(replayed))

    def _planned(
        self, arena: Arena, formats: Sequence[tuple[CacheFormat, ...]], frames: Mapping[tuple[int, str], Frame]
    ) -> tuple[MemoryPlan, Kernels, Mapping[tuple[int, str], Frame]]:
        spec = self._model.spec
        layout = plan(spec, formats, max_model_len=self.window, dtype=arena.plan.dtype)
        return layout, select(spec, formats, backend=arena.kernels.backend, device=arena.device), frames

    def _residuals(
        self, tokens: list[int], layout: MemoryPlan, kernels: Kernels, frames: Mapping[tuple[int, str], Frame]
    ) -> torch.Tensor:
        """Run tokens in one step of a new arena, which is freed on return; residuals [T, H]."""
        # NaN that reaches the logits is measured as an infinite divergence, so it need not stop the pass.
        arena = Arena(self._model.spec, layout, kernels, frames, check_finite=False, device=self._device)
        return self._model.forward(arena.reserve([Chunk(arena.open(), tokens)]), arena.layers)
