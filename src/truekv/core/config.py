"""A checkpoint's config.json, read field by field so that no field can go unnoticed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, cast

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping

_MISSING: Any = object()
# What `close` lets pass unread: values by which a field says that it asks for nothing.
_NEUTRAL: tuple[Any, ...] = (None, False, [], {}, "")
# Bookkeeping that says nothing about the computation, in any family.
_METADATA = frozenset(
    """_name_or_path architectures model_type transformers_version torch_dtype dtype auto_map use_cache
    initializer_range bos_token_id eos_token_id pad_token_id sep_token_id decoder_start_token_id
    output_router_logits router_aux_loss_coef aux_loss_alpha seq_aux pretraining_tp attention_dropout
    hidden_dropout embd_pdrop resid_pdrop classifier_dropout id2label label2id problem_type task_specific_params
    return_dict output_hidden_states output_attentions chunk_size_feed_forward finetuning_task
    is_encoder_decoder language_model_only""".split()
)


class Config:
    """A view of config.json that remembers what was read.

    Every getter raises `Refused` on a missing field (unless it has a default), a wrong type, or a
    number out of range. `close` refuses every field that was neither read, nor `only`-checked,
    nor ignored, and that does not hold a neutral value.
    """

    def __init__(self, values: Mapping[str, object], where: str = "config.json") -> None:
        """Wrap the decoded JSON object; `where` names it in refusals."""
        self.values = dict(values)
        self.where = where
        self._read: set[str] = set()

    def __contains__(self, name: str) -> bool:
        """Whether the field is present and not null."""
        return self.values.get(name) is not None

    def get(self, name: str, default: object = _MISSING) -> Any:  # noqa: ANN401 (JSON)
        """Return the raw value; a null counts as missing."""
        self._read.add(name)
        value = self.values.get(name)
        if value is None:
            if default is _MISSING:
                raise Refused(f"{self.where} has no field '{name}', which this family needs")
            return default
        return value

    def integer(self, name: str, default: int | None = _MISSING, *, low: int = 1, high: int = 1 << 24) -> int:
        """Return an integer in [low, high]."""
        value = self.get(name, default)
        if value is default and default is not _MISSING:
            return cast("int", value)
        if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
            raise Refused(f"{self.where}: '{name}' is {_short(value)}, but must be an integer from {low} to {high}")
        return value

    def number(self, name: str, default: float = _MISSING) -> float:
        """Return a number (infinities pass, NaN does not)."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value):
            raise Refused(f"{self.where}: '{name}' is {_short(value)}, but must be a number")
        return float(value)

    def boolean(self, name: str, default: bool = _MISSING) -> bool:  # noqa: FBT001 (mirrors the other getters)
        """Return true or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise Refused(f"{self.where}: '{name}' is {_short(value)}, but must be true or false")
        return value

    def string(self, name: str, default: str = _MISSING) -> str:
        """Return a string."""
        value = self.get(name, default)
        if not isinstance(value, str):
            raise Refused(f"{self.where}: '{name}' is {_short(value)}, but must be a string")
        return value

    def nested(self, name: str, default: Mapping[str, object] | None = _MISSING) -> Config:
        """Return a sub-object as a Config of its own; its owner must `close` it too."""
        value = self.get(name, default)
        if not isinstance(value, dict):
            raise Refused(f"{self.where}: '{name}' is {_short(value)}, but must be an object")
        return Config(cast("dict[str, object]", value), f"{self.where}:{name}")

    def only(self, name: str, *neutral: object) -> None:
        """Refuse unless the field is missing or holds one of the values that are implemented."""
        value = self.get(name, None)
        if value is not None and value not in neutral:
            allowed = " or ".join(repr(item) for item in neutral)
            raise Refused(f"{self.where}: '{name}' is {_short(value)}, but only {allowed} is implemented")

    def ignore(self, *names: str) -> None:
        """Declare fields that change nothing in text inference."""
        self._read.update(names)

    def close(self) -> None:
        """Refuse every field that nobody looked at and that is not neutral."""
        for name, value in self.values.items():
            if name not in self._read and name not in _METADATA and value not in _NEUTRAL:
                raise Refused(
                    f"{self.where}: {_short(name)} is {_short(value)}, a field that truekv does not implement for "
                    "this family; remove it if it changes nothing, or use transformers"
                )


def _short(value: object) -> str:
    """Write a value as it stands in the file, cut to what fits in a sentence."""
    text = ascii(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
