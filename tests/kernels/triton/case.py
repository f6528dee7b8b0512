"""One Triton kernel as it is compiled for one format and size, for the gate on what the compiler makes of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping


@dataclass(frozen=True, slots=True)
class Case:
    """A kernel with all that its machine code depends on."""

    name: str
    """Unique; the row of the committed table: "attend[int8] D=128 G=8"."""
    kernel: Any
    """The function that `triton.jit` returned."""
    signature: Mapping[str, str]
    """Triton's type of every argument that is not a constant: "*fp32", "i64"."""
    constexprs: Mapping[str, Any]
    """The value of every other argument."""
    num_warps: int = 4
    num_stages: int = 3
    elements: int = 0
    """Numbers of the cache or the state that one program takes in one turn of its inner loop; 0 if it has none."""
    divisible: tuple[str, ...] = field(default=())
    """Arguments that are multiples of 16, as Triton finds pointers and most strides to be at run time."""
