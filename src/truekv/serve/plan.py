"""`truekv plan`: what a model needs and what fits, from config.json and headers alone, without torch."""

from __future__ import annotations

import json
import re
import shlex
import sys
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, cast

from truekv.core.errors import DoesNotFit, Refused
from truekv.core.options import SEQUENCES, STEP_TOKENS, EngineOptions, Speculation
from truekv.core.spec import Recurrent
from truekv.engine.activations import activations
from truekv.formats.choice import choose_formats
from truekv.memory.plan import enough, plan, readable
from truekv.models.headers import read_header
from truekv.models.weights import Checkpoint
from truekv.serve.assemble import FRAMES_FILE, locate
from truekv.trust.verdict import judge

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.spec import ModelSpec
    from truekv.formats.choice import Chosen
    from truekv.memory.plan import LayerPlan, MemoryPlan

# Decimal units for those that name bytes alone; what ends in "i" or is a bare letter is binary.
_SIZE: Final = re.compile(r"(\d{1,18}(?:\.\d{1,9})?) ?(?:([kmgt])(ib?|b)?|b)?", re.IGNORECASE | re.ASCII)
_LARGEST: Final = 1 << 60
# One of each price, to show what another choice would buy.
_ALTERNATIVES: Final = ("bf16", "int8", "k8v4", "kv4")


def run(
    model: str,
    *,
    kv_cache_dtype: str,
    kv_cache_map: str,
    memory: str | None,
    max_model_len: int | None,
    max_num_seqs: int,
    num_speculative_tokens: int,
    weight_bytes: str | None,
    dtype: str,
    as_json: bool,
) -> int:
    """Print the plan, as tables or as one JSON object, and return 0.

    `memory` is the whole device's: weights are subtracted, the rest is for rows and states. Raises
    Refused for what cannot be planned, and DoesNotFit (exit code 1) when it can, but needs more.
    """
    options = EngineOptions(
        dtype=cast("Any", dtype),  # an unknown name is refused by the checkpoint
        kv_cache_dtype=kv_cache_dtype,
        kv_cache_map=kv_cache_map,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        speculative_config=Speculation(num_speculative_tokens=num_speculative_tokens)
        if num_speculative_tokens
        else None,
    )
    device = None if memory is None else parse_size(memory, "--memory")
    weights = None if weight_bytes is None else parse_size(weight_bytes, "--weight-bytes", smallest=0)
    request = Request(model, Checkpoint.open(locate(model), weights=False), options, device, weights)
    outcome = request.plan()
    if as_json:
        sys.stdout.write(json.dumps(outcome.as_json(), indent=1) + "\n")
    else:
        _show(outcome)
    return 0


def parse_size(text: str, option: str, *, smallest: int = 1) -> int:
    """Read "24GiB", "24g" (both 1024^3), "24GB" (1000^3) or plain bytes; fractions are rounded down."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise Refused(f"{option} is {text[:40]!a}, but must be a size such as 24GiB, 24GB or 25769803776")
    number, unit, suffix = match.groups()
    power = "kmgt".index(unit.lower()) + 1 if unit else 0
    base = 1000 if (suffix or "").lower() == "b" else 1024
    size = int(Decimal(number) * base**power)
    if not smallest <= size <= _LARGEST:
        raise Refused(f"{option} is {text[:40]!a}, but must be from {smallest} byte{'s'[smallest:]} to 1024 PiB")
    return size


@dataclass(frozen=True, slots=True)
class Request:
    """What was asked: `memory` and `weights` in bytes, None where the user leaves them to us."""

    model: str
    checkpoint: Checkpoint
    options: EngineOptions
    memory: int | None = None
    weights: int | None = None

    @property
    def weight_bytes(self) -> int:
        """Bytes of the weights in the compute dtype: as stored if that is the checkpoint's, else converted."""
        if self.weights is not None:
            return self.weights
        return self.checkpoint.bytes_in(self.checkpoint.compute_dtype(self.options.dtype))

    def _least(self, spec: ModelSpec, formats: Sequence[Chosen]) -> int:
        """Bytes of memory with which the weights and the contexts asked for fit."""
        wanted = self.options.max_model_len
        sized = self._divide(spec, formats, None)
        pages = max(sized.slots, sized.pages_for(wanted or 1))
        return self.weight_bytes + sized.slots * sized.state_bytes_per_sequence + pages * sized.page_bytes

    def plan(self) -> Outcome:
        """Choose formats and divide the memory. Raises Refused, or DoesNotFit."""
        spec = self.checkpoint.architecture.spec
        dtype = self.checkpoint.compute_dtype(self.options.dtype)
        formats = choose_formats(spec, self.options.kv_cache_dtype, self.options.kv_cache_map, dtype)
        left = None if self.memory is None else self.memory - self.weight_bytes
        if left is not None and left <= 0:
            raise DoesNotFit(
                f"the weights of {self.model} need {readable(self.weight_bytes)}, but there are only "
                f"{readable(self.memory or 0)} of memory: give at least {enough(self._least(spec, formats))}, or a "
                "smaller --weight-bytes if part of them lies elsewhere"
            )
        return Outcome(self, spec, formats, self._divide(spec, formats, left))

    def _divide(self, spec: ModelSpec, formats: Sequence[Chosen], memory: int | None) -> MemoryPlan:
        return plan(
            spec,
            formats,
            memory=memory,
            max_model_len=self.options.max_model_len,
            max_num_seqs=self.options.max_num_seqs or SEQUENCES["cpu"],
            drafts=self.options.drafts,
            dtype=self.checkpoint.compute_dtype(self.options.dtype),
            reserved=self.weight_bytes,
        )


