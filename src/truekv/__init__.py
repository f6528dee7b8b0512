"""truekv: quantized KV caches that stay true to the model."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from truekv.core.errors import ConstraintFailed, Corrupted, DoesNotFit, OutOfMemory, Refused, TrueKVError
    from truekv.core.options import EngineOptions, SamplingParams, StructuredOutputs
    from truekv.serve.llm import LLM

__version__ = "0.1.0"
__all__ = [
    "LLM",
    "ConstraintFailed",
    "Corrupted",
    "DoesNotFit",
    "EngineOptions",
    "OutOfMemory",
    "Refused",
    "SamplingParams",
    "StructuredOutputs",
    "TrueKVError",
]

_HOME = {
    "LLM": "truekv.serve.llm",
    "EngineOptions": "truekv.core.options",
    "SamplingParams": "truekv.core.options",
    "StructuredOutputs": "truekv.core.options",
}


def __getattr__(name: str) -> object:
    """Import public names on first use, so that `import truekv` costs nothing."""
    if name not in __all__:
        raise AttributeError(f"module 'truekv' has no attribute '{name}'")
    return getattr(import_module(_HOME.get(name, "truekv.core.errors")), name)
