"""Run tests on another build of the native library: python tools/other_library.py FOLDER [PYTEST ...].

`make sanitize` and `make amx` do. For one built with -DSANITIZE=ON the process must be started with libasan preloaded.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import truekv.kernels.native as package
from truekv.kernels.native.library import library


def main() -> int:
    """Put the folder first where the library is looked for, and run pytest."""
    folder, *arguments = sys.argv[1:]
    package.__path__.insert(0, str(Path(folder).resolve()))
    found = library()
    if found is None or not found.path.is_relative_to(Path(folder).resolve()):
        sys.exit(f"{folder} holds no native library: build it there first")
    found.isa = found.isas[-1]
    return pytest.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
