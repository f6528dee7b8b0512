"""The kernels of paged layers as they are compiled for representative codes and sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

import triton.language as tl
from kernels.triton.case import Case

from truekv.kernels.triton.attention import attend_kernel
from truekv.kernels.triton.encode import store_kernel
from truekv.kernels.triton.frames import merge_kernel, query_kernel
from truekv.kernels.triton.layout import Row
from truekv.kernels.triton.tiles import SPAN, attend_options, operand

if TYPE_CHECKING:
    from collections.abc import Mapping

PAGE: Final = 32
ARCH: Final = 90
_TYPES: Final = {tl.float32: "*fp32", tl.float16: "*fp16", tl.bfloat16: "*bf16"}
_STEP: Final = dict.fromkeys("gather position count pages owner offset page line".split(), "*i64")


def _case(name: str, kernel: Any, known: Mapping[str, Any], constexprs: Mapping[str, Any], **settings: Any) -> Case:
    """Pointers that are None are constants, as they are at run time."""
    names = kernel.arg_names
    kinds = {item: _STEP.get(item, known.get(item, "i64")) for item in names if item not in constexprs}
    constants = dict(constexprs) | {item: None for item, kind in kinds.items() if kind is None}
    signature = {item: kind for item, kind in kinds.items() if kind is not None}
    divisible = tuple(
        item
        for item, kind in signature.items()
        if kind.startswith("*") or item.endswith(("_bytes", "_stride")) or item in {"tokens", "rows"}
    )
    return Case(name, kernel, signature, constants, divisible=divisible, **settings)


def attend_case(
    keys: Row, values: Row | None, *, rope: Row | None = None, heads: int = 8, group: int = 8, tile: int = 16
) -> Case:
    """Attention over rows of these layouts; without `values` the keys are the values too."""
    averaged = values or keys
    options = attend_options(keys, rope, averaged)
    size = averaged.dim + keys.dim * (values is not None) + (rope.dim if rope else 0)
    names = "/".join(row.code for row in (keys, rope, values) if row is not None)
    return _case(
        f"attend[{names}] D={keys.dim} G={group} M={tile}",
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
            "SPAN": SPAN,
            "OPERAND": operand(keys),
            "OPERAND2": operand(rope) if rope else None,
            "OPERAND_V": operand(averaged),
            "WINDOWED": False,
            "ARCH": ARCH,
            "BLOCK_M": tile,
            "BLOCK_N": options.keys,
            "ACROSS": tile < 16,
        },
        num_warps=options.warps,
        num_stages=options.stages,
        elements=options.keys * size,
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
_MLA: Final = (("bf16", "bf16"), ("fp8_e4m3", "bf16"), ("int8", "int8"), ("kv4", "int8"))
CASES: Final = [
    *(attend_case(Row(key, 128, PAGE), Row(value, 128, PAGE)) for key, value in _GQA),
    *(attend_case(Row(code, 256, PAGE), Row(code, 256, PAGE)) for code in ("bf16", "fp8_e4m3", "int8", "kv4", "kv3")),
    *(attend_case(Row(code, 64, PAGE), Row(code, 64, PAGE)) for code in ("bf16", "int8", "kv4")),
    attend_case(Row("int8", 80, PAGE), Row("int8", 80, PAGE)),
    attend_case(Row("f32", 64, PAGE), Row("f32", 64, PAGE)),
    *(attend_case(Row(code, 128, PAGE), Row(code, 128, PAGE), tile=64) for code in ("bf16", "int8", "kv4")),
    *(attend_case(Row(latent, 512, PAGE), None, rope=Row(rope, 64, PAGE), heads=1, group=16) for latent, rope in _MLA),
]
