"""Whether a combination may run: run it, measure the model first, or refuse it, and one sentence why."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from truekv.core.spec import Paged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Mapping, Sequence

    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import ModelSpec


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do with a combination. Only "run" may start; the reason is meant for the user as it is."""

    answer: Literal["run", "calibrate", "refuse"]
    reason: str


def judge(
    spec: ModelSpec,
    formats: Sequence[tuple[CacheFormat, ...] | None],
    measured: Collection[tuple[int, str]] = (),
    *,
    model: str,
    unfit: Mapping[tuple[int, str, str], str] | None = None,
) -> Verdict:
    """Judge the formats chosen for every layer of a model; no tensor is read.

    `formats` holds one tuple per layer of the spec, None (or nothing) for a layer without rows.
    `measured` names each (layer, field) that has a measured frame. `unfit` says of (layer, field,
    format name) why calibration found that the format cannot hold those rows. `model` is what the
    user called the model.
    """
    lacking: list[tuple[int, str, str]] = []
    used: dict[str, None] = {}
    for index, field, chosen in _stored(spec, formats):
        used[chosen.name] = None
        reason = (unfit or {}).get((index, field, chosen.name))
        if reason is not None:
            return Verdict("refuse", f"layer {index} cannot store its {field} rows in {chosen.name}: {reason}")
        if chosen.calibrated and (index, field) not in measured:
            lacking.append((index, field, chosen.name))
    if lacking:
        return Verdict("calibrate", _calibrate_first(spec, lacking, model))
    names = " and ".join(used) or "no rows at all"
    return Verdict("run", f"every layer has what it needs to store {names}")


def _stored(
    spec: ModelSpec, formats: Sequence[tuple[CacheFormat, ...] | None]
) -> Iterator[tuple[int, str, CacheFormat]]:
    """Yield (layer, field name, format) of everything that is stored."""
    for index, (layer, chosen) in enumerate(zip(spec.layers, formats, strict=True)):
        if isinstance(layer, Paged):
            for field, one in zip(layer.fields, chosen or (), strict=True):
                yield index, field.name, one


def _calibrate_first(spec: ModelSpec, lacking: Sequence[tuple[int, str, str]], model: str) -> str:
    names = " and ".join(dict.fromkeys(name for _, _, name in lacking))
    index, field, _ = lacking[0]
    others = f" (and {len(lacking) - 1} more)" if len(lacking) > 1 else ""
    # The failure this ends: scales taken from one dummy pass, in which recurrent layers emit garbage.
    how = (
        " on real prompts, with the recurrent state opened as in serving and never in a warm-up pass,"
        if spec.hybrid
        else " on real prompts"
    )
    return (
        f"{names} needs frames measured{how} but layer {index} has none for its {field} rows{others}: "
        f"run 'truekv calibrate {model}' first, or use --kv-cache-dtype int8, which needs none"
    )
