"""Assembly: the only place where a checkpoint, formats, memory, kernels and the engine are put together."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import truekv
from truekv.core.device import choose_device
from truekv.core.errors import Refused
from truekv.core.folder import choose
from truekv.core.lazy import torch
from truekv.core.options import SEQUENCES, STEP_TOKENS
from truekv.core.resident import release
from truekv.kernels.table import CUDA, NATIVE, TRITON

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.core.batch import Step
    from truekv.core.options import EngineOptions
    from truekv.core.protocols import CacheFormat, Model
    from truekv.core.spec import ModelSpec
    from truekv.engine.activations import Parts
    from truekv.engine.capture import StepGraphs
    from truekv.engine.generate import Engine
    from truekv.engine.run import Runner
    from truekv.engine.speculate.drafting import Drafter
    from truekv.engine.speculate.mtp import Guess
    from truekv.engine.tokens import Tokenizer
    from truekv.formats.frame import Frame
    from truekv.kernels.table import Kernels
    from truekv.memory.arena import Arena
    from truekv.memory.plan import MemoryPlan
    from truekv.models.weights import Checkpoint
    from truekv.serve.messages import ChatTemplate

EMBEDDED: Final = ("tiny-hybrid", "tiny-mla", "tiny-dense")
"""Models that come with the package; their names work wherever a model is named."""
# In a folder of its own: other engines load every safetensors file that lies beside config.json.
FRAMES_FILE: Final = "truekv/kv_cache_frames.safetensors"
DEVICE_SHARE: Final = 0.9
"""Of a CUDA device's free memory, for weights, steps, rows and states.

The rest is for the code of kernels, the libraries' workspaces, and what torch's allocator rounds and cannot join."""

Measured = Mapping[tuple[int, str], "Frame"]
Formats = tuple["tuple[CacheFormat, ...] | None", ...]


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Everything decided about a run before a weight is read."""

    checkpoint: Checkpoint
    options: EngineOptions
    dtype: str
    formats: Formats
    frames: Measured
    kernels: Kernels
    plan: MemoryPlan
    tokenizer: Tokenizer | None
    template: ChatTemplate | None
    device: torch.device
    sequences: int
    """At once in memory."""
    step_tokens: int
    """Most of a step."""
    parts: Parts | None
    """What attention on a GPU may leave to be merged, which the plan has room for."""


def locate(model: str) -> str:
    """Turn the name of an embedded model into its directory; any other name stays as it is."""
    if not model.startswith("tiny-") or Path(model).exists():
        return model
    choose("embedded model", model, dict.fromkeys(EMBEDDED))
    return str(Path(truekv.__file__).parent / "tiny" / model.removeprefix("tiny-"))


def design(model: str, options: EngineOptions) -> Blueprint:
    """Decide everything and refuse whatever cannot run. Reads JSON and headers; allocates nothing."""
    from truekv.engine.tokens import Tokenizer
    from truekv.formats.choice import choose_formats
    from truekv.kernels.table import select
    from truekv.memory.plan import plan
    from truekv.models.weights import Checkpoint
    from truekv.serve.messages import ChatTemplate

    checkpoint = Checkpoint.open(locate(model))
    predicts = options.speculative_config is not None and options.speculative_config.method == "mtp"
    if predicts:
        checkpoint = checkpoint.with_draft_head()
    spec = checkpoint.architecture.spec
    dtype = checkpoint.compute_dtype(options.dtype)
    asked = options.kv_cache_dtype, options.kv_cache_map, dtype
    formats = choose_formats(spec, *asked)
    draft_formats = choose_formats(spec, *asked, draft=True) if predicts else None
    names, draft_names = ([chosen or () for chosen in group] for group in (formats, draft_formats or ()))
    device = choose_device(options.device)
    kernels = select(spec, names, draft_names, backend=options.kernel_backend, device=device)
    divided = functools.partial(
        plan,
        spec,
        formats,
        draft_formats=draft_formats,
        max_model_len=options.max_model_len,
        drafts=options.drafts,
        dtype=dtype,
        checkpoints=None if options.enable_prefix_caching else 0,
        # A captured step's padding is a sequence of its own.
        scratch=int(captures(options, kernels, device)),
    )
    step_tokens = options.max_num_batched_tokens or STEP_TOKENS[device.type]
    sequences, planned, parts = _divide(checkpoint, options, dtype, divided, step_tokens, device)
    options = replace(options, max_num_seqs=sequences, max_num_batched_tokens=step_tokens)
    _fits_guesses(options, planned)
    measured = _measured(checkpoint, options.kv_cache_frames, model)
    _permit(spec, formats, draft_formats or (), measured, model)
    tokenizer = Tokenizer.open(checkpoint.directory)
    template = ChatTemplate.open(checkpoint.directory)
    checkpoint.check()
    return Blueprint(
        *(checkpoint, options, dtype, formats, measured, kernels, planned, tokenizer, template, device),
        *(sequences, step_tokens, parts),
    )


