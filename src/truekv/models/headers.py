"""What a checkpoint's files say they hold, read without trusting a byte of them.

A safetensors file is an 8-byte little-endian length, that many bytes of JSON, and the tensors one
after the other (https://github.com/safetensors/safetensors, "Format"). Everything here is checked
against the size of the file before a tensor is touched, and nothing needs torch.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, NoReturn, cast

from truekv.core.errors import Corrupted, Refused

if TYPE_CHECKING:
    from collections.abc import Iterable
    from pathlib import Path

# Bits of one number, for every dtype the format defines.
DTYPE_BITS: Final = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("F8_E4M3", "F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ", "I8", "U8", "BOOL"), 8),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    "F4": 4,
}
MAX_CONFIG_BYTES: Final = 16_000_000
# The limit of the safetensors library itself; indexes of the largest checkpoints need about 10 MB.
MAX_HEADER_BYTES: Final = 100_000_000
_MAX_TENSORS: Final = 1 << 20
_MAX_RANK: Final = 8
_MAX_DIM: Final = 1 << 40


@dataclass(frozen=True, slots=True)
class TensorHeader:
    """One tensor as its file announces it: `file` is a name in the checkpoint's directory.

    `start` and `end` are byte offsets from the beginning of that file.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int


def json_object(data: bytes, where: str) -> dict[str, object]:
    """Decode one JSON object; `where` begins the sentence when it is not one.

    Infinity is a number (configs use it), NaN is not. Duplicate keys are refused, since readers
    disagree about which of them counts.
    """

    def unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            counts = Counter(name for name, _ in pairs)
            raise Refused(f"{where} has the key {quoted(counts.most_common(1)[0][0])} twice; keep one of them")
        return seen

    def constant(name: str) -> float:
        if name == "NaN":
            raise Refused(f"{where} holds NaN, which is no setting; write a number or null")
        return math.inf if name == "Infinity" else -math.inf

    try:
        value: object = json.loads(data.decode(), object_pairs_hook=unique, parse_constant=constant)
    except UnicodeDecodeError as error:
        raise Refused(f"{where} is not UTF-8 text (byte {error.start}); save it again as UTF-8 JSON") from None
    except RecursionError:
        raise Refused(f"{where} nests its objects too deeply to be a checkpoint's JSON") from None
    except ValueError as error:
        raise Refused(f"{where} is not valid JSON ({error}); restore it from where the model came from") from None
    if not isinstance(value, dict):
        raise Refused(f"{where} holds a JSON {type(value).__name__}, but must be an object")
    return cast("dict[str, object]", value)


def read_json(path: Path, limit: int) -> dict[str, object]:
    """Return the object a JSON file holds, refusing a file over `limit` bytes before reading it."""
    try:
        size = path.stat().st_size
        if not path.is_file():
            raise Refused(f"{path} is not a file, but must hold a JSON object")
        if size > limit:
            raise Refused(f"{path} has {size} bytes, more than the {limit} that a real one could need")
        data = path.read_bytes()
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    return json_object(data, str(path))


def read_header(path: Path) -> dict[str, TensorHeader]:
    """Return {name: header} of one safetensors file, checked against the file's size.

    Raises Corrupted when the file contradicts itself, Refused when it cannot be read.
    """
    try:
        with path.open("rb") as stream:
            size = path.stat().st_size
            head = stream.read(8)
            if len(head) < 8:
                _broken(path, f"has {size} bytes, too few for a header")
            length = int.from_bytes(head, "little")
            if length > MAX_HEADER_BYTES:
                _broken(path, f"announces a header of {length} bytes, more than the {MAX_HEADER_BYTES} allowed")
            if 8 + length > size:
                _broken(path, f"announces a header of {length} bytes, but has only {size} bytes in all")
            data = stream.read(length)
    except OSError as error:
        raise Refused(f"{path} cannot be read ({error.strerror}); check the path and its permissions") from None
    try:
        entries = json_object(data, f"the header of {path}")
    except Refused as error:
        raise Corrupted(str(error)) from None
    entries.pop("__metadata__", None)
    if len(entries) > _MAX_TENSORS:
        _broken(path, f"announces {len(entries)} tensors, more than the {_MAX_TENSORS} allowed")
    found = {name: _tensor(path, name, entry, 8 + length) for name, entry in entries.items()}
    _check_layout(path, found, 8 + length, size)
    return found


