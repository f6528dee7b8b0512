"""Calibration: run real prompts through real memory, watch what would be stored, and fit frames to it.

What is watched is what serving stores: rows after the rotary embedding, in prefill and in decode, of
sequences that the arena opened. Nothing is measured in a warm-up: a pass over dummy tokens, or through
recurrent state that nobody opened, measures garbage and freezes it.

Three disjoint sets of prompts are run. The scales of the first two must agree; the third one checks
what fp8 does to rows that took no part in choosing its scale.
"""

# Shape suffixes: T tokens, H kv heads, Q query heads, D dim.

from __future__ import annotations

import random
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.formats.fit import fit, static_scale
from truekv.formats.frame import Frames, Provenance, model_digest
from truekv.trust.observe import BATCH, Check, Seen, Session

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from truekv.core.protocols import Model
    from truekv.core.spec import ModelSpec
    from truekv.formats.frame import Frame
    from truekv.trust.observe import Place, Sink

MIN_PROMPTS: Final = 24
MIN_TOKENS: Final = 1024
"""Rows of each field in each of the two sets that frames are fitted on."""
MIN_DISTINCT: Final = 8
"""Different tokens in every prompt; dummy prompts repeat one."""
AGREEMENT: Final = 2.0
"""Largest ratio between the scales of two disjoint sets; frames leave fp8 as much headroom."""
MAX_SUBNORMAL: Final = 0.01
METHOD: Final = "centre and balanced scale of rows from real prompts: prefill and greedy decode through opened state"


@dataclass(frozen=True, slots=True)
class Source:
    """What was seen of one field of one layer."""

    layer: int
    field: str
    rows: int
    """Rows of each head that the frame was fitted on."""
    amax: tuple[float, float]
    """Largest magnitude in each of the two sets."""
    agreement: float
    """Largest ratio between the two sets' scales of one head, at least 1."""
    rms: float
    """Root mean square of the rows, not centred."""
    static: tuple[float, float]
    """Smallest and largest fp8_e4m3 scale of a head that other engines would need: 2 * amax / 448."""
    scale: tuple[float, float]
    """Smallest and largest number of the frame's scale."""
    subnormal: float
    """Share of the held-out numbers that fp8_e4m3 stores below its normal range, in this frame."""


@dataclass(frozen=True, slots=True, eq=False)
class Calibration:
    """Frames of every paged layer, and where each comes from."""

    frames: Frames
    sources: tuple[Source, ...]


def calibrate(
    model: Model,
    prompts: Sequence[Sequence[int]],
    *,
    dtype: Literal["float32", "bfloat16"],
    source: str,
    weights: str = "",
    ends: frozenset[int] = frozenset(),
    decode: int = 32,
    seed: int = 0,
    device: torch.device | str = "cpu",
    progress: Callable[[int, int], None] | None = None,
) -> Calibration:
    """Measure a model on prompts of token ids, each ending where the model would answer.

    Every prompt is stored and then continued greedily for up to `decode` tokens, or to one of `ends`,
    through an unquantized float32 cache; watching changes nothing. `dtype`: what the model computes
    in, and `device` where it lies. `source` and `weights` (Checkpoint.digest) say in the frames'
    provenance what was measured.
    `progress` is told (prompts done, prompts in all). Raises Refused when there is too little to
    measure on, when the two halves disagree, or when a number is no usable scale; Corrupted when a
    row is not finite.
    """
    first, second, held_out = _divide(prompts, seed)
    session = Session(model, dtype, max(map(len, prompts)) + decode, ends, decode, device)
    done = 0

    def run(part: Sequence[Sequence[int]], sinks: Mapping[Place, Sink]) -> None:
        nonlocal done
        for start in range(0, len(part), BATCH):
            batch = part[start : start + BATCH]
            session.run(batch, sinks)
            done += len(batch)
            if progress is not None:
                progress(done, len(prompts))

    halves: list[dict[Place, Seen]] = []
    for part in (first, second):
        halves.append({place: Seen(item) for place, item in session.fields.items()})
        run(part, halves[-1])
    seen = {place: _joined(place, halves[0][place], halves[1][place]) for place in session.fields}
    frames = {place: _fitted(place, rows) for place, rows in seen.items()}
    checks = {place: Check(frame) for place, frame in frames.items()}
    run(held_out, checks)
    sources = tuple(
        _source(place, frames[place], (halves[0][place], halves[1][place]), seen[place], checks[place])
        for place in frames
    )
    provenance = _provenance(model.spec, sources, source, weights, len(prompts), session.decoded)
    return Calibration(Frames(frames, provenance), sources)


