"""A progress bar for people who wait: only on a terminal, only after two seconds, only on stderr."""

from __future__ import annotations

import sys
import threading
from typing import TYPE_CHECKING, Final, Self

if TYPE_CHECKING:
    from types import TracebackType

    from rich.progress import Progress

PATIENCE_SECONDS: Final = 2.0


class Bar:
    """A context manager; `update` may be called as often as one likes."""

    def __init__(self, title: str) -> None:
        """`title`: what is being done, in a few words."""
        self._title = title
        self._lock = threading.Lock()
        self._closed = False
        self._shown: Progress | None = None
        self._timer = threading.Timer(PATIENCE_SECONDS, self._show)
        self._timer.daemon = True
        self._done, self._total = 0, 0

    def __enter__(self) -> Self:
        """Start to wait."""
        if sys.stderr.isatty():
            self._timer.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the bar."""
        self.close()

    def close(self) -> None:
        """Remove the bar, for good."""
        self._timer.cancel()
        with self._lock:
            self._closed = True
            if self._shown:
                self._shown.stop()
                self._shown = None

    def update(self, done: int, total: int) -> None:
        """Say how far it is."""
        with self._lock:
            self._done, self._total = done, total
            if self._shown:
                self._shown.update(self._shown.task_ids[0], completed=done, total=total)

    def _show(self) -> None:
        from rich.console import Console
        from rich.progress import Progress

        with self._lock:
            if not self._closed:
                self._shown = Progress(console=Console(stderr=True), transient=True)
                self._shown.add_task(self._title, completed=self._done, total=self._total or None)
                self._shown.start()
