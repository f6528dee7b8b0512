"""Torch, imported on first use, so that planning, help texts and refusals answer without it."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch as torch  # noqa: PLC0414 (the redundant alias marks a deliberate re-export)
else:

    class _Torch:
        """Stands for the torch module and becomes it at the first attribute read."""

        def __getattr__(self, name: str) -> object:
            import torch as module

            value = getattr(module, name)
            # Cached: the next read of this name is an ordinary attribute read.
            setattr(self, name, value)
            return value

    torch = _Torch()
