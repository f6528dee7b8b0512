"""What a user may ask for: how the engine runs, and how tokens are sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final, Literal, cast

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from truekv.core.device import Device


SEQUENCES: Final = {"cpu": 8, "cuda": 256}
"""max_num_seqs by default. A CPU computes every token anew; a GPU reads its weights once for all, which pays up to
some hundreds. There the default is halved until states and steps take a third of what weights leave free."""
STEP_TOKENS: Final = {"cpu": 512, "cuda": 2048}
"""max_num_batched_tokens by default. A GPU multiplies some 300 tokens in the time in which it reads a weight, and more
where each expert sees a few of them alone; 2,048 are a step of 0.2 s for 27 billion weights, for which others wait."""


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
    max_num_seqs: int | None = None
    """Sequences that may be in memory at once; default: 8, on a CUDA device up to 256, as memory allows."""
    max_num_batched_tokens: int | None = None
    """Most new tokens in one step: the prefill chunk; default: 512, on a CUDA device 2048."""
    speculative_config: Speculation | None = None
    """How to guess ahead; None guesses nothing."""
    enable_prefix_caching: bool = True
    """Keep the rows and states of ended requests, for requests that begin alike."""
    prefix_checkpoint_interval: int = 512
    """Tokens between the recurrent states that a prompt leaves in the prefix cache: a multiple of a page."""
    capture: Literal["auto", "on", "off"] = "auto"
    """Replay recorded steps; auto where that is faster than running them."""
    memory: int | None = None
    """Bytes for rows and states; default: what max_num_seqs sequences of max_model_len need, on a CUDA device at most
    what weights and steps leave free there."""
    device: Device = "auto"
    """Where weights and memory lie and steps run: cuda where torch sees a CUDA device, else cpu."""
    kernel_backend: str = "auto"
    """auto, cuda, triton, native or reference; auto is triton on a CUDA device, and on a CPU native where its library
    was built, each where it can run every layer. cuda is triton with kernels in CUDA C++ for rows of 3 and 4 bits, q8_0
    and latent ones, and auto where the device and a layer are made for it."""
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
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, 1 << 20)
        if self.device not in {"auto", "cuda", "cpu"}:
            raise Refused(f"device is {_shown(self.device)}, but must be auto, cuda or cpu")
        if self.capture not in {"auto", "on", "off"}:
            raise Refused(f"capture is {self.capture!r}, but must be auto, on or off")
        for name in ("max_model_len", "memory"):
            if getattr(self, name) is not None:
                _integer(name, getattr(self, name), 1, 1 << 62)


@dataclass(frozen=True, slots=True, kw_only=True)
class StructuredOutputs:
    """What an answer must be: exactly one of the four. Names are vLLM's."""

    json: Mapping[str, Any] | str | None = None
    """A JSON schema, as an object or as text."""
    regex: str | None = None
    """A regular expression that the whole answer matches (Rust's regex syntax: Unicode classes, no look-around)."""
    choice: Sequence[str] | None = None
    """The answers to choose from."""
    grammar: str | None = None
    """A grammar in llguidance's form of Lark."""

    def __post_init__(self) -> None:
        """Refuse none, several, and values of another kind."""
        given = [name for name in ("json", "regex", "choice", "grammar") if getattr(self, name) is not None]
        if len(given) != 1:
            named = " and ".join(given) or "nothing"
            raise Refused(f"structured_outputs names {named}, but must name one of json, regex, choice and grammar")
        if not isinstance(self.json, Mapping | str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refused("structured_outputs: json must be a schema, as an object or as text")
        for name, text in (("regex", self.regex), ("grammar", self.grammar)):
            if not isinstance(text, str | None):  # pyright: ignore[reportUnnecessaryIsInstance]
                raise Refused(f"structured_outputs: {name} must be a text")
        if self.choice is not None:
            _texts("structured_outputs: choice", self.choice, 1 << 16, 1 << 18)
            if not self.choice:
                raise Refused("structured_outputs: choice is empty; give at least one answer")


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose tokens. The defaults are greedy. Names, order and meaning are vLLM's."""

    max_tokens: int = 256
    min_tokens: int = 0
    """No end, asked for or the checkpoint's, before so many tokens; a grammar that is complete ends all the same."""
    temperature: float = 0.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """0 keeps every token."""
    min_p: float = 0.0
    """Keeps the tokens that are at least this likely, relative to the most likely one; 0 keeps every token."""
    repetition_penalty: float = 1.0
    """Divides the positive logits of tokens in the prompt or the answer, and multiplies the negative ones."""
    presence_penalty: float = 0.0
    """Taken off the logit of each token of the answer."""
    frequency_penalty: float = 0.0
    """Taken off the logit of a token as often as it is in the answer."""
    logit_bias: Mapping[int, float] | None = None
    """Added to the logits of these tokens: from -100 (never) to 100 (always)."""
    seed: int | None = None
    """Same seed, same tokens; None draws one and reports it."""
    stop: Sequence[str] = ()
    """Strings that end the answer; they are not part of it."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, beside those of the checkpoint."""
    ignore_eos: bool = False
    """Go on after the checkpoint's own end tokens."""
    logprobs: int = 0
    """How many alternatives to report for each token (0: none, not even the chosen one's)."""
    prompt_logprobs: int | None = None
    """How many to report for each token of the prompt, beside its own; None reports nothing."""
    structured_outputs: StructuredOutputs | None = None
    """What the answer must be."""

    def __post_init__(self) -> None:
        """Refuse values outside their range, NaN included."""
        _integer("max_tokens", self.max_tokens, 1, 1 << 24)
        _integer("min_tokens", self.min_tokens, 0, self.max_tokens)
        _number("temperature", self.temperature, 0.0, 100.0)
        _number("top_p", self.top_p, 0.0, 1.0)
        if self.top_p == 0:
            raise Refused("top_p is 0, which keeps no token; use temperature 0 for greedy decoding")
        _integer("top_k", self.top_k, 0, 1 << 24)
        _number("min_p", self.min_p, 0.0, 1.0)
        _number("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _number("presence_penalty", self.presence_penalty, -2.0, 2.0)
        _number("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        self._check_bias()
        if self.seed is not None:
            _integer("seed", self.seed, 0, (1 << 63) - 1)
        _texts("stop", self.stop, 16, 1000)
        self._check_stop_tokens()
        _integer("logprobs", self.logprobs, 0, 20)
        if self.prompt_logprobs is not None:
            _integer("prompt_logprobs", self.prompt_logprobs, 0, 20)
        if not isinstance(self.structured_outputs, StructuredOutputs | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refused("structured_outputs must be a StructuredOutputs: one of json, regex, choice and grammar")

    def _check_bias(self) -> None:
        if not isinstance(self.logit_bias, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise Refused("logit_bias must map token ids to numbers")
        if self.logit_bias and len(self.logit_bias) > _MOST_TOKENS:
            raise Refused(f"logit_bias has {len(self.logit_bias)} entries, but at most {_MOST_TOKENS} are taken")
        for token, bias in (self.logit_bias or {}).items():
            _integer("a token id in logit_bias", token, 0, _LARGEST_ID)
            _number(f"the logit_bias of token {token}", bias, -100.0, 100.0)

    def _check_stop_tokens(self) -> None:
        if not isinstance(self.stop_token_ids, list | tuple):
            raise Refused("stop_token_ids must be a list of token ids")
        if len(self.stop_token_ids) > _MOST_TOKENS:
            raise Refused(f"stop_token_ids has {len(self.stop_token_ids)} ids, but at most {_MOST_TOKENS} are taken")
        for token in self.stop_token_ids:
            _integer("a token id in stop_token_ids", token, 0, _LARGEST_ID)


_MOST_TOKENS: Final = 1024
_LARGEST_ID: Final = (1 << 31) - 1


def _integer(name: str, value: object, low: int, high: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise Refused(f"{name} is {_shown(value)}, but must be an integer from {low} to {high}")


def _number(name: str, value: object, low: float, high: float) -> None:
    # NaN compares with nothing, so it is in no range.
    if isinstance(value, bool) or not isinstance(value, int | float) or not low <= value <= high:
        raise Refused(f"{name} is {_shown(value)}, but must be a number from {low:g} to {high:g}")


def _texts(name: str, value: object, most: int, longest: int) -> None:
    """Refuse what is no list of texts, each with at least one character."""
    if not isinstance(value, list | tuple):
        raise Refused(f"{name} is {_shown(value)}, but must be a list of texts")
    texts = cast("Sequence[object]", value)
    if len(texts) > most:
        raise Refused(f"{name} has {len(texts)} texts, but at most {most} are taken")
    for text in texts:
        if not isinstance(text, str) or not 1 <= len(text) <= longest:
            raise Refused(f"{name} has {_shown(text)}, but takes texts of 1 to {longest} characters")


def _shown(value: object) -> str:
    """Return a value as a sentence shows it: what is absurdly large, by its size."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    try:
        text = repr(value)
    except ValueError:  # a list of integers beyond what Python prints
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:50]}... ({len(text)} characters)"