def _divide(prompts: Sequence[Sequence[int]], seed: int) -> tuple[list[list[int]], list[list[int]], list[list[int]]]:
    """Split prompts into two sets of about as many tokens, and one held out; refuse what is no real set."""
    distinct = sorted({tuple(prompt) for prompt in prompts})
    if len(distinct) < MIN_PROMPTS:
        raise Refused(
            f"calibration needs at least {MIN_PROMPTS} different prompts, and got {len(distinct)}: give more, as they "
            "come in real use"
        )
    for prompt in distinct:
        if len(set(prompt)) < MIN_DISTINCT:
            raise Refused(
                f"a calibration prompt of {len(prompt)} tokens has only {len(set(prompt))} different ones: dummy "
                "tokens measure garbage; give real prompts, rendered by the chat template"
            )
    shuffled = [list(prompt) for prompt in distinct]
    random.Random(seed).shuffle(shuffled)  # noqa: S311 (a reproducible split, not a secret)
    rest = len(shuffled) // 6
    halves: tuple[list[list[int]], list[list[int]]] = ([], [])
    for prompt in sorted(shuffled[rest:], key=len, reverse=True):
        min(halves, key=lambda half: sum(map(len, half))).append(prompt)
    return *halves, shuffled[:rest]


def _joined(place: Place, first: Seen, second: Seen) -> Seen:
    """Merge what two halves have seen, once each has seen enough and both agree."""
    item = first.item
    layer, name = place
    fewest = min(first.rows.count, second.rows.count)
    if fewest < MIN_TOKENS:
        raise Refused(
            f"half of the prompts put only {fewest} rows into layer {layer}, but a scale needs {MIN_TOKENS}: give more "
            "or longer prompts"
        )
    ratio, head = _agreement(first, second)
    if ratio > AGREEMENT:
        raise Refused(
            f"two halves of the prompts disagree by {ratio:.1f}x on the scale of layer {layer} field {name} head "
            f"{head}, more than {AGREEMENT:g}x: give more prompts, of the kinds that are used"
        )
    both = Seen(item)
    both.take_in(first)
    both.take_in(second)
    return both


def _agreement(first: Seen, second: Seen) -> tuple[float, int]:
    """Return the largest ratio, at least 1, between two scales of one head, and the head.

    Compared are the static scales (of the largest numbers) and the geometric means of the frames' scales.
    """
    frames = [_frame(half).scale for half in (first, second)]
    fitted = [scale.double().log().mean(-1) for scale in frames if scale is not None]
    static = [static_scale(half.rows).log() for half in (first, second)]
    apart_H = torch.maximum((fitted[0] - fitted[1]).abs(), (static[0] - static[1]).abs()).exp()
    return float(apart_H.max()), int(apart_H.argmax())


def _frame(seen: Seen) -> Frame:
    return fit(seen.item.role, seen.rows, seen.queries)


def _fitted(place: Place, seen: Seen) -> Frame:
    """Fit the frame, and refuse numbers that no measurement gives."""
    layer, name = place
    still_H = (seen.rows.amax == 0) | (seen.rows.spread.amax(-1) == 0)
    if bool(still_H.any()):
        raise Refused(
            f"layer {layer} field {name} head {int(still_H.int().argmax())} never changed over {seen.rows.count} rows: "
            "there is no scale to measure; check the weights"
        )
    frame = _frame(seen)
    for what, values in (("centre", frame.centre), ("scale", frame.scale)):
        if values is None or not bool(torch.isfinite(values).all()):
            raise Corrupted(f"the {what} measured for layer {layer} field {name} is not finite: check the weights")
    scale = frame.scale
    # A scale that is 1 throughout is what nobody measured: other engines' default for a missing one.
    if scale is None or not bool((scale > 0).all()) or bool((scale == 1).all(-1).any()):
        raise Corrupted(f"the scale measured for layer {layer} field {name} is not positive, or is the default of 1")
    return frame


def _source(place: Place, frame: Frame, halves: tuple[Seen, Seen], seen: Seen, check: Check) -> Source:
    """Describe where a frame comes from, and refuse one that its held-out rows do not fit."""
    layer, name = place
    if check.clipped:
        raise Refused(
            f"{check.clipped} of {check.numbers} held-out numbers of layer {layer} field {name} lie beyond the range "
            "that was measured: give more prompts, of the kinds that are used"
        )
    subnormal = check.subnormal / max(1, check.numbers)
    if subnormal >= MAX_SUBNORMAL:
        raise Refused(
            f"{subnormal:.1%} of the held-out numbers of layer {layer} field {name} fall below fp8's normal range: a "
            "few prompts reach much further than the rest; give more prompts, of the kinds that are used"
        )
    scale = frame.scale
    assert scale is not None
    static_H = static_scale(seen.rows)
    return Source(
        layer=layer,
        field=name,
        rows=seen.rows.count,
        amax=(float(halves[0].rows.amax.max()), float(halves[1].rows.amax.max())),
        agreement=_agreement(*halves)[0],
        rms=float(seen.rows.second_moment.mean().sqrt()),
        static=(float(static_H.min()), float(static_H.max())),
        scale=(float(scale.min()), float(scale.max())),
        subnormal=subnormal,
    )


def _provenance(
    spec: ModelSpec, sources: Sequence[Source], source: str, weights: str, prompts: int, decoded: int
) -> Provenance:
    layers = {f"layers.{item.layer}.{item.field}": _described(item) for item in sources}
    return Provenance(
        model=model_digest(spec),
        source=source,
        method=f"{METHOD}; {decoded} of the tokens were decoded",
        prompts=prompts,
        tokens=min(item.rows for item in sources),
        layers=layers,
        weights=weights,
    )


def _described(item: Source) -> dict[str, Any]:
    described = asdict(item)
    del described["layer"], described["field"]
    return described
