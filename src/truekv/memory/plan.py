"""How many bytes each layer gets. Plain sums: no layer's page has to match another's.

Layers share page indices and slot indices, never sizes, so a plan for any mixture of layers and
formats is one sum per page and one per slot, and memory is divided by those two numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, cast

from truekv.core.errors import DoesNotFit, Refused
from truekv.core.folder import members
from truekv.core.spec import Paged, Recurrent, Stateless
from truekv.memory.pages import page_bytes, row_bytes
from truekv.memory.states import log_bytes, state_bytes

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import LayerSpec, ModelSpec

PAGE_TOKENS = 32
Formats = tuple["CacheFormat", ...]
Chosen = tuple["CacheFormat", ...] | None
"""The formats of one layer's fields; nothing for a layer without rows."""


@dataclass(frozen=True, slots=True)
class LayerPlan:
    """One layer's share. Bytes are exact: the arena allocates these numbers."""

    index: int
    kind: Literal["paged", "recurrent", "stateless"]
    fields: tuple[tuple[str, CacheFormat, int], ...]
    """(name, format, bytes per token) of each field of a paged layer."""
    bytes_per_token: int
    page_bytes: int
    state_bytes: int
    """Of one sequence: the state, and a count of the tokens in it."""
    log_bytes: int
    """Of one sequence: what the drafts of one step need."""

    @property
    def formats(self) -> Formats:
        """The formats alone, one per field."""
        return tuple(chosen for _name, chosen, _size in self.fields)


