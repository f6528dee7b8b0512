"""Chat templates: programs that come with a checkpoint, run where they can neither reach out nor run on.

Jinja2's sandbox stops a template from reaching into Python, but not from looping or from building a
string of 300 MB. So it is rendered in a child process (`python -m truekv.serve.template`) that has
limits on memory, and that the parent kills when the time is up. The child imports no torch, starts
once and renders until its parent ends.
"""

from __future__ import annotations

import atexit
import json
import selectors
import struct
import subprocess
import sys
import threading
import time
from datetime import UTC, datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any, BinaryIO, Final, NoReturn, cast

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import jinja2
    from jinja2.ext import Extension

SECONDS: Final = 2.0
"""Longest time a template may render; real ones need about a millisecond."""
OUTPUT_BYTES: Final = 4 << 20
"""Longest text a template may make."""
_MEMORY: Final = 1 << 30
_START_SECONDS: Final = 60.0


def render(template: str, variables: Mapping[str, object], *, seconds: float = SECONDS) -> str:
    """Render a chat template; Refused when it fails, loops, reaches for attributes or writes too much."""
    reply = _WORKER.ask({"template": template, "variables": dict(variables)}, seconds)
    if "text" in reply:
        return str(reply["text"])
    raise Refused(str(reply["error"]))


class _Worker:
    """The child process: started on first use, killed when late, started again on the next use."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()

    def ask(self, question: Mapping[str, object], seconds: float) -> dict[str, Any]:
        """Send one question and return the answer; a late or dead child makes it Refused."""
        data = json.dumps(question).encode()
        with self._lock:
            process = self._process if self._process and self._process.poll() is None else self._start()
            try:
                _write(cast("BinaryIO", process.stdin), data)
                answer = _read(cast("BinaryIO", process.stdout), time.monotonic() + seconds)
            except BaseException:
                # Whatever happened, the next answer in the pipe would belong to this question.
                self.stop()
                raise
            if answer is None:
                late = process.poll() is None
                self.stop()
                reason = f"did not finish within {seconds:g} s" if late else f"needed more than {_MEMORY >> 20} MiB"
                raise Refused(f"the chat template {reason}; it loops or repeats too much, use another template")
        return cast("dict[str, Any]", json.loads(answer))

    def stop(self) -> None:
        """Kill the child, if there is one."""
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            for pipe in (process.stdin, process.stdout):
                try:
                    cast("BinaryIO", pipe).close()
                except BrokenPipeError:
                    continue
            process.wait()

    def _start(self) -> subprocess.Popen[bytes]:
        self.stop()
        self._process = process = subprocess.Popen(
            [sys.executable, "-m", "truekv.serve.template"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=0
        )
        # The start is not the template's time: the first answer says that the child is ready.
        if _read(cast("BinaryIO", process.stdout), time.monotonic() + _START_SECONDS) is None:
            self.stop()
            raise Refused("the process that renders chat templates did not start; check that Python can run jinja2")
        return process


_WORKER: Final = _Worker()
atexit.register(_WORKER.stop)


def _write(pipe: BinaryIO, data: bytes) -> None:
    view = memoryview(struct.pack("<Q", len(data)) + data)
    try:
        while view:
            view = view[pipe.write(view) or 0 :]
    except BrokenPipeError:
        return  # the read that follows finds the end of the stream


def _read(pipe: BinaryIO, until: float) -> bytes | None:
    """Read one message; None at the end of the stream or when the time is up."""
    head = _read_exactly(pipe, 8, until)
    if head is None:
        return None
    return _read_exactly(pipe, struct.unpack("<Q", head)[0], until)


def _read_exactly(pipe: BinaryIO, size: int, until: float) -> bytes | None:
    data = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while len(data) < size:
            if not selector.select(max(0.0, until - time.monotonic())):
                return None
            part = pipe.read(min(size - len(data), 1 << 16))
            if not part:
                return None
            data += part
    return bytes(data)


# ---- the child ----


def main() -> None:
    """Answer questions from stdin until it ends."""
    import resource
    import signal

    # Ctrl-C in the terminal is the parent's business; it ends this process by closing the pipe.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    source, target = cast("BinaryIO", sys.stdin.buffer), cast("BinaryIO", sys.stdout.buffer)
    _environment()
    _write(target, b"ready")
    target.flush()
    while head := source.read(8):
        question = json.loads(source.read(struct.unpack("<Q", head)[0]))
        _write(target, json.dumps(_answer(question["template"], question["variables"])).encode())
        target.flush()


def _answer(template: str, variables: dict[str, object]) -> dict[str, str]:
    """Render and return {"text": ...} or {"error": one sentence}."""
    try:
        return {"text": "".join(_limited(_compiled(template).generate(variables)))}
    except Exception as error:  # noqa: BLE001 (a template can raise anything its expressions can)
        return {"error": f"the chat template {_blame(error)}"}


def _blame(error: Exception) -> str:
    """Say what a template did wrong."""
    from jinja2 import TemplateError, TemplateSyntaxError, UndefinedError
    from jinja2.exceptions import SecurityError

    what = " ".join(str(error).split())[:300]
    match error:
        case SecurityError():
            return f"reaches for what the sandbox forbids: {what}"
        case TemplateSyntaxError():
            return f"is not valid jinja2: line {error.lineno}: {what}"
        case UndefinedError():
            return f"uses a value that these messages do not have: {what}"
        case TemplateError():
            return f"refuses these messages: {what}"
        case MemoryError():
            return f"needed more than {_MEMORY >> 20} MiB; use another template"
        case _:
            return f"failed: {type(error).__name__}: {what}"


def _limited(parts: Any) -> Any:  # noqa: ANN401 (jinja2's generator is untyped)
    size = 0
    for part in parts:
        size += len(part)
        if size > OUTPUT_BYTES:
            raise ValueError(f"it wrote more than {OUTPUT_BYTES >> 20} MiB")
        yield part


@lru_cache(maxsize=8)
def _compiled(template: str) -> jinja2.Template:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> jinja2.Environment:
    """Build the environment that chat templates are written for: Hugging Face's names, and no others."""
    from jinja2.ext import loopcontrols
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_generation_block(), loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    offered: dict[str, Any] = {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    environment.globals.update(offered)
    return environment


def _generation_block() -> type[Extension]:
    """Make the extension for {% generation %}, which marks trained spans and renders as its content."""
    from jinja2.ext import Extension

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 (jinja2 reads a class attribute)

        def parse(self, parser: Any) -> Any:  # noqa: ANN401 (jinja2's parser is untyped)
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation


def _to_json(
    value: object,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002 (the filter's public signature)
    indent: int | None = None,
    separators: Sequence[str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002 (likewise)
) -> str:
    """Write JSON as templates expect it: not escaped for HTML, which jinja2's own filter does."""
    pair = (separators[0], separators[1]) if separators else None
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=pair, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    import jinja2

    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now(UTC).astimezone().strftime(pattern)


if __name__ == "__main__":
    main()
