from __future__ import annotations

import struct

import pytest
from bench.engines.llama_state import lengthened


def state(cells: int, *, streams: int = 1, wide: bool = False, values: bool = True, tail: bytes = b"") -> bytes:
    """Lay out what llama.cpp saves: rows of 4 bytes for keys and 2 for values, in two layers."""
    out = struct.pack("<IiII", 0xAF143CD8, 0, streams, cells)
    for position in range(cells):
        out += struct.pack("<iI", position, 1)
        out += struct.pack("<iii", position, position, 7) if wide else b""
        out += struct.pack("<i", 0)
    out += struct.pack("<II", 0, 2)
    for width in (4, 4, *((2, 2) if values else ())):
        out += struct.pack("<iQ", 8, width) + b"".join(bytes([65 + cell] * width) for cell in range(cells))
    return out + struct.pack("<I", 0) * (streams - 1) + tail


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("values", [False, True])
@pytest.mark.parametrize("streams", [1, 3])
def test_a_saved_sequence_cut_to_its_own_length_is_itself(wide: bool, values: bool, streams: int) -> None:
    saved = state(4, wide=wide, values=values, streams=streams)
    assert bytes(lengthened(saved, 4, values=values)) == saved


@pytest.mark.parametrize("depth", [1, 3, 4, 9])
def test_rows_are_repeated_and_positions_go_on(depth: int) -> None:
    tail = struct.pack("<IiI", 1, 3, 0) + b"state"
    out = bytes(lengthened(state(4, wide=True, tail=tail), depth, values=True))
    assert struct.unpack_from("<I", out, 12) == (depth,)
    assert [struct.unpack_from("<iIii", out, 16 + 24 * cell) for cell in range(depth)] == [
        (cell, 1, cell, cell) for cell in range(depth)
    ]
    rows = 16 + 24 * depth + 8 + 12
    assert out[rows : rows + 4 * depth] == b"".join(bytes([65 + cell % 4] * 4) for cell in range(depth))
    assert out.endswith(struct.pack("<IiI", 1, depth - 1, 0) + b"state")


def test_what_is_not_understood_is_refused() -> None:
    with pytest.raises(RuntimeError, match="not one recurrent state"):
        lengthened(state(4, tail=b"something else in here"), 8, values=True)
