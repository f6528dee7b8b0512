"""The tensors of a checkpoint's files, read one at a time."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Final, Self, cast

from truekv.core.errors import Corrupted
from truekv.core.lazy import torch
from truekv.core.untouched import untouched
from truekv.models.headers import quoted

if TYPE_CHECKING:
    from collections.abc import Callable
    from io import FileIO
    from pathlib import Path
    from types import TracebackType

    from rich.progress import Progress

    from truekv.models.headers import TensorHeader

LOADABLE: Final = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
"""What a forward pass can use as it is, converted to the compute dtype and never dequantized; torch's names."""
PATIENCE_SECONDS: Final = 2.0
_LARGE: Final = 1 << 18
_AT_ONCE: Final = 1 << 30
"""Bytes asked of the system in one read, which returns at most 2 GiB."""


class StoredTensors(Mapping[str, "torch.Tensor"]):
    """Tensors by name, each read from its file, converted and checked whenever it is looked up.

    Nothing of the files is kept or mapped, so whoever lets go of one tensor before the next needs no more
    memory than what it makes of them, and a file that shrinks later is an error and not the end of the process.
    """

    def __init__(
        self,
        directory: Path,
        headers: Mapping[str, TensorHeader],
        dtype: Callable[[str], torch.dtype],
        device: torch.device | str,
    ) -> None:
        """Read nothing yet; `dtype` says what a tensor of a name becomes, `device` where it goes."""
        self._directory = directory
        self._headers = headers
        self._dtype = dtype
        self._device = device
        self._files: dict[str, FileIO] = {}
        self._began = time.monotonic()
        self._done = 0
        self._bar: Progress | None = None

    def __enter__(self) -> Self:
        """Use it."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close the files, and remove the bar."""
        for file in self._files.values():
            file.close()
        self._files.clear()
        if self._bar:
            self._bar.stop()

    def __iter__(self) -> Iterator[str]:
        """Iterate over the names."""
        return iter(self._headers)

    def __len__(self) -> int:
        """Count the tensors."""
        return len(self._headers)

    def __getitem__(self, name: str) -> torch.Tensor:
        """Read one. Raises Corrupted when it holds NaN or infinity, or cannot be read any more."""
        header = self._headers[name]
        path = self._directory / header.file
        try:
            stored = self._read(header)
        except OSError as error:
            raise Corrupted(f"{path} cannot be read any more ({error}); download it again") from None
        tensor = stored.to(self._device, self._dtype(name))
        if tensor.numel() and not bool(torch.isfinite(torch.stack(torch.aminmax(tensor))).all()):
            raise Corrupted(f"{self._directory}: weight {quoted(name)} holds NaN or infinity; download it again")
        self._done += header.end - header.start
        self._show()
        return tensor

    def _read(self, header: TensorHeader) -> torch.Tensor:
        size = header.end - header.start
        # What is read and let go of again lies in mappings of its own: holes that it left in the heap would stay.
        data = (
            untouched((size,), torch.uint8, "cpu", piece=1) if size >= _LARGE else torch.empty(size, dtype=torch.uint8)
        )
        if header.file not in self._files:
            self._files[header.file] = (self._directory / header.file).open("rb", buffering=0)
        file = self._files[header.file]
        file.seek(header.start)
        view, at = memoryview(cast("bytearray", data.numpy())), 0
        while at < size:
            count = file.readinto(view[at : at + _AT_ONCE])
            if not count:
                raise OSError(f"it ends at byte {header.start + at}")
            at += count
        dtype = getattr(torch, LOADABLE[header.dtype])
        return data.view(dtype).view(header.shape)

    def _show(self) -> None:
        """Show a bar on a terminal when reading takes longer than one likes to wait."""
        if self._bar is None:
            if time.monotonic() - self._began < PATIENCE_SECONDS or not sys.stderr.isatty():
                return
            from rich.console import Console
            from rich.progress import Progress

            self._bar = Progress(console=Console(stderr=True), transient=True)
            total = sum(header.end - header.start for header in self._headers.values())
            self._bar.add_task("loading weights", total=total)
            self._bar.start()
        self._bar.update(self._bar.task_ids[0], completed=self._done)
