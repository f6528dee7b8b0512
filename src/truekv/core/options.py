"""What a user may ask for: how the engine runs, and how tokens are sampled."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from truekv.core.errors import Refused


@dataclass(frozen=True, slots=True, kw_only=True)
class Speculation:
    """How to guess ahead: vLLM's speculative_config. Wrong guesses cost time and change nothing else."""

    method: Literal["ngram", "mtp"] = "ngram"
    """ngram looks the last tokens up in the request's own text; mtp asks the checkpoint's prediction head."""
    num_speculative_tokens: int = 3
    """Most drafts that a step may verify: the capacity of the replay log."""
    prompt_lookup_max: int = 4
    """ngram: the longest run of tokens that is looked up."""
    prompt_lookup_min: int = 1
    """ngram: the shortest."""
    adaptive: bool = True
    """Draft as many tokens as were lately accepted, and none where guessing does not pay."""

    def __post_init__(self) -> None:
        """Refuse what no proposer could do."""
        if self.method not in {"ngram", "mtp"}:
            raise Refused(f"the speculation method is {self.method!r}, but must be ngram or mtp")
        _integer("num_speculative_tokens", self.num_speculative_tokens, 1, 64)
        _integer("prompt_lookup_max", self.prompt_lookup_max, 1, 64)
        _integer("prompt_lookup_min", self.prompt_lookup_min, 1, self.prompt_lookup_max)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineOptions:
    """How to run a model. Names are vLLM's where the meaning is the same."""

    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Compute dtype; auto is the checkpoint's (float16 checkpoints compute in float32)."""
    kv_cache_dtype: str = "auto"
    """FORMAT or K/V; auto is the checkpoint's declared format, else the compute dtype."""
    kv_cache_map: str = ""
    """Per-layer exceptions, "3=bf16,7-11=int8/kv4" (layer indices of the checkpoint)."""
    kv_cache_frames: str | None = None
    """File of measured frames (`truekv calibrate`); default: truekv/kv_cache_frames.safetensors beside the weights."""
    max_model_len: int | None = None
    """Longest context in tokens; default: what the checkpoint allows."""
    max_num_seqs: int = 8
    """Sequences that may be in memory at once."""
    max_num_batched_tokens: int = 512
    """Most new tokens in one step: the prefill chunk."""
    speculative_config: Speculation | None = None
    """How to guess ahead; None guesses nothing."""
    enable_prefix_caching: bool = True
    """Keep the rows and states of ended requests, for requests that begin alike."""
    prefix_checkpoint_interval: int = 512
    """Tokens between the recurrent states that a prompt leaves in the prefix cache: a multiple of a page."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay recorded steps; auto where that is faster than running them."""
    memory: int | None = None
    """Bytes for rows and states; default: what max_num_seqs sequences of max_model_len need."""
    kernel_backend: str = "auto"
    """auto, native or reference; auto is native where its library was built and can run every layer."""
    sentinel: bool = True
    """Look at stored rows now and then, and at answers that repeat themselves; report what is wrong."""
    debug_poison: bool = False
    """Fill free and unwritten memory with NaN so that any stale read shows."""

    @property
    def drafts(self) -> int:
        """Most drafts of one step: the capacity of the replay log."""
        return self.speculative_config.num_speculative_tokens if self.speculative_config else 0

    def __post_init__(self) -> None:
        """Refuse values that no engine could run."""
        for name in ("max_num_seqs", "max_num_batched_tokens", "prefix_checkpoint_interval"):
            _integer(name, getattr(self, name), 1, 1 << 20)
        if self.capture not in {"auto", "on", "off"}:
            raise Refused(f"capture is {self.capture!r}, but must be auto, on or off")
        for name in ("max_model_len", "memory"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, 1 << 62)


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy."""

    max_tokens: int = 256
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    seed: int | None = None
    """Same seed, same tokens; None draws one and reports it."""
    stop: tuple[str, ...] = ()
    """Strings that end the answer; they are not part of it."""
    logprobs: int = 0
    """How many alternatives to report for each token (0: none, not even the chosen one's)."""
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Refuse values outside their range, NaN included."""
        _integer("max_tokens", self.max_tokens, 1, 1 << 24)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise Refused("top_p is 0, which keeps no token; use temperature 0 for greedy decoding")
        _integer("top_k", self.top_k, 0, 1 << 24)
        _integer("logprobs", self.logprobs, 0, 20)
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 63) - 1)
        if not all(isinstance(text, str) and text for text in self.stop):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refused("a stop string is empty, which would end every answer at once")


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"{name} is {value!r}, but must be an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or math.isnan(value) or not low <= value <= high:
        raise Refused(f"{name} is {value!r}, but must be a number from {low:g} to {high:g}")
