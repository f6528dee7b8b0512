"""transformers with sdpa and its own bf16 cache, whose rows are set to random tensors of the depth asked for."""

from __future__ import annotations

import time
from typing import Any, cast

from bench.wire import serve, some_token
from truekv.core.lazy import torch


class Transformers:
    """Implements bench.wire.Engine."""

    def __init__(self, model: Any) -> None:  # noqa: ANN401 (any causal model)
        """Take a loaded model."""
        self._model = model
        self._past: Any = None
        self._sequences = 0
        self._logits_V = torch.empty(0)

    def fill(self, depth: int, sequences: int) -> None:
        """See bench.wire.Engine."""
        self._past, self._sequences = None, sequences
        if not depth:
            return
        self._run(torch.full((sequences, 4), some_token(0)))
        for layer in self._past.layers:
            if isinstance(getattr(layer, "keys", None), torch.Tensor):
                batch, heads, _short, dim = layer.keys.shape
                layer.keys = torch.randn(batch, heads, depth, dim, dtype=layer.keys.dtype)
                layer.values = torch.randn(*layer.keys.shape[:3], layer.values.shape[-1], dtype=layer.values.dtype)

    def decode(self, steps: int) -> list[float]:
        """See bench.wire.Engine."""
        tokens_B1 = torch.full((self._sequences, 1), some_token(0))
        times: list[float] = []
        for _ in range(steps):
            start = time.perf_counter()
            tokens_B1 = self._run(tokens_B1)
            times.append(time.perf_counter() - start)
        return times

    def append(self, tokens: int) -> float:
        """See bench.wire.Engine."""
        start = time.perf_counter()
        self._run(torch.tensor([[some_token(place) for place in range(tokens)]]))
        return time.perf_counter() - start

    def logits(self) -> list[float]:
        """See bench.wire.Engine."""
        return cast("list[float]", self._logits_V.float().tolist())

    def _run(self, tokens_BT: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            out = self._model(input_ids=tokens_BT, past_key_values=self._past, use_cache=True, logits_to_keep=1)
        self._past = out.past_key_values
        self._logits_V = out.logits[-1, -1]
        return out.logits[:, -1].argmax(-1, keepdim=True)


def start(model: str, threads: int) -> tuple[Transformers, str]:
    """Load a checkpoint directory in bf16."""
    import transformers

    torch.set_num_threads(threads)
    loaded: Any = transformers.AutoModelForCausalLM.from_pretrained(
        model, dtype=torch.bfloat16, attn_implementation="sdpa"
    )
    return Transformers(loaded.eval()), f"transformers {transformers.__version__}"


if __name__ == "__main__":
    serve(start)
