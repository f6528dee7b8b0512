"""Capture: a step recorded once as a list of launches on static buffers, and replayed with other contents.

This is what a CUDA graph is, executed launch by launch on any device: addresses are fixed, and
whatever the host decided while it was recorded (a length it read, a branch it took) stays decided.
A forward that is not a function of its Step's tensors alone therefore shows here, without a GPU.
"""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, cast

from truekv.core.batch import Step
from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.native.library import library

if TYPE_CHECKING:
    from collections.abc import Callable

_Launch = tuple[Any, tuple[Any, ...], dict[str, Any], "list[torch.Tensor]"]


class Captured:
    """A function of a Step, recorded for the shapes of one Step."""

    def __init__(self, function: Callable[[Step], torch.Tensor], step: Step) -> None:
        """Run `function` once on buffers that hold `step`, recording every launch.

        The run is real: whatever it writes to memory is written, so give it a scratch sequence.
        """
        self._step = Step(**{name: tensor.clone() for name, tensor in _fields(step)})
        with torch.inference_mode():
            self._launches, self._output = _record(function, self._step)

    def __call__(self, step: Step) -> torch.Tensor:
        """Replay with another step's contents; Refused when a shape is not the recorded one."""
        with torch.inference_mode():
            for (name, buffer), (_, value) in zip(_fields(self._step), _fields(step), strict=True):
                if buffer.shape != value.shape:
                    raise Refused(
                        f"a captured step takes '{name}' of shape {tuple(buffer.shape)}, not {tuple(value.shape)}; "
                        "pad the step or capture one of its size"
                    )
                buffer.copy_(value)
            for operation, arguments, options, buffers in self._launches:
                produced = operation(*arguments, **options)
                for buffer, result in zip(buffers, _tensors(produced), strict=True):
                    # An operation in place already wrote to its buffer.
                    if buffer is not result:
                        buffer.copy_(result)
            return self._output.clone()


def _record(function: Callable[[Step], torch.Tensor], step: Step) -> tuple[list[_Launch], torch.Tensor]:
    from torch.utils._python_dispatch import TorchDispatchMode

    launches: list[_Launch] = []

    class Recorder(TorchDispatchMode):
        """Sees every launch with its operands."""

        def __torch_dispatch__(  # torch's own interface, hence the names and the lack of types
            self,
            func: Any,  # noqa: ANN401
            types: Any,  # noqa: ANN401
            args: Any = (),  # noqa: ANN401
            kwargs: Any = None,  # noqa: ANN401
        ) -> Any:  # noqa: ANN401
            produced = func(*args, **(kwargs or {}))
            results = _tensors(produced)
            # A view computes nothing, and a number read by the host is not read again.
            if results and not (_shares_memory(results, args) and not func._schema.is_mutable):  # noqa: SLF001 (torch offers no other way)
                launches.append((func, args, kwargs or {}, results))
            return produced

    native = library()
    # torch does not see the calls of native kernels, so the library reports them itself.
    calls = native.recorded(lambda call: launches.append((call, (), {}, []))) if native else nullcontext()
    with Recorder(), calls:
        output = function(step)
    return launches, output


def _fields(step: Step) -> list[tuple[str, torch.Tensor]]:
    return [(field.name, getattr(step, field.name)) for field in dataclasses.fields(step)]


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = cast("tuple[object, ...] | list[object]", value) if isinstance(value, tuple | list) else ()
    return [item for item in items if isinstance(item, torch.Tensor)]


def _shares_memory(results: list[torch.Tensor], arguments: tuple[Any, ...]) -> bool:
    held = {tensor.untyped_storage().data_ptr() for argument in arguments for tensor in _tensors(argument)}
    return any(result.untyped_storage().data_ptr() in held for result in results)