def read_headers(directory: Path, *, partial: bool = False) -> dict[str, TensorHeader]:
    """Return {name: header} of a checkpoint: model.safetensors, or the shards of its index.

    Empty when the directory holds no weights, and with `partial` also when shards are missing
    (their config can still be planned); otherwise missing shards are refused by name.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.exists():
        return read_header(single)
    if not index.exists():
        stray = next(iter(sorted(path.name for path in directory.glob("model-*.safetensors"))), None)
        if stray is not None and not partial:
            raise Refused(f"{directory} holds {stray} but no {index.name}, which says what each shard holds")
        return {}
    shards = _shards(index)
    missing = sorted(name for name in shards if not (directory / name).exists())
    if missing and partial:
        return {}
    if missing:
        raise Refused(
            f"{directory} lacks {listed(missing)}, named by {index.name}; download the rest of the checkpoint"
        )
    found: dict[str, TensorHeader] = {}
    for shard, promised in sorted(shards.items()):
        held = read_header(directory / shard)
        absent = sorted(promised - held.keys())
        if absent:
            raise Corrupted(
                f"{index} places {listed(absent)} in {shard}, which does not hold them; download both again"
            )
        double = sorted(held.keys() & found.keys())
        if double:
            raise Corrupted(
                f"{directory / shard} and {found[double[0]].file} both hold {listed(double)}; keep one copy"
            )
        found.update(held)
    return found


def _shards(index: Path) -> dict[str, set[str]]:
    """Return {shard: names of its tensors}; a shard must be a plain file name beside the index."""
    placed = read_json(index, MAX_HEADER_BYTES).get("weight_map")
    if not isinstance(placed, dict) or not placed:
        raise Refused(f"{index} has no 'weight_map' object that says which shard holds each tensor")
    shards: dict[str, set[str]] = {}
    for name, shard in cast("dict[str, object]", placed).items():
        if not isinstance(shard, str) or not shard.endswith(".safetensors") or set(shard) & set("/\\\0"):
            raise Refused(
                f"{index} places {quoted(name)} in {quoted(shard)}, "
                "but a shard must be a .safetensors file in the same directory"
            )
        shards.setdefault(shard, set()).add(name)
    return shards


def _tensor(path: Path, name: str, entry: object, base: int) -> TensorHeader:
    """Check one entry by itself: known dtype, sane shape, bytes that the shape needs."""
    fields = cast("dict[str, object]", entry) if isinstance(entry, dict) else {}
    if fields.keys() != {"dtype", "shape", "data_offsets"}:
        _broken(path, f"describes {quoted(name)} by something else than dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        _broken(path, f"gives {quoted(name)} the unknown dtype {quoted(dtype)}")
    dims = _naturals(shape)
    if dims is None or len(dims) > _MAX_RANK or max(dims, default=0) > _MAX_DIM:
        _broken(path, f"gives {quoted(name)} the impossible shape {quoted(shape)}")
    span = _naturals(offsets)
    if span is None or len(span) != 2 or span[0] > span[1]:
        _broken(path, f"gives {quoted(name)} the impossible data_offsets {quoted(offsets)}")
    bits = math.prod(dims) * DTYPE_BITS[dtype]
    if bits != 8 * (span[1] - span[0]):
        _broken(path, f"gives {quoted(name)} {span[1] - span[0]} bytes, but {dtype} {list(dims)} needs {bits / 8:g}")
    return TensorHeader(dtype, dims, path.name, base + span[0], base + span[1])


def _check_layout(path: Path, found: dict[str, TensorHeader], base: int, size: int) -> None:
    """Check that the tensors fill the file without holes, overlaps or a rest."""
    at = base
    for name, header in sorted(found.items(), key=lambda item: (item[1].start, item[1].end)):
        if header.end > size:
            _broken(path, f"ends at byte {size}, inside or before {quoted(name)}, which reaches to byte {header.end}")
        if header.start != at:
            what = "a hole before" if header.start > at else "another tensor inside"
            _broken(path, f"has {what} {quoted(name)} at byte {header.start}")
        at = header.end
    if at != size:
        _broken(path, f"has {size - at} bytes after its last tensor that nothing describes")


def _naturals(value: object) -> tuple[int, ...] | None:
    """Return a JSON list of integers >= 0 as a tuple, None if it is anything else."""
    if not isinstance(value, list):
        return None
    items = cast("list[object]", value)
    # A boolean is an int to Python, not to JSON.
    numbers = tuple(item for item in items if isinstance(item, int) and not isinstance(item, bool) and item >= 0)
    return numbers if len(numbers) == len(items) else None


def _broken(path: Path, what: str) -> NoReturn:
    raise Corrupted(f"{path} {what}: the file is damaged or incomplete, download it again")


def quoted(value: object) -> str:
    """Quote a value from a file, cut to what fits in a sentence."""
    text = ascii(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def listed(names: Iterable[str]) -> str:
    """Quote names from a file: up to three, and count the rest."""
    return some([quoted(name) for name in names])


def some(phrases: list[str]) -> str:
    """Join up to three phrases and count the rest."""
    rest = f" and {len(phrases) - 3} more" if len(phrases) > 3 else ""
    return ", ".join(phrases[:3]) + rest
