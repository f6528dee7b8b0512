"""What users write to guess ahead, in vLLM's JSON: {"method": "ngram", "num_speculative_tokens": 3}."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from truekv.core.errors import Refused
from truekv.core.folder import choose
from truekv.core.options import Speculation

# vLLM's names for heads that truekv runs in one way.
_METHODS = {"ngram": "ngram", "mtp": "mtp", "deepseek_mtp": "mtp", "qwen3_next_mtp": "mtp", "glm4_moe_lite_mtp": "mtp"}


def read_speculation(given: str | Mapping[str, Any] | Speculation | None) -> Speculation | None:
    """Understand a speculative_config given as JSON text, as a mapping, or ready; nothing means none."""
    if given is None or isinstance(given, Speculation):
        return given
    if isinstance(given, str):
        if not given.strip():
            return None
        try:
            given = json.loads(given)
        except (ValueError, RecursionError) as error:
            raise Refused(f"speculative_config is not valid JSON: {error}") from error
    if not isinstance(given, Mapping):
        raise Refused(
            f"speculative_config is {given!r}, but must be an object: "
            '{"method": "ngram", "num_speculative_tokens": 3}'
        )
    values: dict[str, Any] = dict(given)
    known = {field.name: field.name for field in fields(Speculation)}
    for name in values:
        choose("field of speculative_config", str(name), known)
    for name in ("method", "num_speculative_tokens"):
        if name not in values:
            raise Refused(f"speculative_config names no {name}; ngram guesses from the text, mtp with the model's head")
    values["method"] = choose("speculation method", str(values["method"]), _METHODS)
    if not isinstance(values.get("adaptive", True), bool):
        raise Refused(f"adaptive of speculative_config is {values['adaptive']!r}, but must be true or false")
    return Speculation(**values)
