"""Steps of many sizes on a GPU that is not there: prints how often each kernel was compiled, as JSON.

A process of its own, in which kernels are compiled and not interpreted.
"""

from __future__ import annotations

import json
import os
import sys
from array import array
from collections import Counter
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "0"
sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
from kernels.native.cache import PAGE
from kernels.triton.absent import absent
from kernels.triton.launches import attend, fields, recur
from memory.toys import gdn, gqa, mamba2

from truekv.core.batch import Sequence
from truekv.kernels.triton import paged
from truekv.kernels.triton.chunks import LONG
from truekv.kernels.triton.ops import OPS
from truekv.memory.layout import lay_out


def step(rows: int, width: int, new: int = 1) -> None:
    """Store and attend to new tokens of so many rows, whose table has so many pages."""
    # As memory lays it out: parts of one tensor, at even and at odd places of it.
    sequences = [Sequence(pages=array("q", range(width)), slot=row) for row in range(rows)]
    described = lay_out([(one, width * PAGE - 5 - new, [0] * new, 0) for one in sequences], PAGE, torch.device("cpu"))
    for window in (None, 7, 16 * width):
        attend(stored, 2, described, window)
    paged.store(stored, (torch.zeros(rows * new, 2, 64).bfloat16(),) * 2, described)
    for layer in (gdn(2, 4, 64, 64), mamba2(4, 16, 2, 64)):
        recur(layer, new, 0, rows, described)()


def operations(tokens: int) -> None:
    """Work on the rows of so many tokens."""
    x, gain = torch.zeros(tokens, 4, 96).bfloat16(), torch.zeros(96)
    OPS.rms_norm(x, gain, 1e-6)
    OPS.add_norm(x[:, 0], x[:, 1], gain, 1e-6)
    OPS.norm_rotate((x, x[:, :2]), (gain, gain), 1e-6, *torch.zeros(2, tokens, 32), interleaved=False)
    OPS.gate(x, x)
    OPS.activate(x.flatten(1), "swiglu")
    OPS.largest(x.flatten(1))


stored = fields(gqa(2, 64), "int8", "int8")
with absent(90) as device:
    for rows, width in ((1, 1), (1, 40), (2, 3), (3, 16), (16, 7), (17, 32), (32, 1)):
        step(rows, width)
        # Of two tokens a row: as many query rows of a tile as of one, where two heads share a row.
        step(rows, width, 2)
    for rows, width, new in ((1, 8, LONG), (2, 9, LONG + 5), (3, 24, 10 * LONG)):
        # Long enough for chunks.
        step(rows, width, new)
    for rows in (1, 2, 3, 16, 17, 32):
        operations(rows)
    sys.stdout.write(json.dumps(Counter(kernel.name for kernel in device.compiled)))
