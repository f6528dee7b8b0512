"""Drawing tokens by the native library, all rows in one call: see native/sample.cpp."""

from __future__ import annotations

import ctypes
import math
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.kernels.native.library import run

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.sampling import Draw, Sampling


class Choice(ctypes.Structure):
    """Of `sample` in native/sample.cpp: one row."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("temperature", ctypes.c_double),
        ("top_p", ctypes.c_double),
        ("floor", ctypes.c_double),
        ("point", ctypes.c_double),
        ("top_k", ctypes.c_int64),
    )


class Sample(ctypes.Structure):
    """Of `sample` in native/sample.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("choices", "tokens", "found", "weights", "counts")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab")),
    )


class Logprobs(ctypes.Structure):
    """Of `logprobs` in native/sample.cpp."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("logits", "tokens", "logprobs", "best", "best_logprobs")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "count")),
    )


class NativeSampling:
    """The operations of core/sampling.py."""

    def draw(self, draws: Seq[Draw]) -> list[int]:
        """Draw all at once."""
        if not draws:
            return []
        vocab = len(draws[0].logits)
        # What the structures point to must outlive the call: rows may be copies.
        rows = [_row(draw.logits, vocab) for draw in draws]
        choices = (Choice * len(draws))(*map(_choice, draws, rows))
        tokens = (ctypes.c_int64 * len(draws))()
        run("sample", Sample(ctypes.addressof(choices), ctypes.addressof(tokens), rows=len(draws), vocab=vocab))
        return list(tokens)

    def candidates(self, draw: Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what `draw` chooses from."""
        vocab = len(draw.logits)
        row = _row(draw.logits, vocab)
        choice, token, count = _choice(draw, row), ctypes.c_int64(), ctypes.c_int64()
        tokens_V, weights_V = torch.empty(vocab, dtype=torch.int64), torch.empty(vocab, dtype=torch.float64)
        arguments = Sample(
            ctypes.addressof(choice),
            ctypes.addressof(token),
            tokens_V.data_ptr(),
            weights_V.data_ptr(),
            ctypes.addressof(count),
            1,
            vocab,
        )
        run("sample", arguments)
        return weights_V[: count.value], tokens_V[: count.value]

    def logprobs(
        self, logits_NV: torch.Tensor, tokens: Seq[int], count: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return log-probabilities of the tokens and of the best ones."""
        logits_NV = _readable(logits_NV)
        rows, vocab = logits_NV.shape
        count = min(count, vocab)
        tokens_N = torch.tensor(tokens, dtype=torch.int64)
        chosen_N = torch.empty(rows)
        best_NK, logprobs_NK = torch.empty(rows, count, dtype=torch.int64), torch.empty(rows, count)
        pointers = (item.data_ptr() for item in (logits_NV, tokens_N, chosen_N, best_NK, logprobs_NK))
        run("logprobs", Logprobs(*pointers, rows, vocab, count))
        return chosen_N, best_NK, logprobs_NK


def _choice(draw: Draw, row_V: torch.Tensor) -> Choice:
    floor = math.log(draw.min_p) if draw.min_p else -math.inf
    return Choice(row_V.data_ptr(), draw.temperature, draw.top_p, floor, draw.point, draw.top_k)


def _row(logits_V: torch.Tensor, vocab: int) -> torch.Tensor:
    assert len(logits_V) == vocab
    return _readable(logits_V)


def _readable(logits: torch.Tensor) -> torch.Tensor:
    """Return float32 logits that are dense."""
    if logits.dtype != torch.float32:
        raise Refused(f"native sampling takes float32 logits, not {logits.dtype}; widen them first")
    return logits.contiguous()


SAMPLING: Final[Sampling] = NativeSampling()
