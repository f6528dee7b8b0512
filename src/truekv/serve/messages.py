"""Conversations: what a message may be, where a checkpoint keeps its chat template, and the prompt both make."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any, cast

from truekv.core.errors import Refused
from truekv.engine.tokens import read_object, token_text
from truekv.serve.template import render

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

Message = dict[str, Any]
ROLES = ("system", "developer", "user", "assistant", "tool")
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token")


class ChatTemplate:
    """A checkpoint's chat template and the special tokens it may name."""

    def __init__(self, templates: dict[str, str], special: dict[str, str]) -> None:
        """`templates`: by name; "default", and "tool_use" where the checkpoint has one of its own for tools."""
        self._templates = templates
        self._special = special

    @classmethod
    def open(cls, directory: Path) -> ChatTemplate | None:
        """Find chat_template.jinja, chat_template.json or tokenizer_config.json's; None where there is none."""
        config = read_object(directory / "tokenizer_config.json")
        path = directory / "chat_template.jinja"
        if path.is_file():
            found: object = decode(path.read_bytes(), str(path))
        else:
            found = read_object(directory / "chat_template.json").get("chat_template") or config.get("chat_template")
        if found is None:
            return None
        special = {name: text for name in _SPECIAL if (text := token_text(config.get(name)))}
        return cls(_named(found, directory), special)

    def render(
        self,
        messages: Sequence[Message],
        tools: Sequence[dict[str, Any]] | None = None,
        extra: Mapping[str, object] | None = None,
    ) -> str:
        """Return the prompt for a conversation, ending where the assistant's answer begins.

        `extra`: variables of the template itself, such as enable_thinking; they cannot replace the messages.
        """
        template = self._templates["default"]
        if tools:
            template = self._templates.get("tool_use", template)
        variables: dict[str, object] = {**(extra or {}), **self._special}
        variables |= {"messages": list(messages), "tools": list(tools) if tools else None, "documents": None}
        return render(template, {**variables, "add_generation_prompt": True})


def _named(found: object, directory: Path) -> dict[str, str]:
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        entries = cast("list[Any]", found)
        templates = {str(entry["name"]): str(entry["template"]) for entry in entries if _is_entry(entry)}
        if templates:
            templates.setdefault("default", next(iter(templates.values())))
            return templates
    raise Refused(f"{directory}: 'chat_template' must be a string or a list of objects with 'name' and 'template'")


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and {"name", "template"} <= set(cast("dict[str, object]", entry))


def check_messages(value: object, where: str = "messages") -> list[Message]:
    """Return a conversation, or refuse it and say which message is wrong."""
    if not isinstance(value, list) or not value:
        raise Refused(f"{where} must be a non-empty list of objects with 'role' and 'content'")
    return [_check_message(item, f"{where}[{place}]") for place, item in enumerate(cast("list[object]", value))]


def _check_message(value: object, where: str) -> Message:
    if not isinstance(value, dict):
        raise Refused(f"{where} is {type(value).__name__}, but must be an object with 'role' and 'content'")
    message = cast("Message", value)
    role = message.get("role")
    if role not in ROLES:
        raise Refused(f"{where} has role {role!r}, but a role is one of {', '.join(ROLES)}")
    if message.get("tool_calls"):
        message = {**message, "tool_calls": _calls(message["tool_calls"], f"{where}.tool_calls")}
    content = message.get("content")
    if content is None and role == "assistant" and message.get("tool_calls"):
        return {**message, "content": ""}
    if isinstance(content, list):
        parts = cast("list[object]", content)
        return {**message, "content": "".join(_part(part, f"{where}.content[{i}]") for i, part in enumerate(parts))}
    if not isinstance(content, str):
        raise Refused(f"{where} has content of type {type(content).__name__}, but it must be a string")
    return message


def _part(value: object, where: str) -> str:
    """Return the text of one part of a content list."""
    part = cast("dict[str, object]", value) if isinstance(value, dict) else {}
    text = part.get("text")
    if part.get("type") != "text" or not isinstance(text, str):
        raise Refused(f"{where} is not a text part, and truekv reads text only: use {{'type': 'text', 'text': ...}}")
    return text


def _calls(value: object, where: str) -> list[dict[str, Any]]:
    """Return tool calls with their arguments as objects: clients send JSON text, templates iterate over it."""
    calls: list[dict[str, Any]] = []
    for place, item in enumerate(cast("list[object]", value) if isinstance(value, list) else [value]):
        call = cast("dict[str, Any]", item) if isinstance(item, dict) else {}
        function: Any = call.get("function", call)
        if not isinstance(function, dict) or "name" not in function:
            raise Refused(f"{where} must be a list of objects with 'function': {{'name': ..., 'arguments': ...}}")
        arguments: Any = cast("dict[str, Any]", function).get("arguments", {})
        if isinstance(arguments, str):
            try:
                arguments = json.loads(arguments or "{}")
            except (ValueError, RecursionError) as error:
                raise Refused(f"{where}[{place}]: 'arguments' is not valid JSON: {error}") from error
        if not isinstance(arguments, dict):
            raise Refused(f"{where}[{place}]: 'arguments' must be an object")
        calls.append({**call, "function": {**function, "arguments": arguments}})
    return calls


def check_tools(value: object) -> list[dict[str, Any]] | None:
    """Return a list of tool definitions, or refuse it."""
    if value is None:
        return None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in cast("list[object]", value)):
        raise Refused("tools must be a list of objects, each the definition of a function")
    return cast("list[dict[str, Any]]", value)


def decode(data: bytes, where: str) -> str:
    """Decode UTF-8, or refuse and say at which byte it stops being that."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise Refused(f"{where} is not valid UTF-8: byte {error.start} is 0x{data[error.start]:02x}") from error
