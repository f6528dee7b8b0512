"""A frame: everything that happens to a row once, outside of the loop that reads the cache.

A row x is stored as code(H((x - c) / s)), with a centre c and a scale s per kv head and channel, measured
once on the model, and the fixed rotation H. Reading costs nothing extra:

    scores   q' = H(s * q); the constant q . c is the same for every key and drops out of the softmax
    output   o = c + s * (H^T o'), because the attention weights sum to one

Measured frames travel in a safetensors file: float32 [heads, dim] tensors `layers.{i}.{field}.centre` and
`.scale`, and where they come from in its metadata. Layer i of the multi-token-prediction head has the
index len(layers) + i.
"""

# Shape suffixes: T tokens, H kv heads, Q query heads, D dim.

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.spec import Paged
from truekv.formats.rotation import parts, rotate, unrotate

if TYPE_CHECKING:
    from collections.abc import Iterator

    from truekv.core.protocols import CacheFormat
    from truekv.core.spec import Field, ModelSpec

VERSION: Final = 1
"""Of the file; it changes with the meaning of the numbers, the rotation included."""
_KEY: Final = re.compile(r"layers\.(?P<layer>\d{1,6})\.(?P<field>\w+)\.(?P<part>centre|scale)")


@dataclass(frozen=True, slots=True, eq=False)
class Frame:
    """Centre and scale, float32 [H, D] each or None, and whether rows are rotated."""

    centre: torch.Tensor | None = None
    scale: torch.Tensor | None = None
    rotated: bool = False

    @property
    def identity(self) -> bool:
        """Whether rows are stored as they are."""
        return self.centre is None and self.scale is None and not self.rotated

    def rows(self, x_THD: torch.Tensor) -> torch.Tensor:
        """Take rows [T, H, D] into the frame: what the codec encodes, float32."""
        rows = x_THD.float()
        if self.centre is not None:
            rows = rows - self.centre
        if self.scale is not None:
            rows = rows / self.scale
        return rotate(rows) if self.rotated else rows

    def query(self, q_TQD: torch.Tensor) -> torch.Tensor:
        """Take queries [T, Q, D] into the frame, Q a multiple of H: consecutive heads share a kv head."""
        query = q_TQD.float()
        if self.scale is not None:
            query = query * _grouped(self.scale, query.shape[-2])
        return rotate(query) if self.rotated else query

    def output(self, o_TQD: torch.Tensor) -> torch.Tensor:
        """Take averages [T, Q, D] of stored rows, by weights that sum to one, out of the frame."""
        output = o_TQD.float()
        if self.rotated:
            output = unrotate(output)
        if self.scale is not None:
            output = output * _grouped(self.scale, output.shape[-2])
        if self.centre is not None:
            output = output + _grouped(self.centre, output.shape[-2])
        return output

    def rotation(self, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the rotation of rows of `dim` numbers in parts; see core.protocols.RowFrame."""
        return parts(dim)

    def to(self, device: torch.device | str) -> Frame:
        """Return the frame on a device."""
        centre = None if self.centre is None else self.centre.to(device)
        scale = None if self.scale is None else self.scale.to(device)
        return Frame(centre, scale, self.rotated)


IDENTITY: Final = Frame()


@dataclass(frozen=True, slots=True)
class Provenance:
    """Where measured frames come from."""

    model: str
    """`model_digest` of the spec they were measured on."""
    source: str
    """The checkpoint, as the user named it."""
    method: str
    """How centre and scale were computed."""
    prompts: int
    tokens: int
    layers: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    """Per "layers.{i}.{field}": what was seen there (tokens, amax ...)."""
    weights: str = ""
    """Hash of the weights, if it was taken."""


@dataclass(frozen=True, slots=True, eq=False)
class Frames(Mapping[tuple[int, str], Frame]):
    """Measured frames by (layer, field name), none of them rotated: that is the format's to say."""

    measured: Mapping[tuple[int, str], Frame]
    provenance: Provenance

    def __getitem__(self, key: tuple[int, str]) -> Frame:
        """Return the frame of one field of one layer."""
        return self.measured[key]

    def __iter__(self) -> Iterator[tuple[int, str]]:
        """Iterate over (layer, field name)."""
        return iter(self.measured)

    def __len__(self) -> int:
        """Return how many fields were measured."""
        return len(self.measured)


def frame_for(codec: CacheFormat, measured: Frame | None) -> Frame:
    """Return the frame that a codec's rows are stored in, given what was measured on the model, if anything.

    Formats that neither rotate nor need a measurement (f32, bf16, llama.cpp's blocks) store rows as they are.
    """
    if not codec.rotated and not codec.calibrated:
        return IDENTITY
    return replace(measured or IDENTITY, rotated=codec.rotated)


def model_digest(spec: ModelSpec) -> str:
    """Hash what frames depend on: the family, and the fields of every paged layer."""
    paged = [
        [index, [[item.name, item.heads, item.dim, item.role] for item in fields]]
        for index, fields in _paged(spec).items()
    ]
    text = json.dumps([spec.family, spec.hidden_size, spec.vocab_size, paged])
    return hashlib.sha256(text.encode()).hexdigest()


def save_frames(path: Path | str, frames: Mapping[tuple[int, str], Frame], provenance: Provenance) -> None:
    """Write measured frames; the file appears whole or not at all."""
    from safetensors import torch as safetensors

    tensors: dict[str, torch.Tensor] = {}
    for (layer, name), frame in frames.items():
        for part, values in (("centre", frame.centre), ("scale", frame.scale)):
            if values is not None:
                tensors[f"layers.{layer}.{name}.{part}"] = values.detach().float().cpu().contiguous()
    unfinished = Path(f"{path}.{os.getpid()}.tmp")
    try:
        cast("Any", safetensors).save_file(
            tensors, unfinished, {"version": str(VERSION), "provenance": json.dumps(asdict(provenance))}
        )
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_frames(path: Path | str, spec: ModelSpec) -> Frames:
    """Read measured frames and check them against the model they are meant for.

    Raises Corrupted if the file cannot be read or holds numbers that are no frame, and Refused if it was
    made for another model or by another version.
    """
    tensors, metadata = _read(Path(path))
    provenance = _provenance(path, metadata)
    if provenance.model != model_digest(spec):
        raise Refused(
            f"{path} holds frames measured on another model ('{provenance.source}'), whose layers differ from this "
            f"one's: measure this model with 'truekv calibrate'"
        )
    fields = {(index, item.name): item for index, items in _paged(spec).items() for item in items}
    parts: dict[tuple[int, str], dict[str, torch.Tensor]] = {}
    for key, values in tensors.items():
        match = _KEY.fullmatch(key)
        place = (int(match["layer"]), match["field"]) if match else None
        if match is None or place is None or place not in fields:
            raise Corrupted(f"{path}: '{key}' is not the frame of any cache field of this model; measure it again")
        _check(path, key, values, fields[place], positive=match["part"] == "scale")
        parts.setdefault(place, {})[match["part"]] = values
    measured = {place: Frame(found.get("centre"), found.get("scale")) for place, found in parts.items()}
    return Frames(measured, provenance)


def _grouped(values_HD: torch.Tensor, query_heads: int) -> torch.Tensor:
    """Repeat each kv head's values for the query heads that share it: [H, D] -> [Q, D]."""
    return values_HD.repeat_interleave(query_heads // values_HD.shape[0], 0)


def _paged(spec: ModelSpec) -> dict[int, tuple[Field, ...]]:
    """Return the fields of every paged layer, the draft's layers after the model's own."""
    layers = enumerate((*spec.layers, *spec.draft_layers))
    return {index: layer.fields for index, layer in layers if isinstance(layer, Paged)}


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise Refused(f"{path} is not a file: frames are made by 'truekv calibrate'")
    try:
        with cast("Any", safe_open)(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118 (no dict)
    except (SafetensorError, OSError, ValueError) as error:
        raise Corrupted(f"{path} cannot be read as frames ({error}): measure them again") from error


def _provenance(path: Path | str, metadata: dict[str, str]) -> Provenance:
    version = metadata.get("version")
    if version != str(VERSION):
        raise Refused(
            f"{path} holds frames of version {version}, but this truekv reads version {VERSION}: measure again"
        )
    try:
        values = json.loads(metadata["provenance"])
        return Provenance(**cast("dict[str, Any]", values))
    except (KeyError, TypeError, ValueError) as error:
        raise Corrupted(f"{path} does not say where its frames come from: measure them again") from error


def _check(path: Path | str, key: str, values: torch.Tensor, item: Field, *, positive: bool) -> None:
    shape = (item.heads, item.dim)
    if tuple(values.shape) != shape or values.dtype != torch.float32:
        raise Corrupted(
            f"{path}: '{key}' is {values.dtype} of shape {tuple(values.shape)}, but this model needs float32 {shape}: "
            "measure the frames again"
        )
    if not bool(torch.isfinite(values).all()):
        raise Corrupted(f"{path}: '{key}' holds NaN or infinity: measure the frames again")
    if positive and not bool((values > 0).all()):
        raise Corrupted(f"{path}: '{key}' holds a scale that is not positive: measure the frames again")
