"""What steps allocate on a device that is not there, next to what is kept for them: `python peak.py CONFIG`.

Every storage that torch makes on the device is counted while it lives; nothing is computed. Says in JSON, for
each pass, what steps of each kind took and what was kept. A process of its own, as placement.py is.
"""

from __future__ import annotations

import gc
import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import placement
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from truekv.core.batch import Chunk, Sequence
from truekv.core.config import Config
from truekv.core.sampling import Reading
from truekv.core.weights import Weights
from truekv.engine.activations import activations
from truekv.engine.capture import StepGraphs
from truekv.engine.run import Runner
from truekv.engine.sample import ALL
from truekv.engine.speculate.mtp import Predictor, Row
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.kernels.triton import paged, rows, tiles
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import understand

DRAFTS, SEQUENCES, LONGEST, BEST = 3, 16, 16_384, 64
CAPTURED = "sums of attention"
PASSES = {
    "logits": ("int8", "bfloat16", 1 << 20, 2048),
    "layers": ("f32", "float32", 1000, 2048),
    CAPTURED: ("int8", "bfloat16", 1000, 128),
}
"""Rows, compute dtype, most logits of a token and most tokens of a step, by what takes most."""


class Counted(FakeTensorMode):
    """Adds up the bytes of a device's storages that live, and remembers the most since `begin`."""

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.place, self.most, self._before = device, 0, 0
        self._live: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        new = False
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device == self.place:
                storage = tensor.untyped_storage()
                known = self._live.get(storage._cdata)
                if known is None or known[0].expired():
                    self._live[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
                    new = True
        if new:
            self.most = max(self.most, self.now())
        return made

    def begin(self) -> None:
        """Count from what there is now."""
        self._before, self.most = 0, 0
        self._before = self.now()

    def now(self) -> int:
        """Return the bytes that there are now more than then."""
        self._live = {at: found for at, found in self._live.items() if not found[0].expired()}
        return sum(size for _, size in self._live.values()) - self._before


def mixes(parts: Any, most: int) -> dict[str, list[tuple[int, int]]]:
    """Steps as (tokens, drafts) of each row: those of which something is largest, and more prompts than have room."""
    verified = [(1 + DRAFTS, DRAFTS)] * SEQUENCES
    found = {"prompt": [(most, 0)], "tokens": [(1, 0)] * SEQUENCES, "drafts": verified}
    for length in (5, most // 4, most - (1 + DRAFTS) * (SEQUENCES - 1)):
        found[f"{length} beside drafts"] = [*verified[1:], (length, 0)]
    for length in (5, 64, most // SEQUENCES):
        many, pages = min(SEQUENCES, most // length), -(-LONGEST // parts.page_tokens)
        # As many as the schedule would take.
        while many > 1 and parts.of(many * length, length, pages) > parts.most:
            many -= 1
        found[f"{many} prompts of {length}"] = [(length, 0)] * many
    return found


def run(architecture: Any, kv: str, dtype: Any, most: int, counted: Counted, *, captured: bool) -> dict[str, Any]:
    """Return bytes that were kept, and those that steps took, eager ones by their kind and captured ones."""
    device, heads = counted.place, bool(architecture.spec.draft_layers)
    architecture = architecture.with_draft_head() if heads else architecture
    spec = architecture.spec
    formats = choose_formats(spec, kv, "", dtype)
    draft_formats = choose_formats(spec, kv, "", dtype, draft=True) if heads else None
    kernels = select(spec, formats, draft_formats or (), backend="triton", device=device)
    longest = min(LONGEST, spec.max_positions)
    depth = max(1, longest - most - DRAFTS)
    asked: dict[str, Any] = {"max_model_len": longest, "max_num_seqs": SEQUENCES, "drafts": DRAFTS, "dtype": dtype}
    planned = plan(spec, formats, **asked, draft_formats=draft_formats, scratch=1)
    kept = activations(architecture, planned, most, captured=True)
    weights = {
        name: torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        for name, shape in architecture.tensors.items()
    }
    model = architecture.build(Weights(weights, kernels.ops, device))
    arena = Arena(spec, planned, kernels, check_finite=False, device=device)
    held = [arena.open() for _ in range(SEQUENCES)]
    for sequence in held:
        arena.reserve([Chunk(sequence, [1] * depth)])
        arena.advance(sequence, depth)
    graphs = StepGraphs(lambda step: model.forward(step, arena.layers), arena)

    def take(runner: Runner, predictor: Predictor | None, mix: list[tuple[int, int]]) -> int:
        """Run a step and what follows it, of which nothing becomes real; return the most bytes it took."""
        chunks = [Chunk(one, [1] * count, drafts, DRAFTS - 1) for one, (count, drafts) in zip(held, mix, strict=False)]
        wanted = [1 + drafts for _, drafts in mix]
        drawn = [Reading(ALL, 0.8, points=(0.5,) * count) for count in wanted]
        taken = 0
        others = ([Reading(BEST, 0.8, top_p=0.9)] * len(mix), [Reading(spec.vocab_size)] * len(mix))
        for read in (drawn, *(others if set(mix) == {(1 + DRAFTS, DRAFTS)} else ())):
            saved = [(one.position, list(one.pages)) for one in held]
            counted.begin()
            ran = runner.run(chunks, wanted, read)
            if predictor:
                predictor.propose(told(chunks), ran.hidden)
            taken = max(taken, counted.most)
            del ran
            give_back(arena, held, saved)
        return taken

    def told(chunks: list[Chunk]) -> list[Row]:
        found: list[Row] = []
        start = 0
        for chunk in chunks:
            real = len(chunk.tokens) - chunk.drafts
            found.append(Row(chunk.sequence, chunk.sequence.position, [1] * real, range(start, start + real), DRAFTS))
            start += len(chunk.tokens)
        return found

    eager = Runner(model, arena), Predictor(model, arena) if heads else None
    short = {name: mix for name, mix in mixes(kept.parts, most).items() if depth + max(mix)[0] + DRAFTS <= longest}
    steps = {name: take(*eager, mix) for name, mix in short.items()}
    found: dict[str, Any] = {"kept": asdict(kept), "steps": steps}
    if captured:
        counted.begin()
        graphs.warm(10**9, progress=lambda _done, _total: None)
        left = counted.now()
        found |= {"captured": counted.most - left, "recordings": left, "sizes": graphs.recorded}
    return found


def shortened(path: Path, vocabulary: int) -> Any:
    """Read a config and leave one layer of each kind, and so many logits."""
    config = json.loads(path.read_text())
    inner = config.get("text_config", config)
    inner["vocab_size"] = min(vocabulary, inner["vocab_size"])
    for name in ("num_experts", "n_routed_experts", "num_local_experts"):
        if name in inner:
            # What they take is a few numbers for each, and time to make them.
            inner[name] = min(16, inner[name])
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if name in inner:
            inner[name] = sorted(set(inner[name]))
            inner["num_hidden_layers"] = len(inner[name])
    if "first_k_dense_replace" in inner:
        inner["num_hidden_layers"] = inner["first_k_dense_replace"] + 1
    return understand(Config(config))


def give_back(arena: Arena, held: list[Sequence], saved: list[tuple[int, list[int]]]) -> None:
    """Let what a step reserved be reserved again."""
    for sequence, (_, pages) in zip(held, saved, strict=True):
        lease = arena._leases[sequence.slot]
        arena._release(sequence.pages[len(pages) :])
        del sequence.pages[len(pages) :]
        sequence.reserved = None
        lease.note()


def main() -> None:
    device = placement.fake()
    for module in (paged, rows, tiles):
        module.INTERPRETED = False
    paged.arch = lambda: 90
    found: dict[str, Any] = {}
    with Counted(device) as counted:
        for name, (kv, dtype, vocabulary, most) in PASSES.items():
            gc.collect()
            found[name] = run(
                shortened(Path(sys.argv[1]), vocabulary), kv, dtype, most, counted, captured=name == CAPTURED
            )
    sys.stdout.write(json.dumps(found))


if __name__ == "__main__":
    main()
