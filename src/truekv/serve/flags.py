"""Arguments and flags that several commands share: their types, help texts and panels."""

from __future__ import annotations

import functools
import inspect
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_type_hints

import typer

from truekv.core.errors import Refused
from truekv.core.options import EngineOptions, SamplingParams, StructuredOutputs
from truekv.serve.speculation import read_speculation

if TYPE_CHECKING:
    from collections.abc import Callable

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory in Hugging Face form, a hub id, or tiny-hybrid, tiny-mla, tiny-dense (they come along).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
Logprobs = Annotated[
    int, typer.Option(metavar="K", help="Report the K most likely tokens.", rich_help_panel="Sampling")
]
PromptLogprobs = Annotated[
    int | None,
    typer.Option(
        metavar="K", help="Report how likely the prompt is, and K tokens for each of it.", rich_help_panel="Sampling"
    ),
]
Messages = Annotated[
    str | None, typer.Option(metavar="FILE", help='A conversation as JSON: [{"role": "user", "content": "..."}].')
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-dtype",
        metavar="FORMAT[/FORMAT]",
        help="One format, or K/V: int8 (recommended), int8/kv4, bf16, ... `truekv formats` lists them.",
        rich_help_panel="KV cache",
    ),
]
CacheK = Annotated[
    str | None, typer.Option("-ctk", "--cache-type-k", help="Format of K, as in llama.cpp.", rich_help_panel="KV cache")
]
CacheV = Annotated[
    str | None, typer.Option("-ctv", "--cache-type-v", help="Format of V, as in llama.cpp.", rich_help_panel="KV cache")
]
HadamardK = Annotated[bool, typer.Option("-khad", help="Rotate K before it is coded.", rich_help_panel="KV cache")]
HadamardV = Annotated[bool, typer.Option("-vhad", help="Rotate V before it is coded.", rich_help_panel="KV cache")]
CacheMap = Annotated[
    str, typer.Option("--kv-cache-map", help='Layers apart: "3=bf16,7-11=int8/kv4".', rich_help_panel="KV cache")
]
Frames = Annotated[
    str | None,
    typer.Option(
        "--kv-cache-frames",
        metavar="FILE",
        help="Measured frames from `truekv calibrate`; default: the file beside the weights.",
        rich_help_panel="KV cache",
    ),
]
MaxModelLen = Annotated[int | None, typer.Option(help="Longest context, in tokens.", rich_help_panel="KV cache")]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16"],
    typer.Option(help="Compute dtype; auto is the checkpoint's.", rich_help_panel="KV cache"),
]