def _divide(
    checkpoint: Checkpoint,
    options: EngineOptions,
    dtype: str,
    divided: Callable[..., MemoryPlan],
    step_tokens: int,
    device: torch.device,
) -> tuple[int, MemoryPlan, Parts | None]:
    """Choose how many sequences, where that is not asked for, and divide the memory; `divided` is the plan of either.

    Of a GPU rows and states get what weights and steps leave. What is asked for as memory is for them alone.
    """
    from truekv.engine.activations import activations

    sequences = options.max_num_seqs or SEQUENCES[device.type]
    if device.type != "cuda":
        return sequences, divided(memory=options.memory, max_num_seqs=sequences), None
    weights = checkpoint.bytes_in(dtype)
    free = int(torch.cuda.mem_get_info(device)[0] * DEVICE_SHARE) - weights
    while True:
        planned = divided(max_num_seqs=sequences)
        # A plan with a scratch is one that is captured.
        steps = activations(checkpoint.architecture, planned, step_tokens, captured=planned.slots > sequences)
        taken = steps.nbytes if options.memory is None else 0
        room = (free if options.memory is None else options.memory) - taken
        states = planned.slots * planned.state_bytes_per_sequence
        if options.max_num_seqs or sequences == 1 or 3 * (states + taken) <= room + taken:
            break
        sequences //= 2
    divided = functools.partial(divided, max_num_seqs=sequences, steps=steps.nbytes)
    fits = options.memory is None and planned.total_bytes <= room
    return sequences, divided() if fits else divided(memory=max(0, room), reserved=weights), steps.parts


def build(blueprint: Blueprint) -> Engine:
    """Load the weights, allocate the memory that was planned, and start the engine."""
    from truekv.engine.generate import Engine
    from truekv.engine.run import Runner
    from truekv.engine.schedule import Schedule
    from truekv.engine.tokens import end_tokens
    from truekv.memory.arena import Arena
    from truekv.trust.sentinel import Sentinel

    options, plan, checkpoint = blueprint.options, blueprint.plan, blueprint.checkpoint
    model = checkpoint.load(blueprint.dtype, blueprint.kernels.ops, blueprint.device)
    captured = captures(options, blueprint.kernels, blueprint.device)
    arena = Arena(
        model.spec,
        plan,
        blueprint.kernels,
        blueprint.frames,
        poison=options.debug_poison,
        # What is replayed cannot stop half-way; the runner looks at the numbers that come out.
        check_finite=not captured,
        prefix_interval=options.prefix_checkpoint_interval if options.enable_prefix_caching else None,
        device=blueprint.device,
    )
    # Captured steps come first: what their padding holds is nobody's any more.
    graphs = _captured(model, arena) if captured else None
    runner = Runner(model, arena, graphs)
    drafter = _drafter(blueprint, runner, graphs)
    schedule = Schedule(
        pages=arena.available_pages,
        page_tokens=plan.page_tokens,
        sequences=blueprint.sequences,
        step_tokens=blueprint.step_tokens,
        draft_room=drafter.room if drafter else 0,
        drafts=plan.drafts,
        parts=blueprint.parts,
    )
    engine = Engine(
        runner,
        schedule,
        blueprint.tokenizer,
        ends=end_tokens(checkpoint.directory, blueprint.tokenizer),
        max_model_len=min(plan.longest, arena.available_pages * plan.page_tokens),
        drafting=drafter,
        observer=Sentinel(model, arena) if options.sentinel else None,
    )
    release()
    return engine


