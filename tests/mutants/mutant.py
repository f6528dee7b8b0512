"""A mutant: one bug that somebody has shipped, put into the code for as long as a test runs."""

from __future__ import annotations

import traceback
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from truekv import Corrupted, Refused

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping
    from contextlib import AbstractContextManager

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
    given: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """What the test is called with, where it has parameters."""
    fixtures: Callable[[], AbstractContextManager[Mapping[str, Any]]] = lambda: nullcontext({})
    """What it runs in, which may give it more."""
    missing: str = ""
    """What it would take to run it here."""

    @property
    def case(self) -> tuple[object, ...]:
        """The test and its parameters."""
        return self.test, repr(self.given)

    def without(self) -> Mutant:
        """The same test with no bug."""
        return replace(self, name="", breaks="", patches=list)

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
            with self.fixtures() as more:
                given = {**self.given, **more}
                if self.test.__code__.co_argcount > len(given):
                    given["stage"] = stage
                self.test(**given)
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
        where = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        return any(where.is_relative_to(TESTS / folder) for folder in ("exact", "kernels"))
    return isinstance(error, Corrupted | Refused)
