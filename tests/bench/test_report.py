from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
from bench.report import plot, render

if TYPE_CHECKING:
    from pathlib import Path

_ABOUT: dict[str, Any] = {"machine": {"processor": "one"}, "versions": {"peer": "2"}, "command": "python -m bench"}
ATTENTION = {
    **_ABOUT,
    "raw_read_gbps": 20.0,
    "rows": [{"shape": "s", "format": "int8", "context": 4096, "batch": 1, "gbps": 10.0, "fraction_of_raw_read": 0.5}],
    "raw_read_gbps_beside": [12.5],
}


def row(what: str, depth: int, **changes: Any) -> dict[str, Any]:
    values = {"model": "dense", "batch": 1, "tokens": 1, "format": "int8", "peer_format": "q8_0"}
    return {"what": what, "depth": depth, **values, "truekv": 30.0, "peer": 10.0, **changes}


DECODE = {
    **_ABOUT,
    "rows": [
        row("decode", 0),
        row("decode", 4096, truekv=8.0),
        row("memory", 4096, tokens=0, truekv=2**30, peer=2**31),
    ],
}


def test_the_page_has_a_table_for_each_thing_measured() -> None:
    page = render([ATTENTION, DECODE])
    assert "| s | int8 | 4,096 | 1 | 10.00 | 50% | 12.50 | 80% |" in page
    assert "| dense | 4,096 | 1 | 1 | int8 | q8_0 | 8.00 | 10.00 | 0.80x |" in page
    assert "| dense | 4,096 | 1 |  | int8 | q8_0 | 1,024 | 2,048 | 0.50x |" in page
    assert "processor: one; peer: 2" in page
    assert "decode.png" in page
    assert "decode.png" not in render([ATTENTION])


def test_operations_have_a_table_of_their_own() -> None:
    one = {"operation": "encode", "shape": "int8", "native": 13.4, "torch": 1360.0, "ratio": 101.5, "gbps": None}
    rows = [{**one, "share": 0.0123}, {**one, "operation": "step", "gbps": 24.25, "share": None}]
    page = render([{**_ABOUT, "rows": rows}])
    assert "| encode | int8 | 13 | 1,360 | 101.5 |  | 1.2% |" in page
    assert "| step | int8 | 13 | 1,360 | 101.5 | 24.2 |  |" in page


def test_the_plot_is_a_png(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib comes with truekv[bench]")
    plot(DECODE, tmp_path / "decode.png")
    assert (tmp_path / "decode.png").read_bytes().startswith(b"\x89PNG")


def engine_row(what: str, **changes: Any) -> dict[str, Any]:
    values = {"model": "dense", "concurrent": 8, "unit": "tokens/s", "other": None, "against": "", "detail": {}}
    return {"what": what, **values, "truekv": 30.0, "ratio": None, "bound": None, "met": None, **changes}


def test_the_engine_has_a_table_for_each_thing_measured_with_what_it_is_held_to() -> None:
    against = {"other": 10.0, "against": "llama.cpp", "ratio": 3.0, "bound": 1.5, "met": True}
    detail = {"accepted": 2048, "acceptance": [0.5, 0.25]}
    rows = [engine_row("throughput", **against), engine_row("mtp", detail=detail, bound=1.3, met=False)]
    page = render([{**_ABOUT, "rows": rows}])
    assert "| model | requests | tokens/s | llama.cpp | ratio | bar | met |" in page
    assert "| dense | 8 | 30 | 10 | 3 | 1.5 | yes |" in page
    assert "| dense | 8 | 30 | 1.3 | no | 2,048 | 0.5, 0.25 |" in page
    assert "decode.png" not in page
