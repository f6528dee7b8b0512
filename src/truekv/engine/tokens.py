"""Text to tokens and back: incremental, never half a character, never a stop string."""

from __future__ import annotations

import functools
import json
from typing import TYPE_CHECKING, Any, cast

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tokenizers import Tokenizer as Library

_REPLACEMENT = "\ufffd"
# A character is at most four bytes, one token each; more held tokens than this are no character in the making.
_LONGEST_CHARACTER = 8
# Tokens kept as left context: enough for decoders that treat the first token of a text specially.
_CONTEXT = 16
# Tokens whose text is remembered.
_KNOWN = 4096


class Tokenizer:
    """A checkpoint's tokenizer.json."""

    def __init__(self, library: Library) -> None:
        """Wrap a tokenizer of the tokenizers library."""
        self._library = library
        # What a token alone says is what the text after it is seen against, at every token of every answer.
        self._alone = functools.lru_cache(_KNOWN)(self._text_of)

    @classmethod
    def open(cls, directory: Path) -> Tokenizer | None:
        """Read tokenizer.json, or return None where there is none; an unreadable one is Refused."""
        path = directory / "tokenizer.json"
        if not path.is_file():
            return None
        from tokenizers import Tokenizer as Library

        try:
            library = Library.from_file(str(path))
        except Exception as error:  # the library raises bare Exception
            raise Refused(f"{path} cannot be read as a tokenizer: {error}") from error
        # Files saved for training may truncate or pad, which would silently lose or invent prompt tokens.
        library.no_truncation()
        library.no_padding()
        return cls(library)

    @property
    def size(self) -> int:
        """How many ids it knows, added tokens included."""
        return self._library.get_vocab_size(with_added_tokens=True)

    def to_json(self) -> str:
        """Return it as the text of a tokenizer.json."""
        return self._library.to_str()

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        """Return the ids of a text; a text that is not valid Unicode is Refused."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise Refused(f"the prompt is not valid Unicode: lone surrogate at character {error.start}") from error
        return self._library.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: Sequence[int]) -> str:
        """Return the text of ids, special tokens left out."""
        if len(tokens) == 1:
            return self._alone(tokens[0])
        return self._library.decode(list(tokens), skip_special_tokens=True)

    def _text_of(self, token: int) -> str:
        return self._library.decode([token], skip_special_tokens=True)

    def find(self, text: str) -> int | None:
        """Return the id of a token by its text."""
        return self._library.token_to_id(text)

    def piece(self, token: int) -> str:
        """Return the text of one id for display, special tokens by name."""
        return self._library.decode([token], skip_special_tokens=False)


def end_tokens(directory: Path, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Collect the ids that end an answer from generation_config, config and tokenizer_config."""
    found: set[int] = set()
    generation, config = (read_object(directory / name) for name in ("generation_config.json", "config.json"))
    nested = config.get("text_config")
    for source in (generation, config, cast("dict[str, Any]", nested) if isinstance(nested, dict) else {}):
        value = source.get("eos_token_id")
        listed = cast("list[object]", value) if isinstance(value, list) else [value]
        found.update(item for item in listed if isinstance(item, int) and not isinstance(item, bool))
        if found:
            # generation_config is what the authors generate with; the others only stand in for it.
            break
    if tokenizer is not None:
        name = token_text(read_object(directory / "tokenizer_config.json").get("eos_token"))
        token = tokenizer.find(name) if name else None
        if token is not None:
            found.add(token)
    return frozenset(found)


def token_text(value: object) -> str | None:
    """Return the text of a special token as tokenizer_config.json writes it: a string or {"content": ...}."""
    if isinstance(value, dict):
        value = cast("dict[str, object]", value).get("content")
    return value if isinstance(value, str) and value else None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON object, {} where there is no file; anything else in the file is Refused."""
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise Refused(f"{path} is not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise Refused(f"{path} holds {type(value).__name__}, but must hold a JSON object")
    return cast("dict[str, Any]", value)


class TextStream:
    """Turns tokens into text as they come, and never emits half a character.

    The concatenation of all pushes and the flush is the decoded text. tokenizers' DecodeStream does
    the same, but has no flush and rescans everything it holds, which is quadratic on invalid bytes.
    """

    def __init__(self, tokenizer: Tokenizer, before: Sequence[int] = ()) -> None:
        """`before`: the prompt; a decoder may need it to know that a leading space is one."""
        self._tokenizer = tokenizer
        self._context = list(before[-_CONTEXT:])
        self._head = tokenizer.decode(self._context)
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """Take one token and return the text that is complete now."""
        self._held.append(token)
        whole = self._tokenizer.decode(self._context + self._held)
        if whole.endswith(_REPLACEMENT) and len(self._held) < _LONGEST_CHARACTER:
            return ""
        return self._emit(whole)

    def flush(self) -> str:
        """Return what is left; an unfinished character shows as U+FFFD."""
        return self._emit(self._tokenizer.decode(self._context + self._held)) if self._held else ""

    def _emit(self, whole: str) -> str:
        text = whole[len(self._head) :] if whole.startswith(self._head) else self._tokenizer.decode(self._held)
        # Tokens without text (special ones) stay in the context, or the next word would lose its space.
        self._context = self._held if text else (self._context + self._held)[-_CONTEXT:]
        self._head = self._tokenizer.decode(self._context)
        self._held = []
        return text


class StopStrings:
    """Ends a text at the first stop string, holding back whatever may still become one."""

    def __init__(self, stops: Sequence[str]) -> None:
        """Watch for `stops`, which are non-empty."""
        self._stops = tuple(stops)
        self._held = ""

    def push(self, text: str) -> tuple[str, bool]:
        """Take text and return (what may be shown, whether a stop string was met)."""
        if not self._stops:
            return text, False
        text = self._held + text
        self._held = ""
        places = [place for stop in self._stops if (place := text.find(stop)) >= 0]
        if places:
            return text[: min(places)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def flush(self) -> str:
        """Return what was held back."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that begins `stop`."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
