"""The command line. Importing it imports neither torch nor the engine: `truekv --help` answers at once."""

from __future__ import annotations

import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Final

import typer

from truekv.core.errors import TrueKVError
from truekv.serve.flags import (
    AsJson,
    CacheDtype,
    CacheK,
    CacheMap,
    CacheV,
    Dtype,
    EngineFlags,
    HadamardK,
    HadamardV,
    Logprobs,
    MaxModelLen,
    Messages,
    Model,
    OnDevice,
    PromptLogprobs,
    SamplingFlags,
    cache_dtype,
    grouped,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

app = typer.Typer(
    name="truekv",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help="Run hybrid, MLA and dense models with quantized KV caches that stay true to the model.",
    epilog="Try it without a download: `truekv demo`, or `truekv chat tiny-hybrid --kv-cache-dtype int8`.",
)


def _version(asked: bool) -> None:  # noqa: FBT001 (typer calls it with the flag)
    if asked:
        from truekv import __version__

        typer.echo(f"truekv {__version__}")
        raise typer.Exit


@app.callback()
def _options(  # pyright: ignore[reportUnusedFunction] (typer calls it)
    *,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (works after a command too).")] = False,
) -> None:
    del version, debug  # the first acts in its callback, the second is taken out by `run`


@app.command()
@grouped
def generate(
    model: Model,
    prompt: Annotated[str | None, typer.Argument(metavar="PROMPT|-", help="- reads the prompt from stdin.")] = None,
    *,
    messages: Messages = None,
    chat: Annotated[bool, typer.Option("--chat", help="Make the PROMPT a user message of the chat template.")] = False,
    sampling: SamplingFlags,
    logprobs: Logprobs = 0,
    prompt_logprobs: PromptLogprobs = None,
    engine: EngineFlags,
    as_json: AsJson = False,
) -> None:
    """Complete a prompt, or answer a conversation; the text streams to the terminal.

    Examples:
    * `truekv generate tiny-hybrid --chat "What is 7 * 8 + 3 * 4?" --kv-cache-dtype int8`

    * `truekv generate tiny-mla --messages talk.json --json`

    * `cat prompt.txt | truekv generate ./model - --temperature 0.7 --seed 1`

    * `truekv generate tiny-dense --chat "Is 7 * 8 = 56?" --choice yes --choice no`

    """
    from truekv.serve.generate import run

    params = sampling.params(logprobs, prompt_logprobs)
    run(model, prompt, messages, engine.options(), params, chat=chat, as_json=as_json)


@app.command()
@grouped
def chat(
    model: Model,
    *,
    system: Annotated[str | None, typer.Option(help="The system prompt.")] = None,
    sampling: SamplingFlags,
    engine: EngineFlags,
) -> None:
    """Talk with a model in the terminal.

    `/kv` shows the effective format and bytes of every layer, `/stats` tokens and speed, `/reset` forgets.

    Example: `truekv chat tiny-hybrid --kv-cache-dtype int8/kv4`
    """
    from truekv.serve.chat import run

    params = sampling.params()
    run(model, engine.options(), params, system)


@app.command()
def plan(
    model: Model,
    *,
    kv_cache_dtype: CacheDtype = None,
    ctk: CacheK = None,
    ctv: CacheV = None,
    khad: HadamardK = False,
    vhad: HadamardV = False,
    kv_cache_map: CacheMap = "",
    memory: Annotated[str | None, typer.Option(metavar="SIZE", help="What the device has, such as 24GiB.")] = None,
    max_model_len: MaxModelLen = None,
    max_num_seqs: Annotated[int, typer.Option(help="Sequences in memory at once.")] = 1,
    num_speculative_tokens: Annotated[int, typer.Option(help="Draft tokens that a step may verify.")] = 0,
    weight_bytes: Annotated[
        str | None, typer.Option(metavar="SIZE", help="Size of the weights; default: what the headers say.")
    ] = None,
    dtype: Dtype = "auto",
    as_json: AsJson = False,
) -> int:
    """Say what fits into memory, from config.json and the headers of the weights alone.

    Exits with 1 and one sentence (need, have, what to change) when it does not fit.

    Example: `truekv plan ./Qwen3.6-27B --memory 24GiB --weight-bytes 14GiB --kv-cache-dtype int8/kv4`
    """
    from truekv.serve.plan import run

    return run(
        model,
        kv_cache_dtype=cache_dtype(kv_cache_dtype, ctk, ctv, khad=khad, vhad=vhad),
        kv_cache_map=kv_cache_map,
        memory=memory,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        num_speculative_tokens=num_speculative_tokens,
        weight_bytes=weight_bytes,
        dtype=dtype,
        as_json=as_json,
    )


@app.command()
def formats(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="Count bytes for this model's layers.")] = None,
    *,
    as_json: AsJson = False,
) -> int:
    """List every KV format: bits per value, bytes per token, and the distortion it costs.

    Example: `truekv formats tiny-mla`
    """
    from truekv.serve.formats import run

    return run(model, as_json=as_json)


