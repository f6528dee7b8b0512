"""A function recorded once as a list of launches on fixed buffers, to be replayed when their contents have changed.

This is what a CUDA graph is, launch by launch and on any device: addresses are fixed, and whatever the host
decided while it was recorded (a length it read, a branch it took) stays decided. A forward that is not a function
of its Step's tensors alone therefore shows here, without a GPU.
"""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, Final, Protocol, TypeAlias, cast

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.recording import recording
from truekv.kernels.native.library import Calls, library

if TYPE_CHECKING:
    from collections.abc import Callable

    from truekv.kernels.native.library import NativeCall

_EMPTY: Final = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"})
_COPIES: Final = frozenset({"clone", "_to_copy"})
_CONSTANTS: Final = frozenset(
    {"arange", "full", "zeros", "ones", "full_like", "zeros_like", "ones_like", "new_full", "new_zeros", "new_ones"}
)
_HOST_READS: Final = frozenset({"data_dependent_output", "dynamic_output_shape"})


class Replayable(Protocol):
    """A recorded function."""

    @property
    def host_reads(self) -> tuple[str, ...]:
        """Operations by which the host read a number or a size that depends on data: a replay will not."""
        ...

    @property
    def output(self) -> torch.Tensor:
        """What `replay` returns."""
        ...

    def replay(self) -> torch.Tensor:
        """Run it on what its buffers hold now; the tensor returned is overwritten by the next replay."""
        ...


Recorder: TypeAlias = "Callable[[Callable[[], torch.Tensor]], Replayable]"


def recorder(device: torch.device) -> Recorder:
    """Return what records functions on a device; all of them share their memory."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            return functools.partial(CudaRecording, pool=torch.cuda.graph_pool_handle(), aside=torch.cuda.Stream())
    return functools.partial(Recording, pool=Pool())


class Pool:
    """Memory that recordings share, as only one of them runs at a time.

    What a recorded function has let go of, its later tensors and other recordings take, so that
    all of them together need about as much as the largest alone, and a step finds it in the caches.
    """

    def __init__(self) -> None:
        """Start without any."""
        self.nbytes = 0
        """Of all blocks."""
        self._free: dict[int, list[torch.Tensor]] = defaultdict(list)

    def like(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a tensor of the same kind whose memory comes back once no tensor uses it."""
        if not tensor.nbytes or tensor.device.type != "cpu" or not tensor.is_contiguous():
            return tensor
        size = max(64, 1 << (tensor.nbytes - 1).bit_length())
        free = self._free[size]
        block = free.pop() if free else self._block(size)
        # The tensor owns the window, and the window's end gives the block back.
        window = (ctypes.c_char * tensor.nbytes).from_address(block.data_ptr())
        weakref.finalize(window, free.append, block).atexit = False
        return torch.frombuffer(window, dtype=tensor.dtype).view(tensor.shape)

    def _block(self, size: int) -> torch.Tensor:
        self.nbytes += size
        return torch.empty(size, dtype=torch.uint8)


class Recording:
    """A function recorded launch by launch; what it reads and writes must stay where it is."""

    def __init__(self, function: Callable[[], torch.Tensor], pool: Pool | None = None) -> None:
        """Run `function` once; the run is real: whatever it writes is written."""
        pool = pool or Pool()
        # Native calls know addresses only: what lies there is kept by whoever owned it while they were recorded.
        self._owners = (function, pool)
        witness = _Witness(pool)
        # Inference mode would show `if tensor:` as one operation of many names; without it, all reads look alike.
        with torch.inference_mode(mode=False), torch.no_grad(), recording():
            self.output = witness.run(function)
        self._launches = _joined(witness.launches)
        self.host_reads = tuple(witness.host_reads)

    def replay(self) -> torch.Tensor:
        """See Replayable."""
        for launch in self._launches:
            launch()
        return self.output


class CudaRecording:
    """The same as one CUDA graph. Graphs of one pool overwrite one another's tensors, so take the output at once."""

    def __init__(
        self,
        function: Callable[[], torch.Tensor],
        pool: Any = None,  # noqa: ANN401 (torch keeps the type to itself)
        aside: torch.cuda.Stream | None = None,
    ) -> None:
        """Run `function` once on a stream aside and capture it; the first run is real, the capture only looks on.

        The first run compiles and loads every kernel and makes the libraries' workspaces, none of which a
        capture may do. Raises Refused for a function that waits for the device, which CUDA does not capture.
        """
        self.host_reads: tuple[str, ...] = ()
        # What the graph reads must stay where it is.
        self._function = function
        self._graph = torch.cuda.CUDAGraph()
        aside = aside or torch.cuda.Stream()
        with torch.cuda.device(aside.device), _stream_kept(), torch.inference_mode(), recording():
            aside.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(aside):
                function()
            torch.cuda.current_stream().wait_stream(aside)
            # An error of the warm-up would otherwise show in the capture.
            torch.cuda.synchronize()
            try:
                # Other threads may go on using the device: what they do is no part of this stream. It is that of the
                # first run, for which the libraries have their workspaces.
                with torch.cuda.graph(self._graph, pool=pool, stream=aside, capture_error_mode="thread_local"):
                    self.output = function()
            except torch.OutOfMemoryError:
                raise
            except RuntimeError as error:
                # A capture that had no room may end with an error of its own.
                if isinstance(error.__context__, torch.OutOfMemoryError):
                    raise error.__context__ from None
                reason = next(iter(str(error).splitlines()), "no reason given")
                raise Refused(
                    f"a step of this model cannot be captured as a CUDA graph ({reason[:200]}); turn capture off, or "
                    "use the triton kernels"
                ) from error

    def replay(self) -> torch.Tensor:
        """See Replayable."""
        self._graph.replay()
        return self.output


