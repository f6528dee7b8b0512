"""Measured fp8 scales in the files that other engines load, checked by the rules of their loaders.

Every layout stores a row as fp8_e4m3(row / scale) and reads it back times the scale, with one scale
per layer for keys and one for values. The rules are those of vLLM's compressed-tensors and ModelOpt
readers and of SGLang's schema for `--quantization-param-path`.
"""

from __future__ import annotations

import json
import math
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from truekv.core.errors import Refused
from truekv.core.folder import choose
from truekv.core.lazy import torch
from truekv.core.spec import Paged

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from pathlib import Path

    from truekv.core.spec import ModelSpec

SCALES_FILE: Final = "kv_cache_scales.safetensors"
INDEX_FILE: Final = "model.safetensors.index.json"
# Smallest normal number of e4m3: below it, precision falls with the number itself.
_SMALLEST_NORMAL: Final = 2.0**-6
MAX_SUBNORMAL_SHARE: Final = 0.01


@dataclass(frozen=True, slots=True)
class TensorScale:
    """One static fp8 scale for all heads of a field."""

    scale: float
    """A stored number is fp8_e4m3(x / scale)."""
    rms: float
    """Root mean square of the rows it was measured on, per number."""


Scales = dict[int, dict[str, TensorScale]]
"""{layer: {field name: its scale}} for every paged layer."""


def subnormal_share(rms: float, scale: float) -> float:
    """Return the share of Gaussian numbers of this rms that a scale pushes below e4m3's normal range."""
    return math.erf(_SMALLEST_NORMAL * scale / (rms * math.sqrt(2.0)))


def export(
    layout: str,
    directory: Path,
    spec: ModelSpec,
    scales: Scales,
    *,
    config: Mapping[str, object],
    placed: Mapping[str, str],
) -> list[Path]:
    """Write one of LAYOUTS into `directory` and return the files.

    `config` is the checkpoint's config.json and `placed` maps its tensors to the files that hold them.
    compressed-tensors and modelopt write files to be copied over the checkpoint's directory; sglang writes the
    one JSON file of its option. Raises Refused, and writes nothing, when the layout cannot hold the scales.
    """
    check(layout, spec, config, placed)
    _check_scales(spec, scales)
    return LAYOUTS[layout](directory, spec, scales, config, placed)


def check(layout: str, spec: ModelSpec, config: Mapping[str, object], placed: Mapping[str, str]) -> None:
    """Refuse what no scale could save: an unknown layout, or a model that these layouts cannot express."""
    choose("scale layout", layout, LAYOUTS)
    if "quantization_config" in config:
        raise Refused(
            "the checkpoint's config.json already has a quantization_config, which the exported one would replace; "
            "export from the unquantized checkpoint"
        )
    for index, layer in enumerate(spec.layers):
        names = {field.name for field in layer.fields} if isinstance(layer, Paged) else {"k", "v"}
        if names != {"k", "v"}:
            raise Refused(
                f"layer {index} caches {' and '.join(sorted(names))}, for which the other engines have one shared fp8 "
                "scale and no place for two; use --kv-cache-dtype int8 in truekv, or their unscaled bf16 cache"
            )
    _prefixes(spec, placed)


# No group quantizes any weight: the linear layers stay as they are, only the KV cache has a scheme.
_COMPRESSED_TENSORS: Final[dict[str, Any]] = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "quantization_status": "compressed",
    "config_groups": {},
    "ignore": ["lm_head"],
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False},
}
# quant_algo must be named for the file to be accepted at all. The weights are not FP8, so every linear layer
# is excluded: vLLM matches wildcards, SGLang matches parts of the module's name.
_MODELOPT: Final[dict[str, Any]] = {
    "producer": {"name": "modelopt", "version": "truekv"},
    "quantization": {
        "quant_algo": "FP8",
        "kv_cache_quant_algo": "FP8",
        "exclude_modules": ["*", "layers", "lm_head"],
    },
}


def _check_scales(spec: ModelSpec, scales: Scales) -> None:
    for index, layer in enumerate(spec.layers):
        for name in ("k", "v") if isinstance(layer, Paged) else ():
            found = scales.get(index, {})
            if name not in found:
                raise Refused(f"layer {index} has no measured scale for {name}; run truekv calibrate on this model")
            _check_scale(index, name, found[name])


