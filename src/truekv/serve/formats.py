"""`truekv formats`: every name that --kv-cache-dtype accepts, its bits, and the distortion measured just now."""

from __future__ import annotations

import functools
import json as jsonlib
import sys
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.spec import Field, ModelSpec, Paged
from truekv.formats.choice import choose_formats, codecs, names

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.protocols import CacheFormat

_ROWS: Final = 4096
_DEFAULT_DIM: Final = 128


@dataclass(frozen=True, slots=True)
class FieldRecord:
    """How one field of a layer is stored, and what that does to Gaussian rows."""

    field: str
    format: str
    bits: float
    """Per number, scales included."""
    nmse: float
    ratio: float
    """nmse over the rate-distortion bound 2^(-2 bits)."""


@dataclass(frozen=True, slots=True)
class Record:
    """One name and what it means, for a model or for rows of one length."""

    name: str
    fields: tuple[FieldRecord, ...]
    """Empty if the model cannot be stored so."""
    bytes_per_token: int | None
    """All layers together; None without a model."""
    calibrated: bool
    """Whether it only runs with frames measured on the model."""
    note: str


def run(model: str | None, *, as_json: bool) -> int:
    """Print the table, for a model if one is named; return the exit code."""
    spec = None
    if model is not None:
        from truekv.models.weights import Checkpoint
        from truekv.serve.assemble import locate

        spec = Checkpoint.open(locate(model), weights=False).architecture.spec
    show(rows(spec, _DEFAULT_DIM), json=as_json)
    return 0


def rows(spec: ModelSpec | None, dim: int) -> list[Record]:
    """Return a record per name, most bits first: for a model's layers, else for a key and a value of `dim`."""
    if spec is not None and not any(isinstance(layer, Paged) for layer in spec.layers):
        raise Refused(f"'{spec.family}' stores no rows: its layers only keep a state, which has no KV format")
    fields = (Field("k", 1, dim, "key"), Field("v", 1, dim, "value"))
    stand_in = ModelSpec("any", 1, 1, 1, "bfloat16", (Paged(fields),))
    asked = [name for name in names() if name != "auto"]
    records = [_record(name, spec or stand_in, count=spec is not None) for name in asked]
    return sorted(records, key=lambda record: -sum(field.bits for field in record.fields))


def show(records: Sequence[Record], *, json: bool) -> None:
    """Print records as a table for people or as one JSON object."""
    if json:
        sys.stdout.write(jsonlib.dumps({"formats": [asdict(record) for record in records]}, indent=1) + "\n")
        return
    from rich.console import Console
    from rich.table import Table

    first = next((record.fields for record in records if record.fields), ())
    table = Table(box=None, pad_edge=False, header_style="bold")
    counted = any(record.bytes_per_token is not None for record in records)
    titles = [f"bits {'/'.join(field.field for field in first)}", *["bytes/token"] * counted, "nMSE", "x bound"]
    table.add_column("format", no_wrap=True)
    for title in titles:
        table.add_column(title, justify="right", no_wrap=True)
    table.add_column("calibrated", no_wrap=True)
    table.add_column("note", min_width=30)
    for record in records:
        cells = [
            "/".join(f"{field.bits:g}" for field in _distinct(record)),
            *["" if record.bytes_per_token is None else f"{record.bytes_per_token:,}"] * counted,
            "/".join(f"{field.nmse:.1e}" for field in _distinct(record)),
            # Far from the bound the factor says nothing: floating-point formats are not made for it.
            "/".join(f"{field.ratio:.2f}" if field.ratio < 100 else ">100" for field in _distinct(record)),
            "yes" if record.calibrated else "no",
        ]
        table.add_row(record.name, *cells, record.note)
    # Piped, the table keeps its columns: nobody's terminal decides where they break.
    Console(width=None if sys.stdout.isatty() else 160).print(table)


def _record(name: str, spec: ModelSpec, *, count: bool) -> Record:
    try:
        chosen = choose_formats(spec, name, "", "bfloat16")
    except Refused as reason:
        return Record(name, (), None, calibrated=False, note=f"not for this model: {reason}")
    paged = [
        (layer.fields, formats)
        for layer, formats in zip(spec.layers, chosen, strict=True)
        if isinstance(layer, Paged) and formats is not None
    ]
    size = sum(
        field.heads * sum(codec.planes(field.dim))
        for fields, formats in paged
        for field, codec in zip(fields, formats, strict=True)
    )
    fields, formats = paged[0]
    measured = tuple(
        FieldRecord(field.name, codec.name, *_distortion(codec.name, field.dim))
        for field, codec in zip(fields, formats, strict=True)
    )
    needed = any(codec.calibrated for _, formats in paged for codec in formats)
    return Record(name, measured, size if count else None, calibrated=needed, note=_note(name, formats))


def _distinct(record: Record) -> tuple[FieldRecord, ...]:
    """Return one field if all are stored alike."""
    alike = len({(field.format, field.bits) for field in record.fields}) == 1
    return record.fields[:1] if alike else record.fields


def _note(name: str, formats: tuple[CacheFormat, ...]) -> str:
    """Say what a name stands for, if it is not the codec's own, and whether rows are rotated."""
    found = "/".join(dict.fromkeys(codec.name for codec in formats))
    rotated = " (rotated)" if any(codec.rotated for codec in formats) else ""
    return (f"= {found}" if found != name else "") + rotated


@functools.cache
def _distortion(name: str, dim: int) -> tuple[float, float, float]:
    from truekv.trust.measure import distortion

    found = distortion(codecs()[name], dim, _ROWS)
    return found.bits, found.nmse, found.ratio