def _stream_kept() -> Any:  # noqa: ANN401 (torch's own, untyped)
    """Return to the current stream afterwards: a capture that fails does not leave its own."""
    return torch.cuda.stream(torch.cuda.current_stream())


class _Witness:
    """Sees every launch with its operands."""

    def __init__(self, pool: Pool) -> None:
        self.launches: list[NativeCall | Callable[[], object]] = []
        self.host_reads: list[str] = []
        self._pool = pool

    def run(self, function: Callable[[], torch.Tensor]) -> torch.Tensor:
        from torch.utils._python_dispatch import TorchDispatchMode

        seen = self._seen

        class Mode(TorchDispatchMode):
            @classmethod
            def _should_skip_dynamo(cls) -> bool:
                # There is none to skip, and saying so would import its 100 MiB.
                return False

            def __torch_dispatch__(  # torch's own interface, hence the names and the lack of types
                self,
                func: Any,  # noqa: ANN401
                types: Any,  # noqa: ANN401
                args: Any = (),  # noqa: ANN401
                kwargs: Any = None,  # noqa: ANN401
            ) -> Any:  # noqa: ANN401
                return seen(func, args, kwargs or {})

        native = library()
        # torch does not see the calls of native kernels, so the library reports them itself.
        with Mode(), native.recorded(self.launches.append) if native else nullcontext():
            return function()

    def _seen(self, func: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Any:  # noqa: ANN401
        name = func.overloadpacket.__name__
        if _reads_on_host(name, func, args):
            self.host_reads.append(name)
        produced = func(*args, **options)
        if name in _EMPTY:
            return self._pool.like(produced)
        results = _tensors(produced)
        mutable = func._schema.is_mutable  # noqa: SLF001 (torch offers no other way)
        if mutable:
            self.launches.append(functools.partial(func, *args, **options))
        # A view computes nothing, and a number read by the host is not read again.
        elif results and not _shares_memory(results, args):
            self.launches.append(_again(name, func, args, options, results))
        return produced


def _reads_on_host(name: str, func: Any, args: tuple[Any, ...]) -> bool:  # noqa: ANN401
    # An index gathers, unless it is a mask, whose size only the host can find out.
    if name == "index":
        return any(index.dtype in {torch.bool, torch.uint8} for index in _tensors(args[1]))
    return any(tag.name in _HOST_READS for tag in func.tags)


def _again(
    name: str,
    func: Any,  # noqa: ANN401 (an operation has no public type)
    args: tuple[Any, ...],
    options: dict[str, Any],
    buffers: list[torch.Tensor],
) -> Callable[[], object]:
    """Return the operation as one that writes into the buffers that its first run made."""
    if name in _COPIES:
        return functools.partial(buffers[0].copy_, args[0])
    if name in _CONSTANTS:
        # Somebody may have written to it since.
        return functools.partial(buffers[0].copy_, buffers[0].clone())

    if (into := _writing(func)) and len(buffers) == 1:
        return functools.partial(into, *args, **options, out=buffers[0])

    def launch() -> None:
        for buffer, result in zip(buffers, _tensors(func(*args, **options)), strict=True):
            buffer.copy_(result)

    return launch


@functools.cache
def _writing(func: Any) -> Any:  # noqa: ANN401
    """Return the overload of an operation that takes the same arguments and where to write its result; None without."""
    packet = func.overloadpacket
    asked = [(argument.name, str(argument.type)) for argument in func._schema.arguments]  # noqa: SLF001
    for overload in (getattr(packet, name) for name in packet.overloads()):
        taken = [(argument.name, str(argument.type)) for argument in overload._schema.arguments]  # noqa: SLF001
        if taken == [*asked, ("out", "Tensor")]:
            return overload
    return None


def _joined(launches: list[NativeCall | Callable[[], object]]) -> list[Callable[[], object]]:
    """Join native calls that follow one another to one."""
    joined: list[Callable[[], object]] = []
    calls: list[NativeCall] = []
    for launch in [*launches, None]:
        if isinstance(launch, tuple):
            calls.append(cast("NativeCall", launch))
            continue
        if calls:
            joined.append(Calls(calls))
            calls = []
        if launch is not None:
            joined.append(launch)
    return joined


def _tensors(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    items = cast("tuple[object, ...] | list[object]", value) if isinstance(value, tuple | list) else ()
    return [item for item in items if isinstance(item, torch.Tensor)]


def _shares_memory(results: list[torch.Tensor], arguments: tuple[Any, ...]) -> bool:
    held = {tensor.untyped_storage().data_ptr() for argument in arguments for tensor in _tensors(argument)}
    return any(result.untyped_storage().data_ptr() in held for result in results)