def _check_scale(index: int, name: str, found: TensorScale, shared_by: str = "all heads") -> None:
    # Their loaders read -1 as "missing" and missing as 1.0, so neither may ever be written.
    if not (math.isfinite(found.scale) and found.scale > 0) or found.scale == 1.0:
        raise Refused(
            f"the fp8 scale of layer {index} field {name} is {found.scale:g}, which no measurement gives; "
            "run truekv calibrate on this model"
        )
    share = subnormal_share(found.rms, found.scale)
    if share > MAX_SUBNORMAL_SHARE:
        raise Refused(
            f"one fp8 scale for {shared_by} would store {share:.1%} of the numbers of layer {index} field {name} below "
            "e4m3's normal range; use another layout, or --kv-cache-dtype int8 in truekv"
        )


def _prefixes(spec: ModelSpec, placed: Iterable[str]) -> dict[int, str]:
    """Return {paged layer: module name of its attention}, found by where the checkpoint keeps k_proj."""
    pattern = re.compile(r"(.*\blayers\.(\d+)\.\w+)\.k_proj\.weight")
    found = {int(match[2]): match[1] for name in placed if (match := pattern.fullmatch(name)) and "mtp" not in name}
    prefixes: dict[int, str] = {}
    for index, layer in enumerate(spec.layers):
        if isinstance(layer, Paged):
            if index not in found:
                raise Refused(
                    f"layer {index} has no k_proj.weight in the checkpoint, so other engines have no name for its "
                    "scales; serve it with truekv"
                )
            prefixes[index] = found[index]
    return prefixes


def compressed_tensors(
    directory: Path, spec: ModelSpec, scales: Scales, config: Mapping[str, object], placed: Mapping[str, str]
) -> list[Path]:
    """Write config.json with a kv_cache_scheme, and `<attention>.{k,v}_scale` tensors of shape [1]."""
    prefixes = _prefixes(spec, placed)
    tensors = {
        f"{prefix}.{name}_scale": torch.tensor([scales[index][name].scale])
        for index, prefix in prefixes.items()
        for name in ("k", "v")
    }
    merged = {**config, "quantization_config": _COMPRESSED_TENSORS}
    return [*_overlay(directory, tensors, placed), _json(directory / "config.json", merged)]


def modelopt(
    directory: Path, spec: ModelSpec, scales: Scales, config: Mapping[str, object], placed: Mapping[str, str]
) -> list[Path]:
    """Write hf_quant_config.json, and scalars `<attention>.k_proj.k_scale`, `<attention>.v_proj.v_scale`."""
    del config
    prefixes = _prefixes(spec, placed)
    tensors = {
        f"{prefix}.{name}_proj.{name}_scale": torch.tensor(scales[index][name].scale)
        for index, prefix in prefixes.items()
        for name in ("k", "v")
    }
    return [*_overlay(directory, tensors, placed), _json(directory / "hf_quant_config.json", _MODELOPT)]


def sglang(
    directory: Path, spec: ModelSpec, scales: Scales, config: Mapping[str, object], placed: Mapping[str, str]
) -> list[Path]:
    """Write kv_cache_scales.json for --quantization-param-path: one scale a layer, for keys and values alike.

    It serves one rank: the schema wants a copy of the map for every tensor-parallel rank, and no more.
    """
    del placed
    layers: dict[str, float] = {}
    for index, layer in enumerate(spec.layers):
        if not isinstance(layer, Paged):
            # The schema wants every hidden layer; one without a KV cache reads nothing of it.
            layers[str(index)] = 1.0
            continue
        shared = max(scales[index][name].scale for name in ("k", "v"))
        for name in ("k", "v"):
            _check_scale(index, name, TensorScale(shared, scales[index][name].rms), "keys and values alike")
        layers[str(index)] = shared
    values = {
        "model_type": config.get("model_type"),
        "kv_cache": {"dtype": "float8_e4m3fn", "scaling_factor": {"0": layers}},
    }
    return [_json(directory / "kv_cache_scales.json", values)]


LAYOUTS: Final = {"compressed-tensors": compressed_tensors, "modelopt": modelopt, "sglang": sglang}


def _overlay(directory: Path, tensors: dict[str, torch.Tensor], placed: Mapping[str, str]) -> list[Path]:
    """Write the tensors and an index that adds them to the checkpoint's own."""
    from safetensors.torch import save_file  # pyright: ignore[reportUnknownVariableType] (PathLike without its type)

    directory.mkdir(parents=True, exist_ok=True)
    save_file(tensors, directory / SCALES_FILE, metadata={"format": "pt"})
    # A loader that finds an index reads no file outside it, so the scales must be in it.
    index = {"metadata": {}, "weight_map": {**placed, **dict.fromkeys(tensors, SCALES_FILE)}}
    return [directory / SCALES_FILE, _json(directory / INDEX_FILE, index)]


def _json(path: Path, value: Mapping[str, object]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value, indent=2) + "\n")
    return path
