"""A saved sequence of llama.cpp, made longer by repeating its rows."""

from __future__ import annotations

import struct


def lengthened(saved: bytes, depth: int, *, values: bool) -> bytearray:
    """Repeat the rows of a saved sequence up to `depth` cells.

    The layout is llama.cpp's (llama-kv-cache.cpp, state_write): magic, sequence id, number of streams; then the
    number of cells, of each cell position, number of sequences, the optional two-dimensional position and token,
    sequence; then whether values are transposed, and of each layer type, bytes of a row, rows: keys of all layers,
    then values. The other streams have no cells. What follows (the recurrent states of a hybrid, with a position
    of their own) stays as it is.
    """
    head, streams, count = saved[:8], *struct.unpack_from("<II", saved, 8)
    # The second cell starts with position 1 and one sequence, 12 or 24 bytes after the first.
    width = next(size for size in (12, 24) if struct.unpack_from("<iI", saved, 16 + size) == (1, 1))
    cell = saved[24 : 16 + width]
    out = bytearray(head + struct.pack("<II", streams, depth))
    for position in range(depth):
        # A text token's two-dimensional position is its position, twice.
        places = struct.pack("<ii", position, position) + cell[8:] if width == 24 else cell
        out += struct.pack("<iI", position, 1) + places
    at = 16 + width * count
    transposed, layers = struct.unpack_from("<II", saved, at)
    if transposed:
        raise RuntimeError("the saved values are transposed; turn flash attention on")
    out += saved[at : at + 8]
    at += 8
    for _ in range(layers * (1 + values)):
        _kind, row = struct.unpack_from("<iQ", saved, at)
        rows = saved[at + 12 : at + 12 + row * count]
        out += saved[at : at + 12]
        whole, rest = divmod(depth, count)
        out += rows * whole + rows[: rest * row]
        at += 12 + row * count
    out += saved[at : at + 4 * (streams - 1)]
    tail = bytearray(saved[at + 4 * (streams - 1) :])
    if tail:
        # A recurrent state: one cell, its position, no list of sequences.
        if struct.unpack_from("<IiI", tail) != (1, count - 1, 0):
            raise RuntimeError("what follows the rows is not one recurrent state")
        struct.pack_into("<i", tail, 4, depth - 1)
    return out + tail
