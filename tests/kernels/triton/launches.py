"""What the gate compiles: launches as a model makes them, of every kernel, for representative codes and sizes."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import torch
from kernels import scans
from kernels.native.cache import PAGE, make_step
from memory.toys import gdn, gqa, mamba2, mla

from truekv.core.folder import members
from truekv.core.ops import Expert, Routing
from truekv.core.protocols import Stored
from truekv.core.recording import recording
from truekv.formats.choice import codecs
from truekv.formats.frame import Frame, frame_for
from truekv.kernels.triton import chunks, experts, paged, rows, timeline
from truekv.kernels.triton.layout import layout
from truekv.kernels.triton.ops import OPS
from truekv.kernels.triton.tiles import SPAN, arch, attend_options

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from truekv.core.batch import Step
    from truekv.core.spec import Paged, Recurrent

HEADS, GROUP, ROWS = 8, 8, 3
WIDTH: Final = 20
"""Pages of a row's table."""
MANY: Final = 12000
"""So many that programs take several spans."""


@dataclass(frozen=True, slots=True)
class Launch:
    """One use of a kernel."""

    name: str
    """Unique; the row of the committed table: "attend[int8/int8] D=128 G=8 M=8"."""
    kernel: str
    """The function that it is about, among all that are launched."""
    run: Callable[[], object]
    """Launch."""
    numbers: Callable[[], int] = lambda: 0
    """How many numbers of the cache or the state one program takes in one turn of its inner loop; 0 without one."""


def _step(new: int, width: int = WIDTH) -> Step:
    """Every row has so many new tokens, and so many pages."""
    return make_step([width * PAGE - 5] * ROWS, [new] * ROWS, torch.arange(ROWS * width).view(ROWS, width))


def fields(layer: Paged, *names: str) -> tuple[Stored, ...]:
    """One page, which is enough: nothing is read."""
    chosen = [codecs()[name] for name in names]
    size = PAGE * sum(item.heads * sum(code.planes(item.dim)) for item, code in zip(layer.fields, chosen, strict=True))
    data, found, start = torch.zeros(1, size, dtype=torch.uint8), list[Stored](), 0
    for item, code in zip(layer.fields, chosen, strict=True):
        measured = Frame(torch.zeros(item.heads, item.dim), torch.ones(item.heads, item.dim))
        found.append(Stored(item, code, frame_for(code, measured), data, start, PAGE))
        start += item.heads * found[-1].head_bytes
    return tuple(found)


def attend(memory: tuple[Stored, ...], group: int, step: Step, window: int | None = None) -> object:
    """Attend with the new tokens of a step and groups of so many query heads."""
    shape = (len(step.owner), memory[0].field.heads * group)
    queries = (torch.zeros(*shape, item.field.dim).bfloat16() for item in memory if item.field.role != "value")
    return paged.attend(tuple(queries), memory, 0.1, window, step)


