"""bench/RESULTS.md and the plot of decode speed against depth, from the last measurements: `python -m bench.report`."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, cast

from bench.checkpoints import DESCRIPTIONS
from bench.machine import FOLDER

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

HERE: Final = Path(__file__).parent
_SAVED: Final = ("attention.json", "ops.json", "decode-llama.cpp.json", "decode-transformers.json", "serve_engine.json")
_TITLES: Final = {
    "decode": "Decode, tokens/s",
    "prefill": "Prefill from empty, tokens/s",
    "append": "Prefill of a chunk at a depth, tokens/s",
    "memory": "Peak resident memory while decoding, MiB, weights included",
}
_HOW: Final = """\
Checkpoints are random weights in the shapes of released models with a vocabulary of 32,768 (`bench/checkpoints.py`),
bf16 on both sides. The engines take turns; the best round of each counts, because other jobs on the machine only
ever slow one down. Caches reach a depth without its prefill: truekv's pages are filled with encoded random rows,
llama.cpp restores a saved state whose 512 prefilled rows are repeated, transformers gets random tensors. Every row
lies in memory of its own."""

_ENGINE_TITLES: Final = {
    "throughput": "Requests that come together: tokens/s of prompts and answers",
    "deep": "Requests in the middle of an answer, at a depth: tokens/s",
    "arrivals": "Requests that come as others end: tokens/s",
    "overhead": "What is no part of the model's time, of a step of those",
    "prefix": "Seconds to the first token of a prompt that another request has had",
    "ngram": "Prompt lookup on text that repeats itself, tokens/s after the first",
    "rejected": "Prompt lookup on text that does not, tokens/s after the first",
    "mtp": "Prediction head on held-out questions, tokens/s after the first",
    "memory": "A request of 10 tokens, from the plan",
    "log": "Log of one draft token, from the plan",
}
_HOW_ENGINE: Final = """\
All requests of a batch have prompts of their own and answers of one length; both engines do the same work, and
prefill and decode are its two parts. Shares of a step: `model` is the pass with its logits, `layout` the making of
its tensors, and the rest is what the engine adds. Random weights do not write, so a bias leaves the text that repeats
itself four tokens to choose the likeliest from, which come in runs; text that does not is drawn from 256, so that
there always is something to look up, and nearly never what follows. Answers with and without guesses are compared
token by token."""

_HOW_OPS: Final = """\
One thread, microseconds of processor time, the least of many. A step and the maps of up to 4 rows go through states and
weights of 24 layers in turn. Beside a step are torch's batched matrix products for the bare rule; "in transformers"
its own functions, which convolve and normalise too, as the native step does. Prompts, encoding and sampling are
compared with the reference kernels, maps with `torch.nn.functional.linear` in bf16."""

Measurement = dict[str, Any]


def render(measured: Sequence[Measurement]) -> str:
    """Return the page for what each bench saved."""
    parts = ["# Results", "Written by `python -m bench.report` from the last run of each command.", _HOW]
    for one in measured:
        parts += [f"## `{one['command']}`", _machine(one)]
        parts += list(_KINDS[_kind(one)](one))
    if any(_kind(one) == "decode" for one in measured):
        parts.append("![Decode speed against depth](decode.png)")
    return "\n\n".join(parts) + "\n"


def plot(measured: Measurement, path: Path) -> None:
    """Draw decode speed of one sequence against depth: a panel per model, a colour per format, dashes for the peer."""
    import_module("matplotlib").use("Agg")
    plt: Any = import_module("matplotlib.pyplot")  # there with truekv[bench] alone
    rows = [row for row in measured["rows"] if row["what"] == "decode" and row["batch"] == 1]
    models = list(dict.fromkeys(row["model"] for row in rows))
    figure, panels = plt.subplots(1, len(models), figsize=(4.2 * len(models), 3.6), squeeze=False)
    for panel, model in zip(panels[0], models, strict=True):
        formats = dict.fromkeys((row["format"], row["peer_format"]) for row in rows if row["model"] == model)
        for index, (ours, theirs) in enumerate(formats):
            part = [row for row in rows if row["model"] == model and row["format"] == ours]
            depths = [row["depth"] / 1024 for row in part]
            panel.plot(depths, [row["truekv"] for row in part], f"C{index}o-", label=f"truekv {ours}")
            panel.plot(depths, [row["peer"] for row in part], f"C{index}x--", label=f"peer {theirs}")
        panel.set(title=model, xlabel="depth, thousands of tokens", ylabel="tokens/s", yscale="log")
        panel.grid(visible=True, which="both", alpha=0.2)
        panel.legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def _machine(one: Measurement) -> str:
    facts = {**one["machine"], **one["versions"]}
    return "; ".join(f"{name}: {value}" for name, value in facts.items())


def _kind(one: Measurement) -> str:
    if "raw_read_gbps" in one:
        return "attention"
    if "operation" in one["rows"][0]:
        return "ops"
    return "engine" if "bound" in one["rows"][0] else "decode"


def _attention(one: Measurement) -> Iterator[str]:
    yield (
        f"Raw read: {one['raw_read_gbps']:.2f} GB/s at best. GB/s of stored rows, and the fraction of that; then "
        "raw read right before and after a row, and the fraction of it: memory that others use is slower for a while."
    )
    yield _table(
        ("shape", "format", "context", "batch", "GB/s", "of raw read", "raw beside", "of it"),
        [
            (
                row["shape"],
                row["format"],
                f"{row['context']:,}",
                row["batch"],
                f"{row['gbps']:.2f}",
                f"{row['fraction_of_raw_read']:.0%}",
                f"{beside:.2f}",
                f"{row['gbps'] / beside:.0%}",
            )
            for row, beside in zip(one["rows"], one["raw_read_gbps_beside"], strict=True)
        ],
    )


def _ops(one: Measurement) -> Iterator[str]:
    yield _HOW_OPS
    yield _table(
        ("operation", "shape", "native, us", "torch, us", "torch / native", "GB/s", "of the layer's maps"),
        [
            (
                *(row["operation"], row["shape"], f"{row['native']:,.0f}", f"{row['torch']:,.0f}"),
                *(f"{row['ratio']:.1f}", _number(row["gbps"]), "" if row["share"] is None else f"{row['share']:.1%}"),
            )
            for row in one["rows"]
        ],
    )


def _decode(one: Measurement) -> Iterator[str]:
    names = dict.fromkeys(row["model"] for row in one["rows"])
    yield "\n".join(f"- {name}: {DESCRIPTIONS[name]}" for name in names)
    for what, title in _TITLES.items():
        rows = [row for row in one["rows"] if row["what"] == what]
        if rows:
            yield f"### {title}"
            yield _table(
                ("model", "depth", "sequences", "tokens", "format", "peer's", "truekv", "peer", "ratio"),
                [_cells(row, 2**20 if what == "memory" else 1) for row in rows],
            )


def _engine(one: Measurement) -> Iterator[str]:
    yield _HOW_ENGINE
    for what, title in _ENGINE_TITLES.items():
        rows = [row for row in one["rows"] if row["what"] == what]
        if rows:
            yield f"### {title}"
            # What only some rows have is left empty in the others.
            details = list(dict.fromkeys(name for row in rows for name in row["detail"]))
            against = next((row["against"] for row in rows if row["other"] is not None), "")
            header = ("model", "requests", rows[0]["unit"], *([against, "ratio"] if against else []), "bar", "met")
            yield _table((*header, *details), [_engine_cells(row, details, against) for row in rows])


def _engine_cells(row: Measurement, details: Sequence[str], against: str) -> tuple[str, ...]:
    compared = [_number(row["other"]), _number(row["ratio"])] if against else []
    verdict = {None: "", True: "yes", False: "no"}[row["met"]]
    numbers = [_number(row["detail"].get(name)) for name in details]
    measured = row["model"], str(row["concurrent"]), _number(row["truekv"])
    return *measured, *compared, _number(row["bound"]), verdict, *numbers


def _number(value: Any) -> str:  # noqa: ANN401 (JSON)
    if isinstance(value, list):
        return ", ".join(_number(one) for one in cast("list[Any]", value))
    if value is None:
        return ""
    return f"{value:,.0f}" if isinstance(value, int) or abs(value) >= 1000 else f"{value:.3g}"


def _cells(row: Measurement, unit: int) -> tuple[object, ...]:
    ours, theirs = row["truekv"] / unit, row["peer"] / unit
    digits = 0 if unit > 1 else 2
    what = row["model"], f"{row['depth']:,}", row["batch"], row["tokens"] or "", row["format"], row["peer_format"]
    return *what, f"{ours:,.{digits}f}", f"{theirs:,.{digits}f}", f"{ours / theirs:.2f}x"


def _table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


_KINDS: Final = {"attention": _attention, "ops": _ops, "decode": _decode, "engine": _engine}


def main() -> int:
    """Write the page, and the plot if a peer was measured."""
    paths = [FOLDER / name for name in _SAVED]
    measured = [json.loads(path.read_text()) for path in paths if path.is_file()]
    if not measured:
        print("nothing was measured yet; run 'python -m bench.attention' or 'python -m bench.decode'", file=sys.stderr)
        return 2
    (HERE / "RESULTS.md").write_text(render(measured))
    decoded = [one for one in measured if _kind(one) == "decode"]
    if decoded:
        plot(decoded[0], HERE / "decode.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