@dataclass(frozen=True, slots=True)
class Outcome:
    """A plan that fits, and how to say so."""

    request: Request
    spec: ModelSpec
    formats: Sequence[Chosen]
    plan: MemoryPlan

    @property
    def verdict(self) -> str:
        """One sentence: what fits, or what it takes."""
        planned, weights = self.plan, readable(self.request.weight_bytes)
        sequences = f"{planned.slots} sequence{'s' * (planned.slots > 1)}"
        if self.request.memory is None:
            need = readable(planned.total_bytes + self.request.weight_bytes)
            return (
                f"takes {need}: {weights} of weights and {readable(planned.total_bytes)} of rows and states "
                f"for {sequences} of {planned.longest:,} tokens each"
            )
        room = f"{planned.max_tokens:,} tokens in all" if planned.page_bytes else "contexts of any length"
        return (
            f"fits in {readable(self.request.memory)}: beside {weights} of weights there is room for {sequences} at "
            f"once, {room}, one context of up to {planned.max_context_one_sequence:,} tokens"
        )

    @property
    def first(self) -> str | None:
        """What to do before this can run, None if nothing."""
        path = self.request.checkpoint.directory / FRAMES_FILE
        keys = [key.split(".") for key in read_header(path)] if path.exists() else []
        # Keys are layers.INDEX.FIELD.PART; what else is wrong with frames shows when they are loaded.
        measured = {(int(key[1]), key[2]) for key in keys if len(key) == 4 and key[1].isdecimal()}
        judged = judge(self.spec, self.formats, measured, model=self.request.model)
        return None if judged.answer == "run" else judged.reason

    @property
    def command(self) -> str:
        """The command that runs what was planned."""
        options = self.request.options
        words = ["truekv", "generate", self.request.model, "--kv-cache-dtype", options.kv_cache_dtype]
        if options.kv_cache_map:
            words += ["--kv-cache-map", options.kv_cache_map]
        if options.dtype != "auto":
            words += ["--dtype", options.dtype]
        return shlex.join([*words, "--max-model-len", str(self.plan.max_context_one_sequence)])

    @property
    def gpu_step_bytes(self) -> int:
        """What a GPU keeps for steps, of as many tokens as there by default, beside this plan."""
        # The padding of captured steps is a sequence of its own.
        captured = replace(self.plan, slots=self.plan.slots + 1)
        return activations(self.request.checkpoint.architecture, captured, STEP_TOKENS["cuda"], captured=True).nbytes

    def alternatives(self) -> list[dict[str, object]]:
        """List what other formats would cost, and hold in the same memory, leaving out those that do not fit."""
        found: list[dict[str, object]] = []
        for name in _ALTERNATIVES:
            options = replace(self.request.options, kv_cache_dtype=name, kv_cache_map="")
            try:
                other = replace(self.request, options=options).plan().plan
            except Refused:
                continue
            per_token = other.page_bytes // other.page_tokens
            found.append({"kv_cache_dtype": name, "bytes_per_token": per_token, "max_tokens": other.max_tokens})
        return found

    def as_json(self) -> dict[str, object]:
        """Return everything as JSON values; bytes are exact."""
        request, planned = self.request, self.plan
        return {
            "model": request.model,
            "family": self.spec.family,
            "dtype": planned.dtype,
            "kv_cache_dtype": request.options.kv_cache_dtype,
            **describe(planned),
            "memory": request.memory,
            "parameters": request.checkpoint.parameters,
            "weight_bytes": request.weight_bytes,
            "gpu_step_bytes": self.gpu_step_bytes,
            "alternatives": self.alternatives(),
            "before_running": self.first,
            "command": self.command,
            "verdict": self.verdict,
        }


