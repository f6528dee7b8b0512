"""Which format every field of every layer is stored in: a name, a K/V pair, a per-layer map.

    --kv-cache-dtype   auto | NAME | K/V            MLA layers: auto | NAME | LATENT/ROPE
    --kv-cache-map     3=bf16,7-11=int8/kv4         layer indices of the checkpoint, ends included

Names come from the files of this folder: `FORMATS` are codecs, `ALIASES` other names of codecs, `PAIRS`
names of one codec for keys and one for values. Layers of the multi-token-prediction head follow the
model's own: draft layer i has index len(layers) + i, as in released checkpoints.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Final, Literal, cast

from truekv.core.errors import Refused
from truekv.core.folder import choose, members
from truekv.core.spec import Paged
from truekv.formats.rotation import check_rotation

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import Field, ModelSpec

Chosen = tuple["CacheFormat", ...] | None
"""The formats of one layer, in the order of its fields; None for a layer without rows."""

_COMPANION: Final = "int8"
_COMPUTE: Final = {"float32": "f32", "bfloat16": "bf16"}
_ENTRY: Final = re.compile(r"(?P<first>\d{1,6})(?:-(?P<last>\d{1,6}))?=(?P<name>\S+)")


def choose_formats(
    spec: ModelSpec,
    kv_cache_dtype: str,
    kv_cache_map: str,
    dtype: Literal["float32", "bfloat16"],
    *,
    draft: bool = False,
) -> tuple[Chosen, ...]:
    """Return the formats of every layer of `spec.layers`, or of `spec.draft_layers` if `draft`.

    `dtype` is the compute dtype, which `auto` falls back to. Raises Refused on an unknown name, a map
    that names layers without rows or one layer twice, and a format that a field cannot be stored in.
    """
    everything = (*spec.layers, *spec.draft_layers)
    exceptions = _read_map(kv_cache_map, [isinstance(layer, Paged) for layer in everything])
    default = spec.kv_format or _COMPUTE[dtype]
    # The general name is checked even if the map leaves no layer to it.
    for name in kv_cache_dtype.split("/"):
        choose("KV cache format", name, dict.fromkeys(names()))
    first = len(spec.layers) if draft else 0
    chosen: list[Chosen] = []
    for index, layer in enumerate(everything[first:] if draft else spec.layers, first):
        if not isinstance(layer, Paged):
            chosen.append(None)
            continue
        asked = exceptions.get(index, kv_cache_dtype)
        chosen.append(_layer_formats(index, layer.fields, asked, default))
    return tuple(chosen)


def codecs() -> dict[str, CacheFormat]:
    """Every codec of the folder by name."""
    files = cast("dict[str, tuple[CacheFormat, ...]]", members("truekv.formats", "FORMATS"))
    return {codec.name: codec for file in files.values() for codec in file}


def pairs() -> dict[str, tuple[str, str]]:
    """Every name that means one codec for keys and one for values."""
    files = cast("dict[str, dict[str, tuple[str, str]]]", members("truekv.formats", "PAIRS"))
    return {name: pair for file in files.values() for name, pair in file.items()}


def aliases() -> dict[str, str]:
    """Every other name of a codec."""
    files = cast("dict[str, dict[str, str]]", members("truekv.formats", "ALIASES"))
    return {name: codec for file in files.values() for name, codec in file.items()}


def names() -> tuple[str, ...]:
    """Every single name that --kv-cache-dtype accepts."""
    return ("auto", *codecs(), *aliases(), *pairs())


def _layer_formats(index: int, fields: tuple[Field, ...], asked: str, default: str) -> tuple[CacheFormat, ...]:
    parts = [default if part == "auto" else part for part in asked.split("/")]
    if default in parts and not set(default.split("/")) <= set(names()):
        raise Refused(
            f"the checkpoint declares the KV cache format '{default}', which truekv does not have: name another"
        )
    if len(parts) == 1 and "/" in parts[0]:  # a checkpoint may declare a pair
        parts = parts[0].split("/")
    if len(parts) == 1:
        formats = _from_one_name(index, fields, parts[0])
    elif len(parts) == len(fields):
        formats = tuple(_codec(part, asked) for part in parts)
    else:
        order = "/".join(field.name.upper() for field in fields)
        raise Refused(f"'{asked}' names {len(parts)} formats, but layer {index} stores {order}: give one for each")
    for field, chosen in zip(fields, formats, strict=True):
        if chosen.code_bits < field.floor_bits:
            better = "/".join(
                (_companion(one) if one.code_bits < item.floor_bits else one).name
                for item, one in zip(fields, formats, strict=True)
            )
            raise Refused(
                f"layer {index}: '{chosen.name}' gives the {field.name} {chosen.code_bits} bits, but below "
                f"{field.floor_bits} bits its error reaches every score: use '{better}'"
            )
        _check_layout(index, field, chosen)
    return formats


def _from_one_name(index: int, fields: tuple[Field, ...], name: str) -> tuple[CacheFormat, ...]:
    first, second = pairs().get(name, (name, name))
    if first == second:
        codec = _codec(first, name)
        # A low-bit latent brings an 8-bit format for the rotary key, which needs it.
        return tuple(codec if codec.code_bits >= field.floor_bits else _companion(codec) for field in fields)
    if any(field.role == "both" for field in fields):
        raise Refused(
            f"'{name}' names a key and a value format, but layer {index} stores one latent for both and a "
            f"rotary key: use LATENT/ROPE, for example '{second}/{_companion(_codec(second, name)).name}'"
        )
    return _codec(first, name), _codec(second, name)


def _codec(name: str, asked: str) -> CacheFormat:
    if name in pairs():
        raise Refused(
            f"'{asked}': '{name}' already names a key and a value format; "
            f"write '{'/'.join(pairs()[name])}' and change the half you mean"
        )
    known = codecs() | {other: codecs()[codec] for other, codec in aliases().items()}
    if name in known:
        return known[name]
    return choose("KV cache format", name, known | dict.fromkeys(("auto", *pairs()), known[_COMPANION]))


def _companion(codec: CacheFormat) -> CacheFormat:
    """Return the 8-bit format from the same file, rotated or not like the codec; int8 if it has none."""
    files = cast("dict[str, tuple[CacheFormat, ...]]", members("truekv.formats", "FORMATS"))
    family = next(file for file in files.values() if codec in file)
    same = (one for one in family if one.code_bits == 8 and one.rotated == codec.rotated)
    return next(same, codecs()[_COMPANION])


def _check_layout(index: int, field: Field, chosen: CacheFormat) -> None:
    try:
        chosen.planes(field.dim)
        if chosen.rotated:
            check_rotation(field.dim)
    except Refused as error:
        raise Refused(f"layer {index}, {field.name}: {error}") from error


def _read_map(text: str, paged: list[bool]) -> dict[int, str]:
    """Return {layer index: asked}, every index checked against the layers that have rows."""
    found: dict[int, str] = {}
    for entry in text.split(",") if text.strip() else ():
        match = _ENTRY.fullmatch(entry.strip())
        if match is None:
            raise Refused(f"--kv-cache-map: '{entry.strip()}' is not LAYER=FORMAT or FIRST-LAST=FORMAT")
        first = int(match["first"])
        last = int(match["last"] or first)
        if last < first:
            raise Refused(f"--kv-cache-map: the range {first}-{last} ends before it begins")
        for index in range(first, last + 1):
            if index >= len(paged) or not paged[index]:
                raise Refused(
                    f"--kv-cache-map: layer {index} {'does not exist' if index >= len(paged) else 'stores no rows'}; "
                    f"the layers with a KV cache are {_ranges(paged)}"
                )
            if index in found:
                raise Refused(
                    f"--kv-cache-map: layer {index} is given twice, as '{found[index]}' and '{match['name']}'"
                )
            found[index] = match["name"]
    return found


def _ranges(paged: list[bool]) -> str:
    """Write the indices of true entries as '3, 7-11'."""
    text = "".join("x" if one else "-" for one in paged)
    runs = [match.span() for match in re.finditer("x+", text)]
    return ", ".join(str(start) if end - start == 1 else f"{start}-{end - 1}" for start, end in runs) or "none"
