"""Whether a step is being recorded: what it reads on the host meanwhile, its replays would never read again."""

from __future__ import annotations

from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Generator

_recording: Final = ContextVar("recording", default=False)


def is_recording() -> bool:
    """Whether checks that would stop the step on the host are to be left out, because a replay cannot stop."""
    return _recording.get()


@contextmanager
def recording() -> Generator[None]:
    """Record whatever runs inside the block."""
    token = _recording.set(True)
    try:
        yield
    finally:
        _recording.reset(token)
