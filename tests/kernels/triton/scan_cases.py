"""Recurrent rules, grouped products, operations on rows and greedy tokens, as they are compiled for real sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from kernels.triton.case import Case

from truekv.kernels.triton import experts, gdn, largest, mamba2, rows, timeline

if TYPE_CHECKING:
    from collections.abc import Mapping

_KINDS: Final = {
    **dict.fromkeys("states mixed gates out rates skips first first_logs second second_logs gain".split(), "*fp32"),
    **dict.fromkeys("gathers counts certains replays slots pairs tile_experts firsts ends".split(), "*i64"),
    **dict.fromkeys("inputs taps bias tails logs xs changes totals outs weights".split(), "*bf16"),
    **dict.fromkeys(("scale", "eps"), "fp32"),
}


def _case(
    name: str, kernel: Any, constexprs: Mapping[str, Any], changes: Mapping[str, str] | None = None, **settings: Any
) -> Case:
    kinds = _KINDS | (changes or {})
    signature = {item: kinds.get(item, "i32") for item in kernel.arg_names if item not in constexprs}
    sizes = {"channels", "stride", "dim", "depth", "columns"}
    divisible = tuple(item for item, kind in signature.items() if kind.startswith("*") or item in sizes)
    return Case(name, kernel, signature, constexprs, divisible=divisible, **settings)


def _prepare(rule: str, *, places: int, gates: int, heads: int, drafts: int = 3) -> Case:
    sizes = {"TAPS": 4, "TAIL": 4, "DRAFTS": drafts, "CHANNELS": timeline.CHANNELS, "HEADS": heads, "PLACES": places}
    constants = sizes | {"BIASED": rule == "mamba2", "GATES": gates}
    return _case(
        f"prepare[{rule}] R={drafts} {places} places", timeline.prepare, constants, elements=places * timeline.CHANNELS
    )


def _experts(tile: int) -> Case:
    sizes = {"ROWS": tile, "COLUMNS": experts.COLUMNS, "DEPTH": experts.DEPTH}
    weights = experts.COLUMNS * experts.DEPTH
    return _case(f"experts {tile} rows", experts.multiply, sizes | {"SHARING": 8, "WHOLE": True}, elements=weights)


CASES: Final = [
    _prepare("gdn", places=1, gates=2, heads=32, drafts=0),
    _prepare("gdn", places=4, gates=2, heads=32),
    _prepare("gdn", places=timeline.PLACES, gates=2, heads=32),
    _prepare("mamba2", places=1, gates=1, heads=64, drafts=0),
    _prepare("mamba2", places=4, gates=1, heads=64),
    _prepare("mamba2", places=timeline.PLACES, gates=1, heads=64),
    *(
        _case(
            f"gdn {size}x{size}",
            gdn.carry,
            {"DRAFTS": 3, "D": size, "V": size, "KEYS": size, "VALUES": min(gdn.VALUES, size)},
            elements=size * min(gdn.VALUES, size),
        )
        for size in (64, 128)
    ),
    *(
        _case(
            f"mamba2 {dim}x{size}",
            mamba2.carry,
            {"DRAFTS": 3, "P": dim, "S": size, "DIMS": mamba2.NUMBERS // size, "SIZE": size},
            elements=mamba2.NUMBERS,
        )
        for dim, size in ((64, 128), (64, 256))
    ),
    *(_experts(tile) for tile in experts.TILES),
    _case("norm 4096", rows._norm, {"ADDED": True, "GAINED": True, "BLOCK": 4096}, num_warps=8),
    _case(
        "gated norm 128",
        rows._gated_norm,
        {"FIRST": False, "BLOCK": 128},
        {"xs": "*fp32", "gates": "*bf16"},
        num_warps=1,
    ),
    _case("swiglu", rows._activate, {"SWIGLU": True, "BLOCK": rows.BLOCK}),
    *(
        _case(
            f"largest of a {what}",
            largest.span_kernel,
            {"ALONE": alone, "BLOCK": largest.BLOCK},
            {"xs": kind, "outs": "*i64"},
        )
        for what, kind, alone in (("part", "*fp32", False), ("short row", "*bf16", True))
    ),
    _case("keys of a row", largest.key_kernel, {"BLOCK": largest.BLOCK}, {"xs": "*fp32", "keys": "*i64"}),
    _case("largest of 38 parts", largest.row_kernel, {"BLOCK_P": 64}, {"keys": "*i64", "places": "*i64"}, num_warps=1),
]