def describe(planned: MemoryPlan) -> dict[str, object]:
    """Return the part of the JSON that is the memory plan itself, layer by layer."""
    return {
        "layers": [_layer(layer) for layer in planned.layers],
        "page_tokens": planned.page_tokens,
        "page_bytes": planned.page_bytes,
        "bytes_per_token": planned.page_bytes // planned.page_tokens,
        "state_bytes_per_sequence": planned.state_bytes_per_sequence,
        "pages": planned.pages,
        "max_num_seqs": planned.slots,
        "num_speculative_tokens": planned.drafts,
        "max_tokens": planned.max_tokens,
        "max_context_one_sequence": planned.max_context_one_sequence,
        "bytes_for_prompt_of_10_tokens": planned.bytes_for_prompt(10),
        "cache_bytes": planned.total_bytes,
        "step_bytes": planned.step_bytes,
    }


def _layer(layer: LayerPlan) -> dict[str, object]:
    entry: dict[str, object] = {"index": layer.index, "kind": layer.kind}
    entry["formats"] = {name: chosen.name for name, chosen, _size in layer.fields}
    match layer.kind:
        case "paged":
            return entry | {"bytes_per_token": layer.bytes_per_token}
        case "recurrent":
            return entry | {"state_bytes": layer.state_bytes + layer.log_bytes, "log_bytes": layer.log_bytes}
        case "stateless":
            return entry


def _show(outcome: Outcome) -> None:
    """Print tables for people; sentences and the command are never wrapped, so that they can be copied."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    spec, planned = outcome.spec, outcome.plan
    layers = Table(title=f"{outcome.request.model}: {spec.family}, computed in {planned.dtype}", title_justify="left")
    for heading in ("layers", "kind", "stored as", "bytes/token", "state/sequence"):
        layers.add_column(heading, justify="left" if heading in {"kind", "stored as"} else "right")
    for (kind, stored, per_token, state), count in _kinds(spec, planned.layers).items():
        layers.add_row(
            str(count), kind, stored, f"{per_token:,}" if per_token else "-", readable(state) if state else "-"
        )
    console.print(layers)
    totals = Table(show_header=False)
    for name, value in (
        ("weights", readable(outcome.request.weight_bytes)),
        ("rows", f"{planned.page_bytes // planned.page_tokens:,} bytes a token, {planned.page_tokens} tokens a page"),
        ("state", f"{readable(planned.state_bytes_per_sequence)} a sequence"),
        ("a prompt of 10 tokens", readable(planned.bytes_for_prompt(10))),
        ("pages", f"{planned.pages:,}: {planned.max_tokens:,} tokens"),
        ("longest context", f"{planned.max_context_one_sequence:,} tokens"),
    ):
        totals.add_row(name, value)
    steps = f"{readable(outcome.gpu_step_bytes)} on a GPU, for up to {STEP_TOKENS['cuda']:,} tokens each"
    totals.add_row("not counted: steps", steps)
    totals.add_row("nor", "the runtime itself")
    console.print(totals)
    others = Table("format", "bytes/token", "tokens in all", title="in the same memory", title_justify="left")
    for entry in outcome.alternatives():
        others.add_row(str(entry["kv_cache_dtype"]), f"{entry['bytes_per_token']:,}", f"{entry['max_tokens']:,}")
    if outcome.request.memory is not None:
        console.print(others)
    for line in (outcome.verdict, outcome.first, outcome.command):
        if line is not None:
            console.print(line, soft_wrap=True)


def _kinds(spec: ModelSpec, layers: Sequence[LayerPlan]) -> dict[tuple[str, str, int, int], int]:
    """Count the layers that are alike: (kind, formats, bytes per token, bytes per sequence)."""
    counts: dict[tuple[str, str, int, int], int] = {}
    for layer, planned in zip(spec.layers, layers, strict=True):
        match layer:
            case Recurrent(rule=rule):
                kind, stored = rule, ", ".join(f"{slab.name} {slab.dtype}" for slab in layer.state)
            case _:
                kind = " + ".join(name for name, _, _ in planned.fields) or "no memory"
                stored = ", ".join(f"{name} {chosen.name}" for name, chosen, _ in planned.fields)
        key = (kind, stored, planned.bytes_per_token, planned.state_bytes + planned.log_bytes)
        counts[key] = counts.get(key, 0) + 1
    return counts