@dataclass(frozen=True, slots=True)
class MemoryPlan:
    """Pages and slots, shared by index and separate by bytes."""

    layers: tuple[LayerPlan, ...]
    draft_layers: tuple[LayerPlan, ...]
    page_tokens: int
    pages: int
    slots: int
    drafts: int
    dtype: Literal["float32", "bfloat16"]
    longest: int
    """The context limit that was asked for, or the model's, in tokens."""
    checkpoints: int = 0
    """Saved states of the prefix cache, each without a log."""
    step_bytes: int = 0
    """Of the device, kept for what steps compute: rows and states leave them free."""

    @property
    def page_bytes(self) -> int:
        """Bytes of one page index: that page in every layer."""
        return sum(layer.page_bytes for layer in (*self.layers, *self.draft_layers))

    @property
    def state_bytes_per_sequence(self) -> int:
        """Bytes of one slot index: the states and logs of every layer."""
        return sum(layer.state_bytes + layer.log_bytes for layer in (*self.layers, *self.draft_layers))

    @property
    def checkpoint_bytes(self) -> int:
        """Bytes of one saved state: the states of every layer, without logs."""
        return sum(layer.state_bytes for layer in (*self.layers, *self.draft_layers))

    @property
    def total_bytes(self) -> int:
        """Everything that will be allocated for rows and states."""
        states = self.slots * self.state_bytes_per_sequence + self.checkpoints * self.checkpoint_bytes
        return self.pages * self.page_bytes + states

    @property
    def max_tokens(self) -> int:
        """Tokens that all sequences together can hold."""
        return self.pages * self.page_tokens

    @property
    def max_context_one_sequence(self) -> int:
        """Tokens that one sequence alone can hold."""
        return min(self.longest, self.max_tokens)

    def pages_for(self, tokens: int) -> int:
        """Pages that hold so many tokens of one sequence."""
        return -(-tokens // self.page_tokens)

    def bytes_for_prompt(self, tokens: int) -> int:
        """Bytes that one sequence of so many tokens really holds."""
        return self.pages_for(tokens) * self.page_bytes + self.state_bytes_per_sequence


def plan(
    spec: ModelSpec,
    formats: Seq[Chosen],
    *,
    memory: int | None = None,
    max_model_len: int | None = None,
    max_num_seqs: int = 1,
    drafts: int = 0,
    dtype: Literal["float32", "bfloat16"] = "float32",
    draft_formats: Seq[Chosen] | None = None,
    checkpoints: int | None = 0,
    scratch: int = 0,
    reserved: int = 0,
    steps: int = 0,
) -> MemoryPlan:
    """Divide memory among layers, without allocating any.

    `formats` holds one tuple per layer, with one format per field of a paged layer and none
    otherwise; `draft_formats` likewise for `spec.draft_layers`, None to leave those out. `memory` in
    bytes is for rows and states only; without it the plan takes what `max_num_seqs` sequences of
    `max_model_len` tokens need. `drafts` is the capacity of the log. `checkpoints` saves so
    many recurrent states for the prefix cache; None takes two per sequence and eight more, of a given
    `memory` at most one eighth unless that is less than one per sequence, and never what a sequence
    needs to run. `scratch` sequences of one page each come on top. Raises DoesNotFit when one sequence of
    `max_model_len` tokens, or one page per sequence, has no room; its sentence then asks for memory on top of the
    `reserved` bytes (weights) of the device and of those kept for `steps`.
    """
    if max_model_len is not None and not 1 <= max_model_len <= spec.max_positions:
        limit = f"this checkpoint has positions for 1 to {spec.max_positions} tokens"
        raise Refused(f"max_model_len is {max_model_len}, but {limit}")
    if max_num_seqs < 1 or min(drafts, checkpoints or 0) < 0:
        counts = f"{max_num_seqs}, {drafts} and {checkpoints}"
        raise Refused(f"a plan needs at least 1 sequence, 0 drafts and 0 checkpoints, not {counts}")
    longest = max_model_len or spec.max_positions
    layers = _layer_plans(spec.layers, formats, dtype, drafts)
    draft_layers = _layer_plans(spec.draft_layers, draft_formats, dtype, drafts) if draft_formats is not None else ()
    draft = MemoryPlan(layers, draft_layers, PAGE_TOKENS, 0, max_num_seqs, drafts, dtype, longest, step_bytes=steps)
    aside = scratch * (draft.page_bytes + draft.state_bytes_per_sequence)
    room = None if memory is None else memory - aside
    saved = _checkpoints(draft, room, max_model_len or 1) if checkpoints is None else checkpoints
    kept = saved * draft.checkpoint_bytes
    pages = max_num_seqs * draft.pages_for(longest)
    # Layers without rows leave nothing to divide: their pages are numbers that cost no bytes.
    if room is not None and draft.page_bytes:
        pages = (room - max_num_seqs * draft.state_bytes_per_sequence - kept) // draft.page_bytes
    result = replace(draft, pages=pages, checkpoints=saved)
    if room is not None:
        used = reserved + steps + aside + kept
        _check_fits(result, room - kept, max_model_len or 1, spec, draft_formats is not None, used)
    return replace(result, pages=pages + scratch, slots=max_num_seqs + scratch)


def readable(count: int) -> str:
    """Bytes as people say them: 20480 is '20.0 KiB'."""
    size = float(count)
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{count} bytes" if unit == "bytes" else f"{size:.1f} {unit}"
        size /= 1024
    return f"{size:.1f} TiB"


def enough(count: int) -> str:
    """Bytes as people say them, rounded up: whoever gives that much gives at least `count`."""
    power = min(4, max(0, count.bit_length() - 1) // 10)
    unit = 1024**power
    return readable(-(-10 * count // unit) * unit // 10 if power else count)


def _layer_plans(layers: Seq[LayerSpec], formats: Seq[Chosen], dtype: str, drafts: int) -> tuple[LayerPlan, ...]:
    if len(layers) != len(formats):
        raise Refused(f"{len(formats)} format choices were given for {len(layers)} layers; give one per layer")
    return tuple(
        _layer_plan(index, layer, tuple(chosen or ()), dtype, drafts)
        for index, (layer, chosen) in enumerate(zip(layers, formats, strict=True))
    )


def _layer_plan(index: int, layer: LayerSpec, formats: Formats, dtype: str, drafts: int) -> LayerPlan:
    names = tuple(field.name for field in layer.fields) if isinstance(layer, Paged) else ()
    if len(formats) != len(names):
        raise Refused(
            f"layer {index} has the fields ({', '.join(names)}), but {len(formats)} formats were given for it"
        )
    match layer:
        case Paged(fields=fields):
            for field, chosen in zip(fields, formats, strict=True):
                if chosen.code_bits < field.floor_bits:
                    raise Refused(
                        f"layer {index}: '{field.name}' must keep at least {field.floor_bits} bits, but {chosen.name} "
                        f"has {chosen.code_bits}; use int8 or bf16 for it"
                    )
            pairs = tuple(zip(fields, formats, strict=True))
            planned = tuple((field.name, chosen, row_bytes(field, chosen)) for field, chosen in pairs)
            per_token = sum(size for _name, _chosen, size in planned)
            return LayerPlan(index, "paged", planned, per_token, page_bytes(layer, formats, PAGE_TOKENS), 0, 0)
        case Recurrent():
            return LayerPlan(index, "recurrent", (), 0, 0, state_bytes(layer, dtype), log_bytes(layer, dtype, drafts))
        case Stateless():
            return LayerPlan(index, "stateless", (), 0, 0, 0, 0)


def _checkpoints(draft: MemoryPlan, memory: int | None, tokens: int) -> int:
    """How many saved states are worth their bytes."""
    size = draft.checkpoint_bytes
    wanted = 2 * draft.slots + 8 if size else 0
    if memory is None or not size:
        return wanted
    room = memory - _needed(draft.slots, tokens, draft.page_bytes, draft.state_bytes_per_sequence)
    return min(wanted, max(0, room) // size, max(draft.slots, memory // 8 // size))


def _needed(slots: int, tokens: int, page: int, state: int) -> int:
    """Least bytes that give every slot a page and one sequence its tokens."""
    return slots * state + max(slots, -(-tokens // PAGE_TOKENS)) * page


def _check_fits(result: MemoryPlan, memory: int, tokens: int, spec: ModelSpec, drafted: bool, reserved: int) -> None:  # noqa: FBT001
    page, state, slots = result.page_bytes, result.state_bytes_per_sequence, result.slots
    need = _needed(slots, tokens, page, state)
    if need <= memory:
        return
    remedies: list[str] = []
    shorter = max(0, memory - slots * state) // page * PAGE_TOKENS if page else 0
    if tokens > PAGE_TOKENS and shorter >= slots * PAGE_TOKENS:
        remedies.append(f"lower max_model_len to {shorter}")
    fewer = next((count for count in _halvings(slots) if _needed(count, tokens, page, state) <= memory), 0)
    if fewer:
        remedies.append(f"lower max_num_seqs to {fewer}")
    logs = sum(layer.log_bytes for layer in (*result.layers, *result.draft_layers))
    if logs and _needed(slots, tokens, page, state - logs) <= memory:
        remedies.append("lower num_speculative_tokens")
    smaller = _smaller_format(result, memory - slots * state, max(slots, result.pages_for(tokens)), spec, drafted)
    if smaller is not None:
        remedies.append(f"use kv_cache_dtype {smaller}")
    remedies.append(f"give {enough(need + reserved)} of memory")
    raise DoesNotFit(
        f"{slots} sequence{'s' * (slots > 1)} with {readable(state)} of state each and one context of {tokens} tokens "
        f"need {readable(need)}, but {readable(max(0, memory))} is left for rows and states"
        f"{f' beside {readable(result.step_bytes)} for steps' * bool(result.step_bytes)}: {', or '.join(remedies)}"
    )


def _halvings(slots: int) -> list[int]:
    """Smaller counts to propose: every one when there are few, else halving."""
    if slots <= 64:
        return list(range(slots - 1, 0, -1))
    return [slots >> shift for shift in range(1, slots.bit_length())]


def _smaller_format(result: MemoryPlan, room: int, pages: int, spec: ModelSpec, drafted: bool) -> str | None:  # noqa: FBT001
    """Name the format with most bits, of those that need no calibration, with which the rows fit."""
    specs = (*spec.layers, *(spec.draft_layers if drafted else ()))
    planned = (*result.layers, *result.draft_layers)
    offered = cast("dict[str, tuple[CacheFormat, ...]]", members("truekv.formats", "FORMATS"))
    fitting: list[tuple[int, str]] = []
    for candidate in (item for group in offered.values() for item in group if not item.calibrated):
        size = 0
        try:
            for layer, current in zip(specs, planned, strict=True):
                if isinstance(layer, Paged):
                    formats = tuple(
                        candidate if candidate.code_bits >= field.floor_bits else kept
                        for field, kept in zip(layer.fields, current.formats, strict=True)
                    )
                    size += page_bytes(layer, formats, PAGE_TOKENS)
        except Refused:
            # This codec has no rows of such a dim, so it is no remedy.
            continue
        if size < result.page_bytes and size * pages <= room:
            fitting.append((candidate.code_bits, candidate.name))
    # Of equals, the recommended one.
    return max(fitting, key=lambda item: (item[0], item[1] == "int8"))[1] if fitting else None
