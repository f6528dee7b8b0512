"""The Python door: `LLM(model).generate(prompts)`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, Literal, TypedDict, Unpack, cast

from truekv.core.errors import OutOfMemory, Refused, TrueKVError
from truekv.core.folder import choose
from truekv.core.lazy import torch
from truekv.core.options import EngineOptions, SamplingParams
from truekv.engine.generate import Asked
from truekv.serve.speculation import read_speculation

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from truekv.core.options import Speculation
    from truekv.engine.events import Sampled, Stored
    from truekv.engine.generate import Engine
    from truekv.engine.sample import Logprob

Prompt = str | list[int]


class EngineKeywords(TypedDict, total=False):
    """The fields of EngineOptions, which has their meaning and defaults."""

    dtype: Literal["auto", "float32", "bfloat16"]
    kv_cache_dtype: str
    kv_cache_map: str
    kv_cache_frames: str | None
    max_model_len: int | None
    max_num_seqs: int | None
    max_num_batched_tokens: int | None
    speculative_config: Speculation | Mapping[str, Any] | str | None
    enable_prefix_caching: bool
    prefix_checkpoint_interval: int
    capture: Literal["auto", "on", "off"]
    memory: int | None
    device: Literal["auto", "cuda", "cpu"]
    kernel_backend: str
    sentinel: bool
    debug_poison: bool


@dataclass(frozen=True, slots=True)
class Usage:
    """Tokens of one request."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int = 0
    """Prompt tokens that the prefix cache had."""


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token and the natural logarithm of its probability under the model, before temperature and filters."""

    token: int
    text: str | None
    logprob: float


@dataclass(frozen=True, slots=True)
class Position:
    """The chosen token of one position, and the most likely ones, best first."""

    chosen: TokenLogprob
    top: list[TokenLogprob]


@dataclass(frozen=True, slots=True)
class Result:
    """One finished answer."""

    tokens: list[int]
    """What was generated, the end token included."""
    text: str | None
    """Its text up to the stop string; None where the checkpoint has no tokenizer."""
    finish_reason: Literal["stop", "length"]
    usage: Usage
    seed: int | None
    """The seed that gives these tokens again; None when none was needed."""
    logprobs: list[Position] | None
    prompt_logprobs: list[Position] | None
    """Of every prompt token but the first."""
    kv_plan: dict[str, Any]
    """What memory really stored: format and bytes of every layer."""


@dataclass(slots=True)
class _Draft:
    """A result while it grows."""

    seed: int | None
    prompt_tokens: int
    cached_tokens: int = 0
    tokens: list[int] = field(default_factory=list[int])
    text: str = ""
    logprobs: list[Position] = field(default_factory=list[Position])
    prompt_logprobs: list[Position] = field(default_factory=list[Position])


class LLM:
    """A checkpoint, ready to generate. Everything that could be refused has been when this exists."""

    def __init__(self, model: str, **options: Unpack[EngineKeywords]) -> None:
        """Load a model directory, a hub id or an embedded model ("tiny-hybrid", "tiny-mla", "tiny-dense").

        `options`: the fields of EngineOptions. Raises Refused or Corrupted with one sentence, before
        weights are read wherever that is possible.
        """
        from truekv.serve.assemble import build, design, effective

        known = {name: name for name in EngineKeywords.__annotations__}
        for name in options:
            choose("option", name, known)
        speculation = read_speculation(options.pop("speculative_config", None))
        self.model = model
        self._blueprint = design(
            model, EngineOptions(**cast("dict[str, Any]", options), speculative_config=speculation)
        )
        self._engine: Engine = build(self._blueprint)
        self._plan = effective(self._blueprint)

    @classmethod
    def open(cls, model: str, options: EngineOptions) -> LLM:
        """Load a model with options that are at hand as one value."""
        return cls(
            model, **cast("EngineKeywords", {field.name: getattr(options, field.name) for field in fields(options)})
        )

    @property
    def kv_plan(self) -> dict[str, Any]:
        """Effective format and bytes of every layer, pages, capacity and kernels."""
        return self._plan

    @property
    def converses(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return self._blueprint.template is not None

    @property
    def max_model_len(self) -> int:
        """Longest context in tokens, prompt and answer together."""
        return self._engine.max_model_len

    @property
    def options(self) -> EngineOptions:
        """How the engine runs, with the device's defaults where nothing was asked for."""
        return self._blueprint.options

    @property
    def stats(self) -> dict[str, Any]:
        """What was done so far: steps, tokens, preemptions, drafts by place, prefix cache, and what the guards saw."""
        engine = self._engine
        return {**asdict(engine.stats), "sentinel": engine.observer.report() if engine.observer else None}

    def generate(
        self,
        prompts: str | Sequence[int] | Sequence[str] | Sequence[Sequence[int]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        priority: Sequence[int] | None = None,
        cache_salt: str = "",
    ) -> list[Result]:
        """Answer one prompt or many at once, text or token ids; returns one Result each, in order.

        `priority`: one number per prompt, of which lower ones go first. `cache_salt`: only prompts of
        the same salt share what the prefix cache holds. All prompts are checked before any is run. If one
        fails (Corrupted: its numbers became non-finite; ConstraintFailed; OutOfMemory: a step had no room on the
        device) the others are still finished, then its error is raised.
        """
        listed = _as_list(prompts)
        one = params if isinstance(params, SamplingParams) else SamplingParams()
        several = [one] * len(listed) if params is None or isinstance(params, SamplingParams) else list(params)
        if len(several) != len(listed):
            raise Refused(f"there are {len(listed)} prompts and {len(several)} params; give one for all, or one each")
        ranks = [0] * len(listed) if priority is None else list(priority)
        if len(ranks) != len(listed):
            raise Refused(f"there are {len(listed)} prompts and {len(ranks)} priorities; give one each")
        asked = [
            Asked(self.tokens(prompt), wanted, rank, cache_salt)
            for prompt, wanted, rank in zip(listed, several, ranks, strict=True)
        ]
        events = self._run(asked)
        results = {place: event for place, event in events if isinstance(event, Result)}
        return [results[place] for place in range(len(listed))]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Stored | Sampled | Result]:
        """Answer one prompt and yield what happens as it happens; the Result comes last."""
        for _, event in self._run([Asked(self.tokens(prompt), params or SamplingParams())]):
            yield event

    def chat(
        self,
        messages: list[dict[str, Any]],
        params: SamplingParams | None = None,
        tools: list[dict[str, Any]] | None = None,
        *,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> Result:
        """Answer a conversation: messages with "role" and "content", put into the checkpoint's chat template.

        `tools`: function definitions in OpenAI's form. `chat_template_kwargs`: further variables of the
        template, such as enable_thinking.
        """
        prompt = self.conversation(messages, tools, chat_template_kwargs=chat_template_kwargs)
        return self.generate(prompt, params)[0]

    def conversation(
        self,
        messages: list[dict[str, Any]],
        tools: list[dict[str, Any]] | None = None,
        *,
        chat_template_kwargs: Mapping[str, object] | None = None,
    ) -> list[int]:
        """Return the token ids of a conversation, ending where the assistant's answer begins."""
        from truekv.serve.messages import check_messages, check_tools

        found, tokenizer = self._blueprint.template, self._blueprint.tokenizer
        if found is None or tokenizer is None:
            missing = "chat template" if tokenizer else "tokenizer.json"
            raise Refused(f"{self.model} has no {missing}, so it cannot chat; use generate with a plain prompt")
        text = found.render(check_messages(messages), check_tools(tools), chat_template_kwargs)
        # The template writes the special tokens itself.
        return tokenizer.encode(text, add_special_tokens=False)

    def tokens(self, prompt: str | Sequence[int]) -> list[int]:
        """Return the token ids of a prompt; ids stay as they are."""
        if not isinstance(prompt, str):
            return list(prompt)
        if not prompt:
            raise Refused("the prompt is empty; give at least one character")
        if self._blueprint.tokenizer is None:
            raise Refused(
                f"{self.model} has no tokenizer.json, so it cannot read text; give token ids in Python: "
                "LLM(...).generate([1, 2, 3])"
            )
        return self._blueprint.tokenizer.encode(prompt, add_special_tokens=True)

    def logits(self, token_ids: Sequence[int], chunk: int | Sequence[int] | None = None) -> torch.Tensor:
        """Return float32 [T, vocab]: the logits after each token, teacher-forced through the cache.

        `chunk`: tokens per step, or the sizes of the chunks one after the other; the last one repeats.
        """
        chunk = self._blueprint.step_tokens if chunk is None else chunk
        sizes = [chunk] if isinstance(chunk, int) else chunk
        if not sizes or min(sizes) < 1:
            raise Refused(f"chunk is {chunk!r}, but a step takes at least one token")
        self._engine.check(token_ids, room=0)
        arena = self._engine.runner.arena
        held = arena.open()
        try:
            steps = self._engine.runner.teacher_force(held, token_ids, _repeat_last(sizes))
            return torch.cat(list(steps))
        except torch.OutOfMemoryError:
            raise OutOfMemory.step(min(len(token_ids), max(sizes)), 1) from None
        finally:
            arena.close(held)

    def _run(self, asked: Sequence[Asked]) -> Iterator[tuple[int, Stored | Sampled | Result]]:
        """Run prompts together and yield (which prompt, what happened to it)."""
        from truekv.engine.events import Ended, Failed, Sampled, Stored

        engine = self._engine
        requests = engine.add_all(asked)
        places = {request.identity: place for place, request in enumerate(requests)}
        drafts = [_Draft(engine.seed(request), len(request.prompt)) for request in requests]
        failed: TrueKVError | None = None
        for event in engine.run(requests):
            place = places.get(event.request)
            if place is None:
                continue
            match event:
                case Stored():
                    drafts[place].cached_tokens = event.cached
                    drafts[place].prompt_logprobs += [self._position(found) for found in event.logprobs]
                    yield place, event
                case Sampled():
                    self._grow(drafts[place], event)
                    yield place, event
                case Ended():
                    drafts[place].text += event.text
                    yield place, self._result(drafts[place], event.reason, asked[place].params)
                case Failed():
                    failed = failed or event.error
        if failed:
            raise failed

    def _grow(self, draft: _Draft, event: Sampled) -> None:
        draft.tokens.append(event.token)
        draft.text += event.text
        if event.logprob:
            draft.logprobs.append(self._position(event.logprob))

    def _position(self, found: Logprob) -> Position:
        top = [self._named(token, value) for token, value in found.top]
        return Position(self._named(found.token, found.logprob), top)

    def _named(self, token: int, value: float) -> TokenLogprob:
        tokenizer = self._blueprint.tokenizer
        return TokenLogprob(token, tokenizer.piece(token) if tokenizer else None, value)

    def _result(self, draft: _Draft, reason: Literal["stop", "length"], params: SamplingParams) -> Result:
        return Result(
            tokens=draft.tokens,
            text=draft.text if self._blueprint.tokenizer else None,
            finish_reason=reason,
            usage=Usage(draft.prompt_tokens, len(draft.tokens), draft.cached_tokens),
            seed=draft.seed,
            logprobs=draft.logprobs if params.logprobs else None,
            prompt_logprobs=None if params.prompt_logprobs is None else draft.prompt_logprobs,
            kv_plan=self.kv_plan,
        )


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _as_list(prompts: object) -> list[str | list[int]]:
    """Tell one prompt from many; Refused for what is neither."""
    if isinstance(prompts, str):
        return [prompts]
    if not _is_list(prompts) or not prompts:
        raise Refused("give a prompt: a text, a list of token ids, or a list of either")
    items = cast("Sequence[Any]", prompts)
    if all(isinstance(item, str) for item in items) or all(_is_list(item) for item in items):
        return list(items)
    if any(isinstance(item, str) or _is_list(item) for item in items):
        raise Refused("the prompts are of different kinds; give texts, or lists of token ids, not both in one list")
    return [list(items)]


def _repeat_last(sizes: Sequence[int]) -> Iterator[int]:
    yield from sizes
    while True:
        yield sizes[-1]
