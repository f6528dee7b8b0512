"""Arguments and flags that several commands share: their types, help texts and panels."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A directory in Hugging Face form, a hub id, or tiny-hybrid, tiny-mla, tiny-dense (they come along).",
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout instead of text.")]
MaxTokens = Annotated[
    int, typer.Option("--max-tokens", "-n", help="Longest answer, in tokens.", rich_help_panel="Sampling")
]
Temperature = Annotated[
    float, typer.Option(help="0 is greedy; 1 samples what the model says.", rich_help_panel="Sampling")
]
TopP = Annotated[
    float, typer.Option(help="Sample from the smallest set with this much mass.", rich_help_panel="Sampling")
]
TopK = Annotated[
    int, typer.Option(help="Sample from the K most likely tokens; 0 keeps all.", rich_help_panel="Sampling")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same tokens.", rich_help_panel="Sampling")]
Stop = Annotated[
    list[str] | None, typer.Option(help="End the answer before this string (repeatable).", rich_help_panel="Sampling")
]
Logprobs = Annotated[
    int, typer.Option(metavar="K", help="Report the K most likely tokens.", rich_help_panel="Sampling")
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
        help="auto, native or reference; auto is native where it was built.",
        rich_help_panel="KV cache",
    ),
]
