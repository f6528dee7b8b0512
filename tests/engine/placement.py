"""Runs models on a device that is not there: nothing is computed, but every operation sees where its tensors lie.

torch's fake tensors have a shape, a type and a device, and two devices in one operation are refused as a GPU would
refuse them. Of Triton's launches the arguments are looked at. Whatever the host reads is zero. It changes torch for
good, so it runs in a process of its own: `python placement.py DIRECTORY ...`, and says what happened in JSON.
"""

from __future__ import annotations

import contextlib
import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import triton.runtime.interpreter
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils import backend_registration

from truekv.core.batch import Chunk
from truekv.core.recording import recording
from truekv.core.sampling import Reading
from truekv.engine import capture
from truekv.engine.capture import StepGraphs
from truekv.engine.run import Runner
from truekv.engine.sample import ALL
from truekv.engine.speculate.mtp import Predictor, Row
from truekv.formats.choice import choose_formats
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import plan
from truekv.models.stored import LOADABLE, StoredTensors
from truekv.models.weights import Checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

DRAFTS, SEQUENCES, BEST = 3, 4, 7
launched: Counter[str] = Counter()


class Twice:
    """A recording as a GPU makes one: the function is run, and looked on at."""

    host_reads: tuple[str, ...] = ()

    def __init__(self, function: Callable[[], torch.Tensor]) -> None:
        with torch.no_grad(), recording():
            function()
            self.output = function()

    def replay(self) -> torch.Tensor:
        return self.output


def launch(kernel: Any, *arguments: object, **_: object) -> None:
    """In the place of a launch."""
    launched[kernel.fn.__name__] += 1
    wrong = [item.device for item in arguments if isinstance(item, torch.Tensor) and item.device.type == "cpu"]
    assert not wrong, f"{kernel.fn.__name__} is given tensors on {wrong}"


def zeros(shape: tuple[int, ...]) -> Any:
    return [zeros(shape[1:]) for _ in range(shape[0])] if shape else 0


@contextlib.contextmanager
def no_inference_mode(mode: bool = True) -> Iterator[None]:  # noqa: ARG001
    """Inference mode goes past what fake tensors look at."""
    with torch.no_grad():
        yield


def fake() -> torch.device:
    """Change torch; return the device."""
    backend_registration._setup_privateuseone_for_python_backend("npy")
    plain: Any = torch.tensor

    def tensor(data: object, *, device: Any = None, **options: Any) -> torch.Tensor:
        made = plain(data, **options)
        if isinstance(made, FakeTensor):
            # Of one number torch knows the value, and would compute with it.
            made.constant = None
        return made if device is None else made.to(device)

    torch.tensor = tensor  # type: ignore[assignment]
    torch.frombuffer = lambda data, dtype: torch.zeros(memoryview(data).nbytes // dtype.itemsize, dtype=dtype)  # type: ignore[assignment]
    torch.inference_mode = no_inference_mode  # type: ignore[assignment, misc]
    for name in ("item", "__int__", "__index__", "__float__"):
        setattr(FakeTensor, name, lambda _: 0)
    FakeTensor.__bool__ = lambda _: True  # type: ignore[method-assign]
    FakeTensor.tolist = lambda self: zeros(tuple(self.shape))  # type: ignore[method-assign]
    triton.runtime.interpreter.InterpretedFunction.run = launch
    capture.recorder = lambda _: Twice  # type: ignore[assignment]
    StoredTensors._read = lambda _, header: torch.zeros(  # type: ignore[method-assign]
        tuple(header.shape), dtype=getattr(torch, LOADABLE[header.dtype])
    )
    return torch.device("npy", 0)


def serve(directory: Path, kv: str, dtype: Any, device: torch.device, *, misplaced: bool) -> dict[str, Any]:
    """Run a prompt, single tokens, drafts and a step that wants nothing, with a prediction head where there is one."""
    checkpoint = Checkpoint.open(str(directory))
    heads = bool(checkpoint.architecture.spec.draft_layers)
    checkpoint = checkpoint.with_draft_head() if heads else checkpoint
    spec = checkpoint.architecture.spec
    formats = choose_formats(spec, kv, "", dtype)
    draft_formats = choose_formats(spec, kv, "", dtype, draft=True) if heads else ()
    kernels = select(spec, formats, draft_formats, backend="triton", device=device)
    sizes = {"max_model_len": 200, "max_num_seqs": SEQUENCES + 1, "drafts": DRAFTS}
    planned = plan(spec, formats, **sizes, dtype=dtype, draft_formats=draft_formats or None)  # type: ignore[arg-type]
    model = checkpoint.load(dtype, kernels.ops, device)
    if misplaced:
        model.rotary.frequencies_P = model.rotary.frequencies_P.cpu()  # type: ignore[attr-defined]
    arena = Arena(spec, planned, kernels, check_finite=False, device=device)
    graphs = StepGraphs(lambda step: model.forward(step, arena.layers), arena)
    runner = Runner(model, arena, graphs)
    predictor = Predictor(model, arena, lambda run: StepGraphs(run, arena, graphs)) if heads else None
    held = [arena.open() for _ in range(SEQUENCES)]
    shapes: list[list[tuple[int, ...]]] = []
    for count, drafts, wanted in ((40, 0, 1), (3, 0, 0), (1, 0, 1), (1 + DRAFTS, DRAFTS, 1 + DRAFTS)):
        chunks = [Chunk(sequence, [1] * count, drafts, DRAFTS) for sequence in held]
        drawn = Reading(ALL, 0.8, points=(0.5,) * wanted)
        ran = runner.run(chunks, [wanted] * SEQUENCES, [Reading(ALL), Reading(0), Reading(BEST), drawn])
        rows = [part for part in ran.rows if isinstance(part, torch.Tensor)]
        assert ran.hidden.device == device
        assert [len(tokens) for tokens in ran.drawn] == [0, 0, 0, wanted]
        assert all(part.device.type == "cpu" for part in rows)
        assert all(part is None or part.device.type == "cpu" for part in ran.places)
        shapes.append([tuple(part.shape) for part in rows])
        if predictor:
            places = [range(start * count, start * count + count - drafts) for start in range(SEQUENCES)]
            following = [1] * (count - drafts)
            told = [Row(one, one.position, following, own, DRAFTS) for one, own in zip(held, places, strict=True)]
            assert predictor.propose(told, ran.hidden) == [[0] * DRAFTS] * SEQUENCES
        for sequence in held:
            arena.advance(sequence, count - drafts)
    return {"logits": shapes, "replays": graphs.replays, "eager": graphs.eager, "drafted": heads}


def main() -> None:
    device, misplaced = fake(), "misplaced" in sys.argv
    found: dict[str, Any] = {}
    with FakeTensorMode():
        for directory in map(Path, [given for given in sys.argv[1:] if given != "misplaced"]):
            for kv, dtype in (("int8", "float32"), ("kv4", "bfloat16")):
                found[f"{directory.name} {kv}"] = serve(directory, kv, dtype, device, misplaced=misplaced)
    sys.stdout.write(json.dumps({"served": found, "launched": launched}))


if __name__ == "__main__":
    main()
