"""The kernels of paged layers as they are compiled for representative codes and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import triton.language as tl
from kernels.triton.case import Case

from truekv.kernels.triton.attention import attend_kernel
from truekv.kernels.triton.encode import store_kernel
from truekv.kernels.triton.frames import merge_kernel, query_kernel
from truekv.kernels.triton.layout import Row
from truekv.kernels.triton.tiles import attend_options, operand

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE: Final = 32
_TYPES: Final = {tl.float32: "*fp32", tl.float16: "*fp16", tl.bfloat16: "*bf16"}
_STEP: Final = dict.fromkeys("gather position count pages owner offset page line".split(), "*i64") | {
    "span_keys": "i32"
}


def _case(name: str, kernel: Any, known: Mapping[str, Any], constexprs: Mapping[str, Any], **settings: Any) -> Case:
    """Pointers that are None are constants, as they are at run time."""
    names = kernel.arg_names
    kinds = {item: known[item] if item in known else _STEP.get(item, "i64") for item in names if item not in constexprs}
    constants = dict(constexprs) | {item: None for item, kind in kinds.items() if kind is None}
    signature = {item: kind for item, kind in kinds.items() if kind is not None}
    divisible = tuple(
        item
        for item, kind in signature.items()
        if kind.startswith("*") or item.endswith(("_bytes", "_stride")) or item in {"tokens", "rows", "span_keys"}
    )
    return Case(name, kernel, signature, constants, divisible=divisible, **settings)


def attend_case(
    capability: int,
    keys: Row,
    values: Row | None,
    *,
    rope: Row | None = None,
    heads: int = 8,
    group: int = 8,
    queries: int = 8,
) -> Case:
    """Attention over rows of these layouts; without `values` the keys are the values too."""
    averaged = values or keys
    options = attend_options([row for row in (keys, rope, averaged) if row is not None], queries, capability)
    size = averaged.dim + keys.dim * (values is not None) + (rope.dim if rope else 0)
    names = "/".join(row.code for row in (keys, rope, values) if row is not None)
    return _case(
        f"attend[{names}] D={keys.dim} G={group} M={queries}",
        attend_kernel,
        {
            "first": "*u8",
            "second": "*u8" if rope else None,
            "value": "*u8" if values else None,
            "query": _TYPES[operand(keys)],
            "query2": _TYPES[operand(rope)] if rope else None,
            "factor": "*fp32",
            "factor2": "*fp32" if rope else None,
            **dict.fromkeys(("average", "largest", "total"), "*fp32"),
        },
        {
            "ROW": keys,
            "ROW2": rope,
            "ROW_V": values,
            "HEADS": heads,
            "GROUP": group,
            "PAGE_TOKENS": PAGE,
            "OPERAND": operand(keys),
            "OPERAND2": operand(rope) if rope else None,
            "OPERAND_V": operand(averaged),
            "WINDOWED": False,
            "ARCH": capability,
            "BLOCK_M": options.queries,
            "BLOCK_N": options.keys,
            "ACROSS": options.across,
        },
        num_warps=options.warps,
        num_stages=options.stages,
        elements=options.keys * size,
    )


def store_case(row: Row) -> Case:
    """Storage of one row, framed and rotated where its code is."""
    framed = "*fp32" if row.code not in {"bf16", "q5_1", "iq4_nl", "turboquant_fp8"} else None
    rotated = "*i8" if row.code in {"int8", "kv4", "kv3"} else None
    return _case(
        f"store[{row.code}] D={row.dim}",
        store_kernel,
        {"data": "*u8", "rows": "*bf16", "centre": framed, "scale": framed, "rotation": rotated, "broken": "*i32"}
        | {"count": "i64"},
        {"ROW": row, "HEADS": 8, "BLOCK_R": 1},
    )


def query_case(row: Row, *, heads: int = 8, group: int = 8) -> Case:
    """Queries into a frame."""
    return _case(
        f"query[{row.code}] D={row.dim}",
        query_kernel,
        {
            "query": "*bf16",
            "scale": "*fp32" if row.code != "bf16" else None,
            "rotation": "*i8" if row.code != "bf16" else None,
            "framed": _TYPES[operand(row)],
            "factor": "*fp32",
            "softmax_scale": "fp32",
        },
        {"ROW": row, "HEADS": heads, "GROUP": group, "BLOCK_R": 16, "BLOCK_C": 32, "BLOCK_D": row.dim, "WIDTH": 128},
    )


def merge_case(row: Row, *, heads: int = 8, group: int = 8) -> Case:
    """Averages out of their spans and their frame."""
    framed = "*fp32" if row.code != "bf16" else None
    return _case(
        f"merge[{row.code}] D={row.dim}",
        merge_kernel,
        {
            **dict.fromkeys(("average", "largest", "total"), "*fp32"),
            "centre": framed,
            "scale": framed,
            "rotation": "*i8" if row.code != "bf16" else None,
            "out": "*bf16",
        },
        {
            "ROW": row,
            "HEADS": heads,
            "GROUP": group,
            "WINDOWED": False,
            "BLOCK_R": 16,
            "BLOCK_D": 16,
            "WIDTH": 128,
        },
        num_warps=8 if row.columns > 256 else 4,
    )


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
    ("q4_0", "q4_0"),
    ("iq4_nl", "iq4_nl"),
)
_CODES: Final = ("bf16", "fp8_e4m3", "int8", "kv4", "kv3")
_MLA: Final = (("bf16", "bf16"), ("fp8_e4m3", "bf16"), ("int8", "int8"), ("kv4", "int8"))
_SIZES: Final = (16, 32, 64)


def cases(capability: int) -> list[Case]:
    """Return every case as it is compiled for a compute capability."""
    return [
        *(attend_case(capability, Row(key, 128, PAGE), Row(value, 128, PAGE)) for key, value in _GQA),
        *(attend_case(capability, Row(code, 256, PAGE), Row(code, 256, PAGE)) for code in _CODES),
        *(attend_case(capability, Row(code, 64, PAGE), Row(code, 64, PAGE)) for code in _CODES),
        attend_case(capability, Row("int8", 80, PAGE), Row("int8", 80, PAGE)),
        attend_case(capability, Row("kv3", 80, PAGE), Row("kv3", 80, PAGE)),
        attend_case(capability, Row("f32", 64, PAGE), Row("f32", 64, PAGE)),
        *(
            attend_case(capability, Row(code, dim, PAGE), Row(code, dim, PAGE), queries=queries)
            for code in _CODES
            for dim in (128, 256)
            for queries in _SIZES
        ),
        attend_case(capability, Row("q8_0", 128, PAGE), Row("q4_0", 128, PAGE), queries=64),
        *(
            attend_case(
                capability, Row(latent, 512, PAGE), None, rope=Row(rope, 64, PAGE), heads=1, group=16, queries=queries
            )
            for latent, rope in _MLA
            for queries in (16, 64)
        ),
        *(store_case(Row(code, 128, PAGE)) for code in (*_CODES, "fp8_e5m2", "turboquant_fp8", "q5_1", "iq4_nl")),
        *(query_case(Row(code, 128, PAGE)) for code in ("bf16", "int8", "kv4")),
        *(merge_case(Row(code, 128, PAGE)) for code in ("bf16", "int8", "kv4")),
        query_case(Row("int8", 512, PAGE), heads=1, group=16),
        merge_case(Row("int8", 512, PAGE), heads=1, group=16),
    ]
