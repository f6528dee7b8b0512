"""Whether kernels run in Triton's interpreter, and what has to be mended there."""

from __future__ import annotations

from typing import Any, Final

import triton

_module: Any = triton
INTERPRETED: Final = bool(_module.knobs.runtime.interpret)
"""Triton decides when a kernel is defined; TRITON_INTERPRET says what."""


def mend() -> None:
    """Let loops of the interpreter end at numbers that were loaded.

    It takes int() of an array of one element, which numpy refuses since 2.4 (triton 3.6.0).
    """
    from triton.runtime import interpreter

    module: Any = interpreter
    patched = module._patch_lang_tensor  # noqa: SLF001 (there is no public way in)

    def patch(tensor: Any, scope: Any) -> None:  # noqa: ANN401 (Triton's own, untyped)
        patched(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    module._patch_lang_tensor = patch  # noqa: SLF001
