"""The kernels of this folder, compiled for rows of one kind."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Final, NamedTuple, Protocol

from truekv.core.lazy import torch
from truekv.kernels.cuda.compiler import compiled
from truekv.kernels.cuda.driver import Function
from truekv.kernels.triton.tiles import SPAN

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.kernels.cuda.driver import Argument

_FOLDER: Final = Path(__file__).parent
QUERIES: Final = 8
"""Query rows of one kv head that attend.cu takes, at most."""
LATENT, ROPE = 512, 64
"""Numbers of latent rows and of their rotary keys."""
LATENT_QUERIES: Final = 128
"""Query rows of a sequence that read latent rows, at most."""
PAGE_TOKENS: Final = 32
BITS: Final = {"kv3": 3, "kv4": 4, "int8": 8, "q4_0": 4, "q8_0": 8, "bf16": 16}
BLOCK: Final = 32
"""Numbers of a block of q4_0 and q8_0."""
_LATENT_FILES: Final = {"int8": "latent.cu", "kv4": "latent.cu", "bf16": "latent_bf16.cu"}
_WARPS: Final = 4
_RING: Final = 64
"""Tokens that latent_bf16.cu holds at a time."""


class Kind(NamedTuple):
    """What a kernel is compiled for."""

    keys: str
    """Their code: kv4, kv3, int8, q8_0 or q4_0, or of latent ones int8, kv4 or bf16."""
    dim: int
    values: str = "kv4"
    """Their code: kv4 or kv3, q8_0 or q4_0 if keys are one of these; or that of the rotary keys of latent rows."""
    tiles: int = 0
    """Of eight query rows that one block has, where rows are latent ones; else 0."""

    @property
    def file(self) -> str:
        """Where the kernel is."""
        return _LATENT_FILES[self.keys] if self.tiles else "attend.cu"

    @property
    def blocks(self) -> bool:
        """Whether rows are cut into blocks that have a scale each."""
        return self.keys in {"q8_0", "q4_0"}

    def row_bytes(self, code: str) -> int:
        """Return the bytes of the codes of a row, and of the scales of its blocks."""
        return self.dim * BITS[code] // 8 + 2 * self.blocks * (self.dim // BLOCK)

    @property
    def shared_bytes(self) -> int:
        """Of what a launch gives to each block of threads."""
        if self.keys == "bf16":
            # A ring of tokens, whose lines lie 16 bytes further apart than they are long.
            return _RING * (2 * (LATENT + ROPE) + 16)
        if not self.blocks:
            return 0
        # For each warp a page, and what blocks have of scales.
        row = self.row_bytes(self.keys) + self.row_bytes(self.values) + 2 * (self.dim // BLOCK)
        return _WARPS * PAGE_TOKENS * row

    @property
    def text(self) -> str:
        """What is compiled: what all kernels share, what some do, then the file; complaints name the line of each."""
        names = ("lanes.cu", "latents.cu" if self.tiles else "blocks.cu" if self.blocks else "codes.cu", self.file)
        return "".join(f'#line 1 "{name}"\n{(_FOLDER / name).read_text()}' for name in names)

    @property
    def definitions(self) -> dict[str, int]:
        """What the source leaves open."""
        whole = {"PAGE": PAGE_TOKENS, "SPAN": SPAN}
        if self.tiles:
            return {"TILES": self.tiles, "KEY_BITS": BITS[self.keys], **whole}
        return {"DIM": self.dim, "KEY_BITS": BITS[self.keys], "VALUE_BITS": BITS[self.values], **whole}

    def __str__(self) -> str:
        """Name the rows."""
        if self.tiles:
            return f"{8 * self.tiles} query rows of latent {self.keys} rows and {self.values} rotary keys"
        return f"heads of {self.dim}, {self.keys} keys and {self.values} values"


_THREE_BITS: Final = (("kv3", "kv3"), ("kv4", "kv3"), ("kv3", "kv4"))
# With int8 keys of 256 numbers the compiler runs out of registers.
SCALED: Final = (
    *(Kind("kv4", dim) for dim in (64, 128, 256)),
    *(Kind("int8", dim) for dim in (64, 128)),
    *(Kind(keys, dim, values) for keys, values in _THREE_BITS for dim in (128, 256)),
)
"""Of rows of which each has one scale."""
BLOCKED: Final = tuple(
    Kind(keys, dim, values)
    for keys, values in (("q8_0", "q8_0"), ("q8_0", "q4_0"), ("q4_0", "q4_0"))
    for dim in (64, 128, 256)
)
GROUPED: Final = SCALED + BLOCKED
LATENTS: Final = tuple(
    Kind(code, LATENT, rope, tiles)
    for code, rope in (("int8", "int8"), ("kv4", "int8"), ("bf16", "bf16"))
    for tiles in (2, 3)
)
KINDS: Final = GROUPED + LATENTS


class Launchable(Protocol):
    """What runs the kernel."""

    def launch(self, grid: tuple[int, int, int], arguments: Seq[Argument]) -> None:
        """Run it with as many blocks."""
        ...


@functools.cache
def load(kind: Kind, device: torch.device) -> Launchable:
    """Return the kernel of a kind on a device; Refused where it does not compile or load."""
    return Function(compiled(kind.file, kind.text, kind.definitions), "attend", device, kind.shared_bytes)


def runs_on(device: torch.device) -> bool:
    """Return whether a device is of the one kind that the kernel is written for."""
    return torch.cuda.is_available() and not torch.version.hip and torch.cuda.get_device_capability(device) == (9, 0)
