"""Every instruction set of this machine in turn."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from collections.abc import Iterator

_LIBRARY = library()


@pytest.fixture(params=_LIBRARY.isas if _LIBRARY else ())
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """Run a test with the kernels of each."""
    assert _LIBRARY is not None
    with _LIBRARY.using(request.param):
        yield request.param