def attention(
    layer: Paged,
    codes: tuple[str, str],
    queries: int,
    group: int = GROUP,
    *,
    kernel: str = "attend",
    width: int = WIDTH,
) -> Launch:
    """So many query rows of one kv head: a group's heads, times new tokens. In a window if the layer has one."""
    memory = fields(layer, *codes)
    laid = [layout(item) for item in memory]
    scored = [code for code, item in zip(codes, layer.fields, strict=True) if item.role != "value"]
    names = "/".join(codes if kernel == "attend" else scored if kernel == "query" else codes[-1:])
    size = sum(item.field.dim for item in memory)
    return Launch(
        f"{kernel}[{names}] D={laid[0].dim}"
        + (f" G={group} M={queries}" if kernel == "attend" else "")
        + (" in fours" if kernel == "attend" and width == MANY else "")
        + (" in a window" if layer.window else ""),
        f"{kernel}_kernel",
        lambda: attend(memory, group, _step(queries // group, width), layer.window),
        (lambda: attend_options(laid, queries, arch()).keys * size) if kernel == "attend" else lambda: 0,
    )


def store(layer: Paged, *codes: str) -> Launch:
    """New rows of a layer, as it is recorded."""
    stored, name = fields(layer, *codes), f"store[{'/'.join(codes)}] D={layer.fields[0].dim}"
    tokens = tuple(torch.zeros(ROWS, item.heads, item.dim).bfloat16() for item in layer.fields)

    def run() -> None:
        with recording():
            paged.store(stored, tokens, _step(1))

    return Launch(name, "store_kernel", run)


_GQA: Final = (
    ("bf16", "bf16"),
    ("fp8_e4m3", "fp8_e4m3"),
    ("fp8_e5m2", "fp8_e5m2"),
    ("turboquant_fp8", "kv4"),
    ("int8", "int8"),
    ("int8", "kv4"),
    ("kv4", "kv4"),
    ("kv3", "kv3"),
    ("q8_0", "q8_0"),
    ("q5_1", "q5_1"),
    ("q5_0", "q5_0"),
    ("q4_1", "q4_1"),
    ("q4_0", "q4_0"),
    ("iq4_nl", "iq4_nl"),
)
_CODES: Final = ("bf16", "fp8_e4m3", "int8", "kv4", "kv3")
_MLA: Final = (("bf16", "bf16"), ("fp8_e4m3", "bf16"), ("int8", "int8"), ("kv4", "int8"))


def _attended() -> Iterator[Launch]:
    """Attention over rows in pages."""
    for codes in _GQA:
        yield attention(gqa(HEADS, 128), codes, 8)
    for dim in (256, 64):
        for code in _CODES:
            yield attention(gqa(HEADS, dim), (code, code), 8)
    for code, dim in (("int8", 80), ("kv3", 80), ("f32", 64)):
        yield attention(gqa(HEADS, dim), (code, code), 8)
    for code, dim, queries in itertools.product(_CODES, (128, 256), (16, 32, 64)):
        yield attention(gqa(HEADS, dim), (code, code), queries)
    yield attention(gqa(HEADS, 128), ("q8_0", "q4_0"), 64)
    for code, queries in itertools.product(_CODES, (8, 64)):
        yield attention(gqa(HEADS, 128, window=300), (code, code), queries)
    for codes, (queries, group) in itertools.product(_MLA, ((16, 16), (20, 20), (64, 16))):
        yield attention(mla(512, 64), codes, queries, group)
    for code, dim, queries in itertools.product(_CODES, (128, 256), (8, 16)):
        yield attention(gqa(HEADS, dim), (code, code), queries, width=MANY)
    for code, dim in (("int8", 64), ("q8_0", 128), ("q5_1", 128), ("q4_0", 128), ("f32", 64)):
        yield attention(gqa(HEADS, dim), (code, code), 8, width=MANY)


def _around() -> Iterator[Launch]:
    """What comes before and after it."""
    for code in codecs():
        # Of the same code as another, in another frame.
        if not code.endswith("+hadamard") and code not in {"turboquant_4bit", "turboquant_3bit"}:
            yield store(gqa(HEADS, 128), code, code)
    yield store(gqa(HEADS, 128), "turboquant_fp8", "kv4")
    for codes in _MLA:
        yield store(mla(512, 64), *codes)
    for kernel in ("query", "merge"):
        for code in ("bf16", "int8", "kv4"):
            yield attention(gqa(HEADS, 128), (code, code), 8, kernel=kernel)
        yield attention(mla(512, 64), ("int8", "int8"), 16, 16, kernel=kernel)
    wide = (paged.JOINED + 1) * SPAN // PAGE
    yield attention(gqa(HEADS, 128), ("kv4", "kv4"), 8, kernel="join", width=wide)
    yield attention(mla(512, 64), ("int8", "int8"), 16, 16, kernel="join", width=wide)


def recur(
    layer: Recurrent, new: int, drafts: int, batch: int = ROWS, described: Step | None = None
) -> Callable[[], object]:
    """Return a launch in which each row has so many new tokens, all but the first drafts if so many can be logged.

    `described`: such a step, where it is there already.
    """
    kernel = members("truekv.kernels.triton", "SCAN")[layer.rule]
    per_head = [item.name for item in layer.log[1:]]
    (heads, *_), channels, tokens = layer.state[0].shape, layer.log[0].shape[0], batch * new

    def run() -> object:
        step = described or scans.make_step(
            [new] * batch, [min(drafts, new - 1)] * batch, [0] * batch, list(range(batch))
        )
        inputs = {"conv": torch.zeros(tokens, channels).bfloat16()}
        inputs |= {name: torch.zeros(tokens, heads) for name in per_head}
        weights = {"conv": torch.zeros(channels, 4).bfloat16()}
        if layer.rule == "mamba2":
            weights |= {"conv_bias": torch.zeros(channels).bfloat16(), "A": torch.zeros(heads), "D": torch.zeros(heads)}
        state = {"state": torch.zeros(batch, *layer.state[0].shape), "conv": torch.zeros(batch, channels, 3).bfloat16()}
        log = {"conv": torch.zeros(batch, drafts, channels).bfloat16()}
        log |= {name: torch.zeros(batch, drafts, heads) for name in per_head}
        return kernel(layer, inputs, weights, state, log, step)

    return run


def _recurrent() -> Iterator[Launch]:
    """Launches of the recurrent rules: decode, verification of three drafts, a long chunk."""
    for layer in (gdn(16, 32, 128, 128), mamba2(64, 64, 8, 128)):
        for new, drafts, places in ((1, 0, 1), (1, 3, 4), (64, 3, timeline.PLACES)):
            yield Launch(
                f"prepare[{layer.rule}] R={drafts} {places} places",
                "prepare",
                recur(layer, new, drafts),
                lambda places=places: places * timeline.CHANNELS,
            )
    for layer in (gdn(16, 32, 64, 64), gdn(16, 32, 128, 128), mamba2(64, 64, 8, 128), mamba2(64, 64, 8, 256)):
        first, second = layer.state[0].shape[1:]
        block = first * min(32, second) if layer.rule == "gdn" else 4096
        yield Launch(f"{layer.rule} {first}x{second}", "carry", recur(layer, 4, 3), lambda block=block: block)
        for kernel in ("solve", "advance", "answer") if layer.rule == "gdn" else ("advance", "answer"):
            yield Launch(f"{kernel} {layer.rule} {first}x{second}", kernel, recur(layer, chunks.LONG, 0))


def _experts(count: int, tokens: int) -> Callable[[], object]:
    maps = [Expert((torch.zeros(256, 512).bfloat16(),), torch.zeros(512, 128).bfloat16()) for _ in range(count)]
    chosen = torch.zeros(tokens, 8, dtype=torch.int64)
    return lambda: OPS.experts(count, maps, "swiglu")(torch.zeros(tokens, 512).bfloat16(), chosen.float(), chosen)


def _operations() -> Iterator[Launch]:
    """Launches of operations on rows."""
    for tokens, tile in zip((4, 512), experts.TILES, strict=True):
        weights = experts.COLUMNS * experts.DEPTH
        yield Launch(f"experts {tile} rows", "multiply", _experts(16, tokens), lambda size=weights: size)
    chosen = torch.zeros(64, 8, dtype=torch.int64)
    yield Launch("tiles of experts", "tile_kernel", lambda: experts.tile(chosen, 512))
    yield Launch("sum of experts", "mix", _experts(16, 4))
    for routing in (Routing(512, 10), Routing(256, 8, "sigmoid", groups=8, kept_groups=4)):
        name = f"router of {routing.experts} experts in {routing.groups}"
        yield Launch(name, "route_kernel", lambda one=routing: OPS.route(torch.zeros(ROWS, one.experts), None, one))
    wide, gain = torch.zeros(ROWS, 4096).bfloat16(), torch.zeros(4096)
    yield Launch("norm 4096", "_norm", lambda: rows.add_norm(wide, wide, gain, 1e-6))
    heads, gates = torch.zeros(ROWS, 32, 128), torch.zeros(ROWS, 4096).bfloat16()
    yield Launch(
        "gated norm 128",
        "_gated_norm",
        lambda: rows.gated_norm(heads, gates, torch.zeros(128), 1e-6, gate_first=False),
    )
    head, half = torch.zeros(ROWS, 32, 128).bfloat16(), torch.zeros(ROWS, 64)
    pair, gains = (head, head[:, :8]), (torch.zeros(128),) * 2
    for name, given, planes in (
        ("norms and ", gains, half),
        ("norms and partial ", gains, half[:, :32]),
        ("", (None, None), half),
    ):
        yield Launch(
            f"{name}rotations 128",
            "_norm_rotate",
            lambda given=given, planes=planes: rows.norm_rotate(pair, given, 1e-6, planes, planes, interleaved=False),
        )
    yield Launch("gate 128", "_gate", lambda: rows.gate(head, head))
    narrow, rates = torch.zeros(ROWS, 64).bfloat16(), torch.zeros(64)
    yield Launch("softplus 64", "_softplus", lambda: rows.softplus(narrow, rates))
    yield Launch("gates of a delta rule", "_delta_gates", lambda: rows.delta_gates(narrow, narrow, rates, rates))
    yield Launch("swiglu", "_activate", lambda: rows.activate(torch.zeros(ROWS, 8192).bfloat16(), "swiglu"))
    logits = torch.zeros(ROWS, 151936)
    yield Launch("largest of a part", "span_kernel", lambda: OPS.largest(logits))
    yield Launch("largest of a short row", "span_kernel", lambda: OPS.largest(wide))
    yield Launch("keys of a row", "key_kernel", lambda: _all_places(logits))
    yield Launch("largest of 38 parts", "row_kernel", lambda: OPS.largest(logits))


def _all_places(logits: torch.Tensor) -> object:
    """Nothing writes the places that the best ones are then looked up at."""
    try:
        return OPS.best(logits, 20)
    except RuntimeError:
        return None


def launches() -> dict[str, Launch]:
    """Return all of them by name."""
    every = [*_attended(), *_around(), *_recurrent(), *_operations()]
    named = {launch.name: launch for launch in every}
    assert len(named) == len(every), "two launches have one name"
    return named
