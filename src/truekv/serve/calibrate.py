"""`truekv calibrate`: measure a model on real prompts and write its frames, with where each comes from."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from truekv.core.device import choose_device
from truekv.core.errors import Refused
from truekv.engine.tokens import Tokenizer, end_tokens
from truekv.models.weights import Checkpoint
from truekv.serve.assemble import FRAMES_FILE, locate
from truekv.serve.messages import ChatTemplate, check_messages, check_tools, decode
from truekv.serve.prompts import conversations
from truekv.trust.export import TensorScale, check
from truekv.trust.export import export as write_layout

if TYPE_CHECKING:
    from collections.abc import Sequence

    from truekv.core.device import Device
    from truekv.core.lazy import torch
    from truekv.trust.calibrate import Calibration
    from truekv.trust.export import Scales

_COUNT: Final = 48
"""Conversations that are made up when the user gives none."""


def run(
    model: str,
    *,
    prompts: str | None,
    output: str | None,
    export: str | None,
    seed: int,
    as_json: bool,
    device: Device = "auto",
) -> int:
    """Calibrate, write truekv/kv_cache_frames.safetensors, print a table (or one JSON object), and return 0.

    `prompts`: a JSONL file, each line a text, a list of messages, or an object with "messages" (and
    "tools") or "text"; default: varied conversations that come along. `output`: the file to write;
    default: beside the weights. `export`: LAYOUT=DIRECTORY, to write fp8 scales for other engines too.
    Everything that can be refused is, before the model is loaded.
    """
    checkpoint = _headed(Checkpoint.open(locate(model)))
    checkpoint.check()
    path = _writable(Path(output) if output else checkpoint.directory / FRAMES_FILE)
    layout = _layout(checkpoint, export) if export else None
    rendered = _render(checkpoint, prompts, seed, model)
    calibration = _measure(checkpoint, rendered, seed, model, choose_device(device))
    written = [str(path)]
    if layout is not None:
        written += map(str, _export(checkpoint, calibration, *layout))
    _save(path, calibration)
    if as_json:
        sys.stdout.write(json.dumps(_described(calibration, written)) + "\n")
    else:
        _show(calibration, written)
    return 0


def _headed(checkpoint: Checkpoint) -> Checkpoint:
    """Take in the prediction head if the checkpoint has one, so that its layers are measured with the others."""
    try:
        return checkpoint.with_draft_head()
    except Refused:
        return checkpoint


def _writable(path: Path) -> Path:
    """Refuse a place that cannot be written before minutes are spent on what should go there."""
    # The folder beside the weights is made when the file is written.
    place = path.parent.parent if path.parent.name == Path(FRAMES_FILE).parent.name else path.parent
    if path.is_dir() or not place.is_dir() or not os.access(place, os.W_OK):
        raise Refused(f"{path} cannot be written; name a file in a directory that can be with --output FILE")
    return path


def _layout(checkpoint: Checkpoint, asked: str) -> tuple[str, Path]:
    layout, equals, directory = asked.partition("=")
    if not equals or not directory:
        raise Refused(f"--export is {asked!r}, but must be LAYOUT=DIRECTORY, such as compressed-tensors=out")
    if Path(directory).resolve() == checkpoint.directory.resolve():
        raise Refused(f"--export would change the checkpoint in {directory} itself; name another directory")
    check(layout, checkpoint.architecture.spec, checkpoint.config.values, _placed(checkpoint))
    return layout, Path(directory)


def _placed(checkpoint: Checkpoint) -> dict[str, str]:
    return {name: header.file for name, header in checkpoint.headers.items()}


def _export(checkpoint: Checkpoint, calibration: Calibration, layout: str, directory: Path) -> list[Path]:
    scales: Scales = {}
    trunk = len(checkpoint.architecture.spec.layers)
    for source in (item for item in calibration.sources if item.layer < trunk):
        # One scale for all heads is the largest of theirs.
        scales.setdefault(source.layer, {})[source.field] = TensorScale(source.static[1], source.rms)
    spec, config = checkpoint.architecture.spec, checkpoint.config.values
    return write_layout(layout, directory, spec, scales, config=config, placed=_placed(checkpoint))


def _render(checkpoint: Checkpoint, prompts: str | None, seed: int, model: str) -> list[list[int]]:
    """Return the prompts as token ids, each ending where the model would answer."""
    tokenizer = Tokenizer.open(checkpoint.directory)
    if tokenizer is None:
        raise Refused(f"{model} has no tokenizer.json, so no prompt can be given to it; put one beside the weights")
    template = ChatTemplate.open(checkpoint.directory)
    if prompts is None and template is None:
        raise Refused(
            f"{model} has no chat template for the conversations that come along; give texts of your own with "
            '--prompts FILE, one JSON string a line, such as "Once upon a time"'
        )
    lines: list[Any] = list(conversations(seed, _COUNT)) if prompts is None else _read(Path(prompts))
    where = prompts or "prompts"
    return [_tokens(line, f"{where}:{place}", tokenizer, template) for place, line in enumerate(lines, 1)]


def _read(path: Path) -> list[Any]:
    if not path.is_file():
        raise Refused(f"--prompts names {path}, which is not a file; give a JSONL file of texts or conversations")
    lines: list[Any] = []
    for place, line in enumerate(decode(path.read_bytes(), str(path)).splitlines(), 1):
        if line.strip():
            try:
                lines.append(json.loads(line))
            except (ValueError, RecursionError) as error:
                raise Refused(f"{path}:{place} is not valid JSON ({error}); write one JSON value a line") from None
    return lines


def _tokens(line: Any, where: str, tokenizer: Tokenizer, template: ChatTemplate | None) -> list[int]:  # noqa: ANN401 (JSON)
    fields = cast("dict[str, Any]", line) if isinstance(line, dict) else {}
    text = fields.get("text", line)
    if isinstance(text, str):
        return tokenizer.encode(text, add_special_tokens=True)
    messages = check_messages(fields.get("messages", line), where)
    if template is None:
        raise Refused(f"{where} is a conversation, but the checkpoint has no chat template; give texts")
    if len(messages) > 1 and messages[-1]["role"] == "assistant":
        # The model answers itself: decoding is measured too.
        messages = messages[:-1]
    rendered = template.render(messages, check_tools(fields.get("tools")))
    return tokenizer.encode(rendered, add_special_tokens=False)


def _measure(
    checkpoint: Checkpoint, prompts: Sequence[list[int]], seed: int, model: str, device: torch.device
) -> Calibration:
    from truekv.kernels.table import fastest_ops
    from truekv.serve.progress import Bar
    from truekv.trust.calibrate import calibrate

    dtype = checkpoint.compute_dtype("auto")
    loaded = checkpoint.load(dtype, fastest_ops(device), device)
    with Bar("running prompts") as bar:
        return calibrate(
            loaded,
            prompts,
            dtype=dtype,
            source=model,
            weights=checkpoint.digest,
            ends=end_tokens(checkpoint.directory, Tokenizer.open(checkpoint.directory)),
            seed=seed,
            device=device,
            progress=bar.update,
        )


def _save(path: Path, calibration: Calibration) -> None:
    from truekv.formats.frame import save_frames

    try:
        path.parent.mkdir(exist_ok=True)
        save_frames(path, calibration.frames, calibration.frames.provenance)
    except OSError as error:
        raise Refused(f"{path} cannot be written ({error.strerror}); name another file with --output FILE") from None


def _described(calibration: Calibration, written: list[str]) -> dict[str, Any]:
    provenance = asdict(calibration.frames.provenance)
    del provenance["layers"]
    return {"written": written, **provenance, "layers": [asdict(source) for source in calibration.sources]}


def _show(calibration: Calibration, written: list[str]) -> None:
    from rich.console import Console
    from rich.table import Table

    provenance = calibration.frames.provenance
    console = Console()
    table = Table(box=None, pad_edge=False, header_style="dim")
    for name in ("layer", "field", "rows", "largest, by half", "agree", "frame's scale", "fp8 scale"):
        table.add_column(name, justify="left" if name == "field" else "right")
    for item in calibration.sources:
        table.add_row(
            str(item.layer),
            item.field,
            f"{item.rows:,}",
            f"{item.amax[0]:.4g}, {item.amax[1]:.4g}",
            f"{item.agreement:.2f}x",
            f"{item.scale[0]:.3g} to {item.scale[1]:.3g}",
            f"{item.static[0]:.3g} to {item.static[1]:.3g}",
        )
    console.print(table)
    console.print(f"{provenance.prompts} prompts; {provenance.method}", style="dim", markup=False)
    for path in written:
        console.print(f"wrote {path}", markup=False, soft_wrap=True)