def captures(options: EngineOptions, kernels: Kernels, device: torch.device) -> bool:
    """Whether small steps are recorded and replayed: docs/decisions/capture.md says where that pays."""
    if options.capture == "on" and kernels.backend == TRITON and device.type == "cpu":
        raise Refused("kernels in Triton's interpreter cannot be captured; turn capture off, or use a CUDA device")
    fast = {TRITON, CUDA} if device.type == "cuda" else {NATIVE}
    return options.capture == "on" or (options.capture == "auto" and kernels.backend in fast)


def warms(device: torch.device) -> bool:
    """Whether steps are recorded before they are needed: on a GPU a new size compiles kernels and is run twice.

    On a CPU a recording costs little more than the step that it is made of.
    """
    return device.type == "cuda"


def _captured(model: Model, arena: Arena) -> StepGraphs:
    from truekv.engine.capture import WARMED_PAGES, StepGraphs

    def forward(step: Step) -> torch.Tensor:
        return model.forward(step, arena.layers)

    graphs = StepGraphs(forward, arena)
    if warms(arena.device):
        _warm("capturing steps", functools.partial(graphs.warm, WARMED_PAGES))
    return graphs


def _warm(title: str, record: Callable[..., None]) -> None:
    from truekv.serve.progress import Bar

    with Bar(title) as bar:
        record(progress=bar.update)


def _drafter(blueprint: Blueprint, runner: Runner, graphs: StepGraphs | None) -> Drafter | None:
    from truekv.engine.capture import StepGraphs
    from truekv.engine.speculate.adapt import draft_cost
    from truekv.engine.speculate.drafting import Drafter
    from truekv.engine.speculate.mtp import Predictor

    speculation, model, arena = blueprint.options.speculative_config, runner.model, runner.arena
    if speculation is None:
        return None
    predictor = rehearse = None
    if speculation.method == "mtp":

        def replayed(run: Guess) -> Guess:
            return StepGraphs(run, arena, graphs) if graphs else run

        dtype = getattr(torch, blueprint.dtype)
        predictor = Predictor(model, arena, replayed)
        rehearse = functools.partial(predictor.rehearse, dtype=dtype)
        if graphs and warms(arena.device):
            _warm("capturing guesses", functools.partial(predictor.warm, speculation.num_speculative_tokens, dtype))

    def run(step: Step) -> torch.Tensor:
        with torch.inference_mode():
            return model.logits(runner.forward(step))

    most = speculation.num_speculative_tokens
    cost = draft_cost(run, rehearse, most, arena.device) if speculation.adaptive else 0.0
    return Drafter(speculation, predictor, cost)


def _measured(checkpoint: Checkpoint, asked: str | None, model: str) -> Measured:
    """Read the frames that were measured on the model: the file asked for, else the one beside the weights."""
    path = Path(asked) if asked else checkpoint.directory / FRAMES_FILE
    if not path.is_file():
        if asked:
            raise Refused(f"kv_cache_frames names {path}, which is not a file; make it with 'truekv calibrate {model}'")
        return {}
    from truekv.formats.frame import load_frames

    frames = load_frames(path, checkpoint.architecture.spec)
    if frames.provenance.weights not in {"", checkpoint.digest}:
        raise Refused(
            f"{path} was measured on {frames.provenance.source}, whose weights are not those of {model}; "
            f"measure these with 'truekv calibrate {model}'"
        )
    return frames


def _fits_guesses(options: EngineOptions, planned: MemoryPlan) -> None:
    """Refuse more guesses than the context holds."""
    if options.drafts >= planned.max_context_one_sequence:
        raise Refused(
            f"num_speculative_tokens is {options.drafts}, but the context holds {planned.max_context_one_sequence} "
            "tokens; guess fewer, or raise max_model_len or the memory"
        )


def _permit(spec: ModelSpec, formats: Formats, draft_formats: Formats, measured: Measured, model: str) -> None:
    """Refuse what the verdict does not let run."""
    from truekv.trust.verdict import judge

    verdict = judge(spec, formats, measured, model=model, draft_formats=draft_formats)
    if verdict.answer != "run":
        raise Refused(verdict.reason)


def effective(blueprint: Blueprint) -> dict[str, Any]:
    """Return what memory really stores, as the JSON of `truekv plan`, with the frames and kernels in use."""
    from truekv.serve.plan import describe

    return {
        **describe(blueprint.plan),
        "measured": sorted(f"{index}.{name}" for index, name in blueprint.frames),
        "kernels": dict(blueprint.kernels.describe()),
    }
