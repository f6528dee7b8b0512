"""A checkpoint on disk: found, understood and checked before a byte of it is allocated, then loaded."""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
import math
import os
import re
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, cast

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.core.folder import members
from truekv.core.lazy import torch
from truekv.core.weights import Weights
from truekv.kernels.reference.ops import OPS as REFERENCE
from truekv.models.headers import MAX_CONFIG_BYTES, TensorHeader, listed, quoted, read_headers, read_json, some
from truekv.models.stored import LOADABLE, StoredTensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.ops import Ops
    from truekv.core.protocols import Architecture, Family, Model

_METADATA_FILES: Final = ["*.json", "*.jinja"]
_QUANTIZED: Final = ("quantization_config", "compression_config")
# Enough 256-byte samples per file to tell a fine-tune from its base, few enough to cost nothing.
_SAMPLES: Final = 64


@dataclass(frozen=True)
class Checkpoint:
    """A model directory in Hugging Face form. Opening one reads JSON and headers, and needs no torch."""

    directory: Path
    config: Config
    architecture: Architecture
    headers: Mapping[str, TensorHeader]
    """Every tensor that the files hold; empty when there are no weights (yet)."""

    @classmethod
    def open(cls, model: str, *, weights: bool = True) -> Checkpoint:
        """Open a directory, or a hub id, which is downloaded (JSON, chat template, safetensors; never code).

        With `weights=False` nothing but JSON is fetched and missing shards do not matter: enough to
        plan. Raises Refused for what cannot be found or is not implemented, Corrupted for damaged files.
        """
        directory = _locate(model, weights=weights)
        if not (directory / "config.json").exists():
            raise Refused(f"{directory} holds no config.json; name a model directory in Hugging Face form")
        if (directory / "hf_quant_config.json").exists():
            raise Refused(f"{directory} holds hf_quant_config.json: {_UNQUANTIZED}")
        config = Config(read_json(directory / "config.json", MAX_CONFIG_BYTES), str(directory / "config.json"))
        return cls(directory, config, understand(config), read_headers(directory, partial=not weights))

    def with_draft_head(self) -> Checkpoint:
        """Return the same with its multi-token-prediction head among what is checked and loaded.

        Raises Refused where config or files hold none, or one that is not implemented.
        """
        architecture = self.architecture.with_draft_head()
        head = [name for name in architecture.tensors if name not in self.architecture.tensors]
        if self.headers and not any(name in self.headers for name in head):
            raise Refused(
                f"{self.directory} holds no tensor of the multi-token-prediction head that its config announces, such "
                f"as {quoted(head[0])}; speculate with the method ngram, which needs none"
            )
        return replace(self, architecture=architecture)

    @functools.cached_property
    def tensors(self) -> Mapping[str, tuple[int, ...]]:
        """Name and shape of every tensor to load, in the layout of the files.

        An architecture may take several (`layouts`: experts one by one, or fused); the files decide.
        """
        default = (self.architecture.tensors,)
        layouts: tuple[Mapping[str, tuple[int, ...]], ...] = getattr(self.architecture, "layouts", default)
        return max(layouts, key=lambda shapes: sum(name in self.headers for name in shapes) / len(shapes))

    @functools.cached_property
    def parameters(self) -> int:
        """How many numbers the model loads."""
        return sum(math.prod(shape) for shape in self.tensors.values())

    @functools.cached_property
    def weight_bytes(self) -> int:
        """Bytes of the tensors that are loaded: as stored, or two per number when there are no files to ask."""
        if not self.headers:
            return 2 * self.parameters
        used = (self.headers[name] for name in self.tensors if name in self.headers)
        return sum(header.end - header.start for header in used)

    def bytes_in(self, dtype: str) -> int:
        """Bytes of the weights in a compute dtype: as stored if that is the checkpoint's, else converted."""
        if dtype == self.architecture.spec.dtype and self.headers:
            return self.weight_bytes
        return self.parameters * (4 if dtype == "float32" else 2)

    @functools.cached_property
    def digest(self) -> str:
        """What identifies the model: a hash of config, header table and samples of the weights.

        Names, shapes and dtypes alone cannot tell a fine-tune from its base, whose measured frames
        differ; 64 samples per file can, and take milliseconds.
        """
        table = [(name, item.dtype, item.shape) for name, item in sorted(self.headers.items())]
        seen = hashlib.sha256(json.dumps([self.config.values, table], sort_keys=True).encode())
        for file in sorted({item.file for item in self.headers.values()}):
            with (self.directory / file).open("rb") as stream:
                size = os.fstat(stream.fileno()).st_size
                for index in range(_SAMPLES):
                    stream.seek(size * index // _SAMPLES)
                    seen.update(stream.read(256))
        return seen.hexdigest()

    def check(self) -> None:
        """Refuse, before anything is allocated, files that do not hold exactly what the model needs."""
        if not self.headers:
            other = sorted(path.name for path in self.directory.glob("*") if path.suffix in {".bin", ".pt", ".pth"})
            hint = f"{listed(other)} cannot be used: only safetensors are read" if other else "download them"
            raise Refused(f"{self.directory} holds no model.safetensors and no index of shards; {hint}")
        faults = self._faults()
        if faults:
            family = self.architecture.spec.family
            raise Refused(f"{self.directory} does not hold the weights of a {family} model: {'; '.join(faults)}")

    def _faults(self) -> list[str]:
        needed = self.tensors
        ignored = _any_of(self.architecture.ignored)
        missing = [name for name in needed if name not in self.headers]
        unexpected = [name for name in self.headers if name not in needed and not ignored.fullmatch(name)]
        there = [(name, tuple(shape), self.headers[name]) for name, shape in needed.items() if name in self.headers]
        shapes = [
            f"{quoted(name)} has shape {list(item.shape)} instead of {list(shape)}"
            for name, shape, item in there
            if item.shape != shape
        ]
        dtypes = [
            f"{quoted(name)} is stored as {item.dtype}, not as a float of 16 bits or more"
            for name, _, item in there
            if item.dtype not in LOADABLE
        ]
        faults = [
            f"{listed(names)} {what}" for names, what in ((missing, "missing"), (unexpected, "unexpected")) if names
        ]
        return faults + [some(wrong) for wrong in (shapes, dtypes) if wrong]

    def compute_dtype(self, asked: str = "auto") -> Literal["float32", "bfloat16"]:
        """Resolve the dtype a model computes in: auto is the checkpoint's, and float32 for float16 ones."""
        match asked:
            case "auto":
                return "bfloat16" if self.architecture.spec.dtype == "bfloat16" else "float32"
            case "float32" | "bfloat16":
                return asked
            case _:
                raise Refused(f"dtype is {quoted(asked)}, but must be auto, float32 or bfloat16")

    def load(self, dtype: str = "auto", ops: Ops = REFERENCE, device: torch.device | str = "cpu") -> Model:
        """Check, read and convert every weight to `dtype` on a device, and build the model on a backend's operations.

        A weight is read when the model takes it, so that no more than one layer's are ever held twice.
        Parameters that the architecture lists in `float32` (regular expressions, full match) keep
        that precision. Raises Corrupted for a weight that is NaN or infinite.
        """
        self.check()
        patterns: tuple[str, ...] = getattr(self.architecture, "float32", ())
        exact = _any_of(patterns)
        compute = getattr(torch, self.compute_dtype(dtype))

        def kept(name: str) -> torch.dtype:
            return torch.float32 if exact.fullmatch(name) else compute

        headers = {name: self.headers[name] for name in self.tensors}
        with StoredTensors(self.directory, headers, kept, device) as stored:
            weights = Weights(stored, ops, torch.device(device))
            model = self.architecture.build(weights)
            # What a model has no use for must be sound as well: it tells of a damaged file.
            for name in list(weights):
                weights.take(name)
        return model


def _any_of(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Compile patterns into one; none of them match nothing."""
    return re.compile("|".join(f"(?:{pattern})" for pattern in patterns) or r"(?!)")


def understand(config: Config) -> Architecture:
    """Find the family that answers to the config's model_type and let it read the config. No torch."""
    nested = [cast("dict[str, object]", item) for item in config.values.values() if isinstance(item, dict)]
    for section in (config.values, *nested):
        for name in _QUANTIZED:
            if section.get(name):
                _refuse_quantized(config.where, name, section[name])
    families = {
        model_type: family
        for family in cast("dict[str, Family]", members("truekv.models.families", "FAMILY")).values()
        for model_type in family.model_types
    }
    model_type = config.string("model_type")
    if model_type not in families:
        near = difflib.get_close_matches(model_type, families, n=1, cutoff=0.6)
        hint = f"did you mean {near[0]!r}? " if near else ""
        known = ", ".join(sorted(families))
        raise Refused(f"{config.where}: model_type {quoted(model_type)} is not implemented; {hint}truekv runs {known}")
    return families[model_type].read(config)


_UNQUANTIZED: Final = "quantized weights are not implemented; use the model's unquantized (bf16) checkpoint"


def _refuse_quantized(where: str, name: str, value: object) -> None:
    fields = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    # compressed-tensors and ModelOpt put weights in config_groups; without them only the cache is quantized.
    if fields.get("kv_cache_scheme") and not fields.get("config_groups"):
        raise Refused(
            f"{where}: '{name}' asks for a KV cache with scales stored in the checkpoint, which is not implemented; "
            "use the checkpoint that it was made from, with --kv-cache-dtype int8, which needs none"
        )
    raise Refused(f"{where}: '{name}' is set, but {_UNQUANTIZED}")


def _locate(model: str, *, weights: bool) -> Path:
    """Return the directory of a model, downloading it when the name is a hub id."""
    path = os.path.expanduser(model)  # noqa: PTH111 (unlike Path.is_dir, os.path never raises on odd names)
    if os.path.isdir(path):  # noqa: PTH112 (likewise)
        return Path(path)
    if os.path.exists(path):  # noqa: PTH110 (likewise)
        raise Refused(f"{path} is a file; name the model directory that holds config.json and safetensors")
    if not re.fullmatch(r"[\w-][\w.-]{0,95}(/[\w-][\w.-]{0,95})?", model):
        raise Refused(f"{quoted(model)} is neither a directory nor a hub id of the form organisation/model")
    return _download(model, _METADATA_FILES + ["*.safetensors"] * weights)


def _download(model: str, patterns: list[str]) -> Path:
    import huggingface_hub
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    try:
        # Files in sub-directories and Mistral's consolidated copies are second versions of the same weights.
        skipped = ["*/*", "consolidated*"]
        return Path(huggingface_hub.snapshot_download(model, allow_patterns=patterns, ignore_patterns=skipped))
    except GatedRepoError:
        reason = "its owner asks for consent: accept the terms on its page, then run 'hf auth login'"
    except RepositoryNotFoundError:
        reason = "the hub knows no such model, or it is private: check the name, or run 'hf auth login'"
    except Exception as error:  # noqa: BLE001 (the hub client's transport errors share no base class)
        first = next(iter(str(error).splitlines()), "") or type(error).__name__
        reason = f"the hub could not be reached or did not answer ({first[:200]})"
    raise Refused(f"{quoted(model)} is not a directory here, and cannot be downloaded: {reason}")
