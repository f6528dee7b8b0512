"""llama.cpp through the plain C functions of llama-cpp-python; runs in the environment of `make bench-peer`.

A deep cache is a saved one: 512 tokens are prefilled and saved, the saved rows are repeated up to the depth,
and restored. So every row is one that llama.cpp encoded itself, in memory of its own.
"""

from __future__ import annotations

import ctypes
import sys
import time
from importlib import import_module
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from bench.engines.llama_state import lengthened
from bench.wire import serve, some_prompt, some_token

if TYPE_CHECKING:
    from collections.abc import Sequence

# Not a name that type checkers can follow: it is installed in the peer's environment alone.
llama: Final = import_module("llama_cpp")
SAMPLE: Final = 512
UBATCH: Final = 512
_DATA_TOO: Final = True
_LOG_ERROR: Final = 4
TYPES: Final = {"f16": 1, "q8_0": 8, "q4_0": 2}  # enum ggml_type


class Llama:
    """Implements bench.wire.Engine and Serving."""

    def __init__(self, model: Any, context: Any, sequences: int, *, values: bool) -> None:  # noqa: ANN401 (ctypes)
        """Take a loaded model; `values`: whether its cache stores values beside keys (MLA does not)."""
        self._context = context
        self._vocabulary = llama.llama_vocab_n_tokens(llama.llama_model_get_vocab(model))
        self._memory = llama.llama_get_memory(context)
        self._batch = llama.llama_batch_init(max(UBATCH, sequences), 0, 1)
        self._values = values
        self._saved = b""
        self._depth = 0
        self._sequences = 0

    def fill(self, depth: int, sequences: int) -> None:
        """See bench.wire.Engine."""
        llama.llama_memory_clear(self._memory, _DATA_TOO)
        self._depth, self._sequences = depth, sequences
        if not depth:
            return
        if not self._saved:
            self._run([0] * SAMPLE, range(SAMPLE), [some_token(place) for place in range(SAMPLE)], [SAMPLE - 1])
            size = llama.llama_state_seq_get_size(self._context, 0)
            buffer = (ctypes.c_uint8 * size)()
            if llama.llama_state_seq_get_data(self._context, buffer, size, 0) != size:
                raise RuntimeError("llama.cpp did not save its state")
            self._saved = bytes(buffer)
            llama.llama_memory_clear(self._memory, _DATA_TOO)
        deep = lengthened(self._saved, depth, values=self._values)
        for sequence in range(sequences):
            buffer = (ctypes.c_uint8 * len(deep)).from_buffer(deep)
            if not llama.llama_state_seq_set_data(self._context, buffer, len(deep), sequence):
                raise RuntimeError(f"llama.cpp did not restore a state of {depth} tokens")
            if (last := llama.llama_memory_seq_pos_max(self._memory, sequence)) != depth - 1:
                raise RuntimeError(f"llama.cpp restored a state up to position {last}, not {depth - 1}")
            del buffer

    def decode(self, steps: int) -> list[float]:
        """See bench.wire.Engine."""
        tokens = [some_token(index) for index in range(self._sequences)]
        owners = list(range(self._sequences))
        times: list[float] = []
        for _ in range(steps):
            start = time.perf_counter()
            tokens = self._run(owners, [self._depth] * self._sequences, tokens, owners)
            self._depth += 1
            times.append(time.perf_counter() - start)
        return times

    def batch(self, sequences: int, prompt: int, answer: int) -> tuple[float, float]:
        """See bench.wire.Serving; as llama-batched-bench does it."""
        self.fill(0, sequences)
        prompts = [some_prompt(request, prompt) for request in range(sequences)]
        rows = [(owner, place, token) for owner, tokens in enumerate(prompts) for place, token in enumerate(tokens)]
        owners = list(range(sequences))
        start = time.perf_counter()
        newest: list[int] = []
        for first in range(0, len(rows), UBATCH):
            part = rows[first : first + UBATCH]
            owned, places, tokens = zip(*part, strict=True)
            last = [row for row, (_, place, _) in enumerate(part) if place == prompt - 1]
            newest += self._run(owned, places, tokens, last)
        middle = time.perf_counter()
        # The first token of each answer came with its prompt.
        for place in range(prompt, prompt + answer - 1):
            newest = self._run(owners, [place] * sequences, newest, owners)
        return middle - start, time.perf_counter() - middle

    def deep(self, sequences: int, depth: int, answer: int) -> float:
        """See bench.wire.Serving."""
        self.fill(depth, sequences)
        self.decode(1)
        return sum(self.decode(answer))

    def append(self, tokens: int) -> float:
        """See bench.wire.Engine."""
        start = time.perf_counter()
        for first in range(0, tokens, UBATCH):
            size = min(UBATCH, tokens - first)
            positions = [self._depth + place for place in range(size)]
            self._run([0] * size, positions, [some_token(first + place) for place in range(size)], [size - 1])
            self._depth += size
        return time.perf_counter() - start

    def logits(self) -> list[float]:
        """See bench.wire.Engine."""
        return self._logits(-1).tolist()

    def _run(
        self, owners: Sequence[int], positions: Sequence[int], tokens: Sequence[int], wanted: Sequence[int]
    ) -> list[int]:
        """Decode one batch; return the greedy next token of the rows that are wanted."""
        batch = self._batch
        batch.n_tokens = len(tokens)
        for row, (owner, position, token) in enumerate(zip(owners, positions, tokens, strict=True)):
            batch.token[row], batch.pos[row] = token, position
            batch.n_seq_id[row], batch.seq_id[row][0] = 1, owner
            batch.logits[row] = False
        for row in wanted:
            batch.logits[row] = True
        if (code := llama.llama_decode(self._context, batch)) != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return [self._greedy(row) for row in wanted]

    def _greedy(self, row: int) -> int:
        return int(self._logits(row).argmax())

    def _logits(self, row: int) -> np.ndarray[Any, np.dtype[np.float32]]:
        return np.ctypeslib.as_array(llama.llama_get_logits_ith(self._context, row), (self._vocabulary,))


@llama.llama_log_callback
def _errors_alone(level: int, text: bytes, _data: object) -> None:
    if level == _LOG_ERROR:
        sys.stderr.write(text.decode(errors="replace"))


def start(model: str, kv: str, context: int, sequences: int, threads: int, values: int) -> tuple[Llama, str]:
    """Load a GGUF file with flash attention and rows of one type, for so many sequences of `context` tokens."""
    llama.llama_log_set(_errors_alone, None)
    llama.llama_backend_init()
    parameters = llama.llama_model_default_params()
    parameters.n_gpu_layers = 0
    loaded = llama.llama_model_load_from_file(model.encode(), parameters)
    if not loaded:
        raise RuntimeError(f"llama.cpp cannot load {model}")
    asked = llama.llama_context_default_params()
    asked.n_ctx = max(context, SAMPLE) * sequences
    asked.n_batch = asked.n_ubatch = max(UBATCH, sequences)
    asked.n_seq_max = sequences
    asked.n_threads = asked.n_threads_batch = threads
    asked.flash_attn_type = 1
    asked.type_k = asked.type_v = TYPES[kv]
    opened = llama.llama_init_from_model(loaded, asked)
    if not opened:
        raise RuntimeError(f"llama.cpp cannot make a context of {kv} rows for {model}")
    return Llama(loaded, opened, sequences, values=bool(values)), f"llama-cpp-python {llama.__version__}"


if __name__ == "__main__":
    serve(start)
