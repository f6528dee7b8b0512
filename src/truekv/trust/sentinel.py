"""The sentinel: looks on while the engine runs, and says when numbers are not what they were promised to be.

Three guards. It changes no answer and stops no request; the engine itself ends one whose numbers are not finite.

    finite        a request whose logits, rows or states were NaN or infinite
    rows          what a layer stored against what it was given: range, declared bound, relative error
    repetition    an answer that goes round in circles, replayed unquantized: is it the cache, or the model?
"""

# Shape suffixes: T tokens, S sampled tokens, K kv heads, D dim.

from __future__ import annotations

import functools
import logging
import math
from collections import Counter, deque
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, get_args

from truekv.core.lazy import torch
from truekv.kernels.reference.paged import planes
from truekv.memory.pages import PagedLayer
from truekv.trust.measure import distortion
from truekv.trust.repetition import Repetition
from truekv.trust.shadow import Shadow

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from truekv.core.batch import Step
    from truekv.core.errors import Corrupted
    from truekv.core.protocols import CacheFormat, Model, Stored
    from truekv.memory.arena import Arena

Guard = Literal["finite", "saturation", "bound", "error", "repetition"]

EVERY: Final = 128
"""Steps between two looks at stored rows, one layer each; before that, every layer once in the first steps."""
ROWS: Final = 32
"""Most tokens of a step that are looked at."""
SATURATION: Final = 1e-3
"""Share of a field's numbers that may lie beyond the range of its format."""
ERROR: Final = 2.0
"""How often a format's relative error on Gaussian rows a field's may be."""
KL: Final = 0.2
"""Mean divergence, in nats, from which the cache is to blame. On the embedded models int8, fp8_e4m3 and kv4 stay below
0.14 and plain 4-bit blocks lie above 0.3; 3-bit formats and fp8_e5m2 fall on either side."""
SHADOW_SHARE: Final = 100
"""Tokens that the engine computes for each one replayed, after the first replay."""
KEPT: Final = 64
"""Findings that are kept, the last ones."""
# Two backends may round a row on its way into the frame differently: by this share of its largest number.
_SLACK: Final = 2.0**-18
_LOG: Final = logging.getLogger("truekv")
_LEVELS: Final = {"info": logging.INFO, "warning": logging.WARNING, "error": logging.ERROR}


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that a guard noticed."""

    guard: Guard
    level: Literal["info", "warning", "error"]
    """info: the guard looked and the cache is not to blame."""
    sentence: str
    """What, where, and what to use instead."""
    requests: tuple[int, ...]
    """Identities of the requests concerned."""
    layer: str | None = None
    field: str | None = None
    value: float | None = None
    limit: float | None = None


@dataclass(frozen=True, slots=True)
class Measured:
    """What storing did to a field's rows in one step, in the space of its frame."""

    error: float
    """Root mean square of the error over that of the rows, of the worst head."""
    excess: float
    """Largest error of a number over the format's bound for it; more than 1 breaks the promise."""
    saturated: float
    """Share of the numbers beyond the largest one that the format can hold."""
    broken: tuple[int, ...]
    """Tokens of the step with a number beyond its bound."""


def measure(stored: Stored, rows_TKD: torch.Tensor, step: Step, picks_S: torch.Tensor) -> Measured:
    """Compare the rows of some tokens of a step, as they were given, with what lies in memory."""
    framed_SKD = stored.frame.rows(rows_TKD[picks_S])
    page, line = step.page[picks_S], step.line[picks_S]
    data = torch.cat([plane[page, :, line] for plane in planes(stored)], -1)
    off_SKD = (stored.format.decode(data, stored.field.dim) - framed_SKD).abs()
    # A scale that became NaN in memory is the largest error of all, not one that compares as small.
    off_SKD = torch.where(torch.isfinite(off_SKD), off_SKD, math.inf)
    size_SKD = framed_SKD.abs()
    allowed_SKD = stored.format.bound(framed_SKD) + size_SKD.amax(-1, keepdim=True) * _SLACK
    excess_SKD = torch.where(off_SKD > 0, off_SKD / allowed_SKD, 0.0)
    power_K = size_SKD.square().sum((0, 2))
    error_K = torch.where(off_SKD > 0, off_SKD.square(), 0.0).sum((0, 2)) / power_K.clamp(min=1e-30)
    broken = picks_S[(excess_SKD > 1).flatten(1).any(1)]
    top = ceiling(stored.format, stored.field.dim)
    return Measured(
        error=math.sqrt(float(error_K.max())),
        excess=float(excess_SKD.max()),
        saturated=float((size_SKD > top).float().mean()),
        broken=tuple(int(token) for token in broken),
    )