Backend = Annotated[
    str,
    typer.Option(
        "--kernel-backend",
        metavar="NAME",
        help="auto, cuda, triton, native or reference; auto is the fastest of the device.",
        rich_help_panel="Engine",
    ),
]
OnDevice = Annotated[
    Literal["auto", "cuda", "cpu"],
    typer.Option("--device", help="Where to run; auto is cuda if there is one.", rich_help_panel="Engine"),
]


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingFlags:
    """How to choose tokens, as the command line says it."""

    max_tokens: Annotated[
        int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.", rich_help_panel="Sampling")
    ] = 256
    min_tokens: Annotated[int, typer.Option(help="No end before so many tokens.", rich_help_panel="Sampling")] = 0
    temperature: Annotated[
        float, typer.Option(help="0 is greedy; 1 samples what the model says.", rich_help_panel="Sampling")
    ] = 0.0
    top_p: Annotated[
        float, typer.Option(help="Sample from the smallest set with this much mass.", rich_help_panel="Sampling")
    ] = 1.0
    top_k: Annotated[
        int, typer.Option(help="Sample from the K most likely tokens; 0 keeps all.", rich_help_panel="Sampling")
    ] = 0
    min_p: Annotated[
        float, typer.Option(help="Least probability, relative to the best token's.", rich_help_panel="Sampling")
    ] = 0.0
    repetition_penalty: Annotated[
        float, typer.Option(help="Above 1 against tokens of prompt and answer.", rich_help_panel="Sampling")
    ] = 1.0
    presence_penalty: Annotated[
        float, typer.Option(help="Off the logit of each token of the answer.", rich_help_panel="Sampling")
    ] = 0.0
    frequency_penalty: Annotated[
        float, typer.Option(help="The same, for each time it is there.", rich_help_panel="Sampling")
    ] = 0.0
    logit_bias: Annotated[
        list[str] | None,
        typer.Option(metavar="ID=BIAS", help="Added to the logit of a token (repeatable).", rich_help_panel="Sampling"),
    ] = None
    seed: Annotated[int | None, typer.Option(help="Same seed, same tokens.", rich_help_panel="Sampling")] = None
    stop: Annotated[
        list[str] | None,
        typer.Option(help="End the answer before this string (repeatable).", rich_help_panel="Sampling"),
    ] = None
    stop_token_ids: Annotated[
        list[int] | None,
        typer.Option(metavar="ID", help="End the answer at this token (repeatable).", rich_help_panel="Sampling"),
    ] = None
    json_schema: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|JSON", help="Answer with JSON of this schema.", rich_help_panel="Structured outputs"
        ),
    ] = None
    regex: Annotated[
        str | None,
        typer.Option(help="Answer with what this expression matches.", rich_help_panel="Structured outputs"),
    ] = None
    choice: Annotated[
        list[str] | None,
        typer.Option(help="Answer with one of these (repeatable).", rich_help_panel="Structured outputs"),
    ] = None
    grammar: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Answer in this Lark grammar.", rich_help_panel="Structured outputs"),
    ] = None

    def params(self, logprobs: int = 0, prompt_logprobs: int | None = None) -> SamplingParams:
        """Return what the engine takes; Refused for what no engine could do."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        schema, regex, choice, grammar = (given.pop(name) for name in ("json_schema", "regex", "choice", "grammar"))
        if schema is not None and not schema.lstrip().startswith("{"):
            schema = _read(schema, "json-schema")
        grammar = grammar and _read(grammar, "grammar")
        asked = any(value is not None for value in (schema, regex, choice, grammar))
        wanted = StructuredOutputs(json=schema, regex=regex, choice=choice, grammar=grammar) if asked else None
        given["logit_bias"] = dict(_bias(item) for item in self.logit_bias or ())
        given.update(stop=tuple(self.stop or ()), stop_token_ids=tuple(self.stop_token_ids or ()))
        return SamplingParams(**given, logprobs=logprobs, prompt_logprobs=prompt_logprobs, structured_outputs=wanted)


def grouped(command: Callable[..., Any]) -> Callable[..., Any]:
    """Let a command take dataclasses of flags: each of their fields becomes a flag of its own."""
    parameters: list[inspect.Parameter] = []
    groups: dict[str, type[Any]] = {}
    for parameter in inspect.signature(command, eval_str=True).parameters.values():
        group = parameter.annotation
        if not (isinstance(group, type) and is_dataclass(group)):
            parameters.append(parameter)
            continue
        groups[parameter.name] = group
        hints = get_type_hints(group, include_extras=True)
        parameters += [
            inspect.Parameter(field.name, parameter.kind, default=field.default, annotation=hints[field.name])
            for field in fields(group)
        ]

    @functools.wraps(command)
    def call(**given: Any) -> Any:  # noqa: ANN401 (whatever the command takes and returns)
        for name, group in groups.items():
            given[name] = group(**{field.name: given.pop(field.name) for field in fields(group)})
        return command(**given)

    flat: Any = call
    flat.__signature__ = inspect.Signature(parameters)
    flat.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return flat


def _read(name: str, flag: str) -> str:
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise Refused(f"--{flag} names {name}, which cannot be read: {reason}") from error


def _bias(item: str) -> tuple[int, float]:
    token, _, bias = item.partition("=")
    try:
        return int(token), float(bias)
    except ValueError as error:
        raise Refused(f"--logit-bias is {item!r}, but must be ID=BIAS, such as 42=-100") from error


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFlags:
    """How to run a model, as the command line says it."""

    kv_cache_dtype: CacheDtype = None
    ctk: CacheK = None
    ctv: CacheV = None
    khad: HadamardK = False
    vhad: HadamardV = False
    kv_cache_map: CacheMap = ""
    kv_cache_frames: Frames = None
    max_model_len: MaxModelLen = None
    enable_prefix_caching: Annotated[
        bool, typer.Option(help="Keep rows and states for prompts that begin alike.", rich_help_panel="Engine")
    ] = True
    prefix_checkpoint_interval: Annotated[
        int,
        typer.Option(
            help="Tokens between a prompt's saved recurrent states, where its chunks end.", rich_help_panel="Engine"
        ),
    ] = 512
    max_num_batched_tokens: Annotated[
        int | None,
        typer.Option(
            help="Most tokens of a step: the prefill chunk; default: 512, on a GPU 2048.", rich_help_panel="Engine"
        ),
    ] = None
    speculative_config: Annotated[
        str,
        typer.Option(
            metavar="JSON",
            help='Guess ahead: {"method": "ngram" or "mtp", "num_speculative_tokens": 3}.',
            rich_help_panel="Engine",
        ),
    ] = ""
    capture: Annotated[
        Literal["auto", "on", "off"],
        typer.Option(help="Replay recorded steps; auto where that is faster.", rich_help_panel="Engine"),
    ] = "auto"
    dtype: Dtype = "auto"
    device: OnDevice = "auto"
    kernel_backend: Backend = "auto"

    def options(self, max_num_seqs: int = 1) -> EngineOptions:
        """Return what the engine takes; Refused for what no engine could run."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        k, v, khad, vhad = (given.pop(name) for name in ("ctk", "ctv", "khad", "vhad"))
        given["kv_cache_dtype"] = cache_dtype(self.kv_cache_dtype, k, v, khad=khad, vhad=vhad)
        given["speculative_config"] = read_speculation(self.speculative_config)
        return EngineOptions(**given, max_num_seqs=max_num_seqs)


def cache_dtype(both: str | None, k: str | None, v: str | None, *, khad: bool, vhad: bool) -> str:
    """Join the two spellings of a cache format into one FORMAT or K/V.

    A side that is not named stays bf16, as it stays f16 in llama.cpp.
    """
    if both is not None and (k or v):
        raise Refused("--kv-cache-dtype and -ctk/-ctv name the same thing; use one of them")
    if not (k or v or khad or vhad):
        return both or "auto"
    if (khad or vhad) and not (both or k or v):
        raise Refused("-khad and -vhad rotate what -ctk and -ctv name; add for example -ctk q8_0 -ctv q4_0")
    first, _, second = (both or f"{k or 'bf16'}/{v or 'bf16'}").partition("/")
    return "/".join(name + "+hadamard" * turned for name, turned in ((first, khad), (second or first, vhad)))