@app.command()
def doctor(
    model: Annotated[str | None, typer.Argument(metavar="MODEL", help="List the kernels that this model gets.")] = None,
    *,
    kv_cache_dtype: CacheDtype = None,
    as_json: AsJson = False,
) -> int:
    """Say what this machine can run, whether the native kernels are there, and which ones a model gets.

    Example: `truekv doctor tiny-hybrid --kv-cache-dtype int8/kv4`
    """
    from truekv.serve.doctor import run

    return run(model, EngineFlags(kv_cache_dtype=kv_cache_dtype).options(), as_json=as_json)


@app.command()
def calibrate(
    model: Model,
    *,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="JSON lines: texts or conversations; default: some that come along."),
    ] = None,
    output: Annotated[
        str | None, typer.Option("--output", "-o", metavar="FILE", help="Default: beside the weights.")
    ] = None,
    export: Annotated[
        str | None, typer.Option(metavar="LAYOUT=DIR", help="Also write fp8 scales for vllm or sglang.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Which of the prompts go into which set.")] = 0,
    device: OnDevice = "auto",
    as_json: AsJson = False,
) -> int:
    """Measure the frames that calibrated formats need, on real prompts through real memory.

    Example: `truekv calibrate ./model --prompts talks.jsonl --export compressed-tensors=./scales`
    """
    from truekv.serve.calibrate import run

    return run(model, prompts=prompts, output=output, export=export, seed=seed, device=device, as_json=as_json)


@app.command()
def demo(
    *,
    only: Annotated[int | None, typer.Option(metavar="N", help="Run one of the five.")] = None,
    seed: Annotated[int, typer.Option(help="Another seed asks other questions.")] = 0,
    as_json: AsJson = False,
) -> int:
    """Show five failures of quantized KV caches, and how each of them ends.

    Runs on models that come along. Exits with 0 only if all five end as they should.

    Example: `truekv demo --only 3`
    """
    from truekv.serve.demo.run import run

    return run(only, seed, as_json=as_json)


def main() -> None:
    """Run the command line and exit with its code."""
    # Threads that spin while they wait make every step several times slower where another program has a core.
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")
    sys.exit(run(sys.argv[1:]))


_INTERRUPTED: Final = 130


def run(arguments: Sequence[str]) -> int:
    """Run one command and return its exit code; every error made on purpose is one sentence on stderr."""
    own, end, rest = _split(list(arguments) or ["--help"])
    debug = "--debug" in own
    try:
        result = app(
            [item for item in own if item != "--debug"] + end + rest, prog_name="truekv", standalone_mode=False
        )
    except (KeyboardInterrupt, typer.Abort):
        return _INTERRUPTED
    except TrueKVError as error:
        return _say(str(error), error.exit_code, debug=debug)
    except Exception as error:
        usage = getattr(error, "format_message", None)  # typer's own errors: an unknown option, a missing argument
        if usage is not None:
            return _say(f"{usage()} (see truekv --help)", 2, debug=debug)
        if debug:
            raise
        return _say(
            f"unexpected {type(error).__name__}: {error} (run again with --debug for the traceback)", 70, debug=False
        )
    return result if isinstance(result, int) else 0


def _split(arguments: list[str]) -> tuple[list[str], list[str], list[str]]:
    """Split at the first --, behind which nothing is an option."""
    place = arguments.index("--") if "--" in arguments else len(arguments)
    return arguments[:place], arguments[place : place + 1], arguments[place + 1 :]


def _say(sentence: str, code: int, *, debug: bool) -> int:
    if debug:
        traceback.print_exc()
    sys.stderr.write(f"truekv: {sentence}\n")
    return code


if __name__ == "__main__":
    main()
