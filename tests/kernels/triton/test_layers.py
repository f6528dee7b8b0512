"""What a step launches on a GPU, layer by layer: every kernel, and every operation of torch's that is one there."""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import pytest
import torch
from random_models import save_dense, save_hybrid, save_latent, save_mamba
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime.interpreter import InterpretedFunction

from truekv.core.batch import Chunk
from truekv.core.recording import recording
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.kernels.triton import paged, rows, tiles
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="launches are watched where kernels are interpreted")
# Room for a result, and another look at it.
NO_LAUNCH = {"aten.empty", "aten.empty_like", "aten.empty_strided", "aten.new_empty", "aten._unsafe_view"}


class Watched(TorchDispatchMode):
    """Lists what is launched, in order."""

    def __init__(self) -> None:
        super().__init__()
        self.launched: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        del types
        name = str(func.overloadpacket)
        if not func.is_view and name not in NO_LAUNCH:
            self.launched.append(name)
        return func(*args, **(kwargs or {}))


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> Watched:
    """Nothing is computed by Triton's kernels, which are chosen and given what a GPU's are."""
    found = Watched()

    def launch(kernel: Any, *_: object, **__: object) -> None:
        found.launched.append(kernel.fn.__name__)

    monkeypatch.setattr(InterpretedFunction, "run", launch)
    for module in (paged, rows, tiles):
        monkeypatch.setattr(module, "INTERPRETED", False)
    monkeypatch.setattr(paged, "arch", lambda: 90)
    return found


def launches(directory: Path, kv: str, watched: Watched) -> list[list[str]]:
    """Take a step of single tokens through a model as it is recorded, and list what each layer launches."""
    checkpoint = Checkpoint.open(str(directory))
    spec = checkpoint.architecture.spec
    formats = choose_formats(spec, kv, "", "bfloat16")
    kernels = select(spec, formats, backend="triton")
    planned = plan(spec, formats, max_model_len=64, max_num_seqs=3, drafts=0, dtype="bfloat16")
    model: Any = checkpoint.load("bfloat16", kernels.ops)
    arena = Arena(spec, planned, kernels, check_finite=False)
    step = arena.reserve([Chunk(arena.open(), [5]) for _ in range(3)])
    with torch.no_grad(), recording():
        # What is worked out once and kept is none of a step's.
        model.forward(step, arena.layers)
        x, change, found = model.embedding(step.tokens), None, list[list[str]]()
        angles = None if model.rotary is None else model.rotary.angles(step.positions)
        for layer, memory in zip(model.layers, arena.layers, strict=True):
            watched.launched.clear()
            with watched:
                x, change = layer(x, change, memory, step, angles)
            found.append([*watched.launched])
    return found


PRODUCT, HEADS = "aten.mm", "aten.bmm"
STORED = ["store_kernel", "query_kernel", "attend_kernel", "merge_kernel"]
MLP = ["_norm", PRODUCT, "_activate", PRODUCT]
EXPERTS = ["route_kernel", "tile_kernel", "multiply", "_activate", "multiply", "mix"]
# Beside the experts that are chosen one that every token has; the router's product is widened, or taken in float32.
MIXTURE = ["_norm", PRODUCT, "aten._to_copy", *EXPERTS, PRODUCT, "_activate", PRODUCT, "aten.add"]
WIDE_MIXTURE = ["_norm", "aten._to_copy", PRODUCT, *MIXTURE[3:]]
SCAN = ["prepare", "aten.zeros", "carry", "_gated_norm"]
GQA = ["_norm", PRODUCT, "_norm_rotate", *STORED, PRODUCT, *MLP]
GATED = ["_norm", PRODUCT, "_norm_rotate", *STORED, "_gate", PRODUCT, *MLP]
GDN = ["_norm", PRODUCT, "_delta_gates", *SCAN, PRODUCT, *MLP]
# Without positions; what a layer adds is multiplied.
UNTURNED = ["_norm", PRODUCT, *STORED, PRODUCT, "aten.mul", *MIXTURE, "aten.mul"]
MAMBA2 = ["_norm", PRODUCT, "_softplus", *SCAN, PRODUCT, "aten.mul", *MIXTURE, "aten.mul"]
# The norms of the queries' rank and of the latent row, and the heads' maps into the latent space and out of it.
LATENT = ["_norm", "_norm_rotate", HEADS, *STORED, HEADS, PRODUCT]
MLA = ["_norm", PRODUCT, "_norm", PRODUCT, *LATENT]
FULL_RANK = ["_norm", PRODUCT, *LATENT]


@pytest.mark.parametrize("kv", ["int8", "kv4", "bf16"])
@pytest.mark.parametrize(
    ("save", "expected"),
    [
        (save_dense, [GQA, GQA]),
        (save_hybrid, [GDN, GDN, GDN, GATED]),
        (save_mamba, [MAMBA2, UNTURNED, MAMBA2]),
        (save_latent, [[*MLA, *MLP], [*MLA, *WIDE_MIXTURE]]),
        (functools.partial(save_latent, q_lora_rank=None), [[*FULL_RANK, *MLP], [*FULL_RANK, *WIDE_MIXTURE]]),
    ],
    ids=["gqa", "gdn", "mamba2", "mla", "mla of full rank"],
)
def test_a_layer_launches_this_and_no_more(
    save: Callable[[Path], Path], expected: list[list[str]], kv: str, watched: Watched, tmp_path: Path
) -> None:
    """On a GPU each costs a step of one sequence a microsecond or two, in every layer."""
    assert launches(save(tmp_path), kv, watched) == expected


def test_as_many_as_the_documents_say() -> None:
    """Where every layer has an MLP; docs/decisions/triton.md."""
    mamba2 = [*MAMBA2[: -len(MIXTURE) - 2], *MLP]
    assert [len(layer) for layer in (GQA, [*MLA, *MLP], GDN, mamba2)] == [12, 17, 12, 12]
