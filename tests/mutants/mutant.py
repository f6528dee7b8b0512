"""A mutant: one bug that somebody has shipped, put into the code for as long as a test runs."""

from __future__ import annotations

import traceback
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from truekv import Corrupted, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from exact.stage import Stage

TESTS: Final = Path(__file__).parents[1]


@dataclass(frozen=True)
class Patch:
    """An attribute of a class, module or object, and what takes its place."""

    owner: Any
    name: str
    value: Any


@dataclass(frozen=True)
class Mutant:
    """A bug by name, what it breaks in one sentence, and the test that must notice."""

    name: str
    breaks: str
    test: Callable[..., None]
    patches: Callable[[], list[Patch]]

    @property
    def test_name(self) -> str:
        return f"{Path(self.test.__code__.co_filename).relative_to(TESTS)}::{self.test.__name__}"

    def run(self, stage: Stage) -> BaseException | None:
        """Run the test with the bug in the code; return how it failed, None where it did not."""
        patches = self.patches()
        originals = [Patch(patch.owner, patch.name, getattr(patch.owner, patch.name)) for patch in patches]

        inside = 0

        @contextmanager
        def apart() -> Iterator[None]:
            nonlocal inside
            inside += 1
            put(originals)
            try:
                yield
            finally:
                inside -= 1
                if not inside:
                    put(patches)

        stage.apart = apart
        put(patches)
        try:
            if self.test.__code__.co_argcount:
                self.test(stage)
            else:
                self.test()
        except Exception as error:  # noqa: BLE001 (the caller judges it)
            return error
        finally:
            put(originals)
            stage.apart = None
        return None


def put(patches: list[Patch]) -> None:
    for patch in patches:
        setattr(patch.owner, patch.name, patch.value)


def noticed(error: BaseException | None) -> bool:
    """Whether a test failed because it saw the bug: by its own assertion or by a sentence of the engine's.

    Anything else, such as a TypeError of the mutated code, would show that the mutant is no bug but nonsense.
    """
    if isinstance(error, AssertionError):
        return Path(traceback.extract_tb(error.__traceback__)[-1].filename).is_relative_to(TESTS / "exact")
    return isinstance(error, Corrupted | Refused)