@functools.lru_cache(maxsize=256)
def ceiling(chosen: CacheFormat, dim: int) -> float:
    """Return the largest number that a format can hold: 448 for fp8_e4m3, and where row scales end for the others."""
    highest = torch.full((1, dim), torch.finfo(torch.float32).max)
    return float(chosen.decode(chosen.encode(highest), dim).abs().max())


@functools.lru_cache(maxsize=256)
def error_limit(chosen: CacheFormat, dim: int) -> float:
    """Return the largest relative error that is not suspicious, from what the codec does to Gaussian rows."""
    return ERROR * math.sqrt(distortion(chosen, dim, rows=512).nmse) + _SLACK


class Sentinel:
    """The guards of one engine; implements core.protocols.Observer."""

    def __init__(self, model: Model, arena: Arena, every: int = EVERY) -> None:
        """Watch an engine's memory. Allocates nothing; Refused where the model cannot run unquantized."""
        self._every = every
        self._layers = [
            (index, layer)
            for index, layer in enumerate((*arena.layers, *arena.draft_layers))
            if isinstance(layer, PagedLayer)
        ]
        self._trunk = len(arena.layers)
        self._shadow = Shadow(model, arena)
        self._armed: PagedLayer | None = None
        self._requests: tuple[int, ...] = ()
        self._steps = 0
        # Tokens computed since the last replay; the first one is free.
        self._credit = SHADOW_SHARE * 2 * self._shadow.window
        self._repetitions: dict[int, Repetition] = {}
        self._known: set[int] = set()
        self._counts: Counter[str] = Counter()
        self._measured: dict[tuple[int, str], Measured] = {}
        self._logged: set[tuple[str, str | None]] = set()
        self.findings: deque[Finding] = deque(maxlen=KEPT)
        """The last of them."""

    def before_step(self, requests: Sequence[int], tokens: int) -> None:
        """See core.protocols.Observer."""
        self._disarm()
        self._credit += tokens
        step = self._steps
        self._steps += 1
        if not self._layers or (step >= len(self._layers) and step % self._every):
            return
        index, layer = self._layers[self._counts["looks"] % len(self._layers)]
        self._counts["looks"] += 1
        self._requests = tuple(requests)
        self._armed = layer
        layer.probe = functools.partial(self._look, index, layer.name)

    def after_tokens(self, request: int, tokens: Sequence[int], prompt: int) -> None:
        """See core.protocols.Observer."""
        if request in self._known:
            return
        repetition = self._repetitions.get(request)
        if repetition is None:
            repetition = self._repetitions[request] = Repetition()
        if repetition.look(tokens, prompt):
            self._known.add(request)
            self._counts["repetitions"] += 1
            self._replay(request, tokens)

    def fault(self, request: int, error: Corrupted) -> None:
        """See core.protocols.Observer."""
        self._note(Finding("finite", "error", f"request {request} was ended: {error}", (request,), error.layer))

    def end(self, request: int) -> None:
        """See core.protocols.Observer."""
        self._repetitions.pop(request, None)
        self._known.discard(request)

    def report(self) -> dict[str, Any]:
        """Return counters, the last measurement of every field, and the last findings, as JSON can hold them."""
        return {
            "steps": self._steps,
            "looks": self._counts["looks"],
            "repetitions": self._counts["repetitions"],
            "replays": self._counts["replays"],
            "replay_bytes": self._shadow.nbytes,
            "findings_total": {guard: self._counts[guard] for guard in get_args(Guard)},
            "fields": [
                {
                    "layer": index,
                    "field": field,
                    "error": _number(found.error),
                    "excess": _number(found.excess),
                    "saturated": found.saturated,
                }
                for (index, field), found in sorted(self._measured.items())
            ],
            "findings": [
                asdict(finding) | {"value": _number(finding.value), "limit": _number(finding.limit)}
                for finding in self.findings
            ],
        }

    def _disarm(self) -> None:
        if self._armed is not None:
            self._armed.probe = None
            self._armed = None

    def _look(
        self, index: int, layer: str, stored: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step
    ) -> None:
        """Measure every field of a layer, once, in the step under way."""
        self._disarm()
        # Padding is stored nowhere.
        real_T = (step.line >= 0).nonzero()[:, 0]
        if not len(real_T):
            return
        picks_S = real_T[:: -(-len(real_T) // ROWS)]
        for item, values_TKD in zip(stored, rows, strict=True):
            found = measure(item, values_TKD, step, picks_S)
            self._measured[index, item.field.name] = found
            for finding in self._judge(index, layer, item, found, self._owners(index, found, step)):
                self._note(finding)

    def _owners(self, index: int, found: Measured, step: Step) -> tuple[int, ...]:
        """Return the requests whose rows are beyond their bound."""
        if index >= self._trunk:
            # A pass of the draft head may hold fewer requests than the step it belongs to.
            return self._requests
        places = {int(step.owner[token]) for token in found.broken}
        return tuple(request for place, request in enumerate(self._requests) if place in places)

    def _judge(
        self, index: int, layer: str, item: Stored, found: Measured, broken: tuple[int, ...]
    ) -> Iterator[Finding]:
        """Yield what is wrong with a field's rows; `broken`: the requests with rows beyond their bound."""
        name, where = item.format.name, f"{layer}: '{item.field.name}'"
        everyone = self._requests
        place = layer, item.field.name
        if found.saturated > SATURATION:
            top = ceiling(item.format, item.field.dim)
            yield Finding(
                "saturation",
                "warning",
                f"{where} has {found.saturated:.1%} of its numbers beyond {top:g}, where {name} ends, and they were "
                f"clipped: measure its scale again with 'truekv calibrate', or use --kv-cache-map {index}=int8",
                everyone,
                *place,
                found.saturated,
                SATURATION,
            )
        if found.broken:
            yield Finding(
                "bound",
                "error",
                f"{where} holds rows {found.excess:.3g} times as far from what was given as {name} can be, in "
                f"requests {', '.join(map(str, broken))}: suspect the kernel or the memory, and use --kernel-backend "
                "reference",
                broken,
                *place,
                found.excess,
                1.0,
            )
        limit = error_limit(item.format, item.field.dim)
        # Clipped and broken rows have a large error too, but another cure.
        if found.error > limit and not found.broken and found.saturated <= SATURATION:
            # As many digits as tell the one from the other.
            digits = next((one for one in range(2, 9) if f"{found.error:.{one}g}" != f"{limit:.{one}g}"), 9)
            again = "measure its frame again with 'truekv calibrate', or " if item.frame.scale is not None else ""
            yield Finding(
                "error",
                "warning",
                f"{where} comes back from {name} with a relative error of {found.error:.{digits}g}, more than the "
                f"{limit:.{digits}g} that its codes are good for: {again}use --kv-cache-map {index}=bf16",
                everyone,
                *place,
                found.error,
                limit,
            )

    def _replay(self, request: int, tokens: Sequence[int]) -> None:
        """Find out whether a request that repeats itself would do so without its cache."""
        cost = SHADOW_SHARE * 2 * min(len(tokens), self._shadow.window)
        if self._credit < cost:
            return
        self._credit = 0
        self._counts["replays"] += 1
        found = self._shadow.compare(tokens)
        measured = f"the KL over its last {min(len(tokens), self._shadow.window)} tokens is {found.mean:.2g} nats"
        name = self._shadow.formats
        if found.mean > KL:
            sentence = (
                f"request {request} repeats itself, and storing rows as {name} changes what the model says: {measured} "
                f"({found.largest:.2g} at most), more than {KL:g}; use --kv-cache-dtype bf16, or keep the layers with "
                "the largest errors in bf16 with --kv-cache-map"
            )
        else:
            sentence = f"request {request} repeats itself, as it would unquantized: {measured}, so the model does it"
        level = "warning" if found.mean > KL else "info"
        self._note(Finding("repetition", level, sentence, (request,), None, None, found.mean, KL))

    def _note(self, finding: Finding) -> None:
        self._counts[finding.guard] += 1
        self.findings.append(finding)
        if (finding.guard, finding.layer) not in self._logged:
            self._logged.add((finding.guard, finding.layer))
            _LOG.log(_LEVELS[finding.level], "%s", finding.sentence)


def _number(value: float | None) -> float | None:
    """Return what JSON can hold: it has no infinity."""
    return value if value is None or math.isfinite(value) else None
