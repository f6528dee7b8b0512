"""Whether a combination may run: run it, measure the model first, or refuse it, and one sentence why."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from truekv.core.spec import Paged

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator, Sequence

    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import ModelSpec
    from truekv.formats.frame import Frame


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
    draft_formats: Sequence[tuple[CacheFormat, ...] | None] = (),
) -> Verdict:
    """Judge the formats chosen for every layer of a model.

    `formats` holds one tuple per layer of the spec, None (or nothing) for a layer without rows, and
    `draft_formats` likewise for the layers of the prediction head, or nothing where it does not run.
    `measured` names each (layer, field) that has a measured frame; given the frames themselves, a
    calibrated format is refused on one whose scale nobody measured. `model` is what the user called
    the model.
    """
    frames: Mapping[tuple[int, str], Frame] = {}
    if isinstance(measured, Mapping):
        frames = cast("Mapping[tuple[int, str], Frame]", measured)
    lacking: list[tuple[int, str, str]] = []
    used: dict[str, None] = {}
    for index, field, chosen in _stored(spec, formats, draft_formats):
        used[chosen.name] = None
        if not chosen.calibrated:
            continue
        if (index, field) not in measured:
            lacking.append((index, field, chosen.name))
        elif (index, field) in frames and _by_default(frames[index, field]):
            return Verdict(
                "refuse",
                f"the frame of layer {index} field {field} has the default scale of 1 and not a measured one, which "
                f"{chosen.name} needs: measure it again with 'truekv calibrate {model}'",
            )
    if lacking:
        return Verdict("calibrate", _calibrate_first(spec, lacking, model))
    names = " and ".join(used) or "no rows at all"
    return Verdict("run", f"every layer has what it needs to store {names}")


def _by_default(frame: Frame) -> bool:
    """Whether a head's scale is missing, or exactly 1 in every channel: no measurement gives that."""
    return frame.scale is None or bool((frame.scale == 1).all(-1).any())


def _stored(
    spec: ModelSpec,
    formats: Sequence[tuple[CacheFormat, ...] | None],
    draft_formats: Sequence[tuple[CacheFormat, ...] | None],
) -> Iterator[tuple[int, str, CacheFormat]]:
    """Yield (layer, field name, format) of everything that is stored."""
    layers = list(zip(spec.layers, formats, strict=True))
    if draft_formats:
        layers += zip(spec.draft_layers, draft_formats, strict=True)
    for index, (layer, chosen) in enumerate(layers):
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
