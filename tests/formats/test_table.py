"""`truekv formats`: the numbers it prints are the numbers of the codecs."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from truekv.core.errors import Refused
from truekv.core.spec import Field, ModelSpec, Paged, Stateless
from truekv.formats.choice import names
from truekv.serve.formats import rows, run, show

CONFIGS = Path(__file__).parent.parent / "configs"
HYBRID = ModelSpec(
    "any", 1, 1, 1, "bfloat16", (Stateless(), Paged((Field("k", 2, 256, "key"), Field("v", 2, 128, "value"))))
)


@pytest.fixture
def flash(tmp_path: Path) -> str:
    shutil.copy(CONFIGS / "glm-4.7-flash.json", tmp_path / "config.json")
    return str(tmp_path)


def test_every_name_has_a_row_and_most_bits_come_first() -> None:
    records = rows(None, 128)
    assert {record.name for record in records} == set(names()) - {"auto"}
    bits = [sum(field.bits for field in record.fields) for record in records]
    assert bits == sorted(bits, reverse=True)
    found = {record.name: record for record in records}
    assert found["int8"].fields[0].bits == 8.125
    assert found["int8"].bytes_per_token is None
    assert not found["int8"].calibrated
    assert found["k8v4"].calibrated
    assert found["k8v4"].note == "= int8/kv4 (rotated)"
    assert found["fp8"].note == "= fp8_e4m3"
    assert [field.format for field in found["k8v4"].fields] == ["int8", "kv4"]
    assert 2 < found["kv4"].fields[0].ratio <= 2.85


def test_bytes_are_those_of_all_layers_of_the_model() -> None:
    found = {record.name: record.bytes_per_token for record in rows(HYBRID, 128)}
    assert found["bf16"] == 2 * 2 * (256 + 128)
    assert found["int8"] == 2 * (258 + 130)
    assert found["k8v4"] == 2 * (258 + 66)
    assert found["q4_0"] == 2 * 18 * (8 + 4)


def test_a_model_is_read_from_its_config_alone(flash: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(flash, as_json=True) == 0
    printed: list[dict[str, Any]] = json.loads(capsys.readouterr().out)["formats"]
    found = {record["name"]: record for record in printed}
    # 47 layers: 512 + 64 numbers in 580 bytes, the latent in 4 bits in 324.
    assert found["int8"]["bytes_per_token"] == 47 * 580
    assert found["kv4"]["bytes_per_token"] == 47 * 324
    assert [field["format"] for field in found["kv4"]["fields"]] == ["kv4", "int8"]
    assert [field["field"] for field in found["kv4"]["fields"]] == ["latent", "rope"]
    assert found["k8v4"]["bytes_per_token"] is None
    assert "LATENT/ROPE" in found["k8v4"]["note"]


def test_the_table_names_every_format(capsys: pytest.CaptureFixture[str]) -> None:
    show(rows(None, 128), json=False)
    printed = capsys.readouterr().out
    lines = printed.splitlines()
    assert {line.split()[0] for line in lines[1:]} == set(names()) - {"auto"}
    assert lines[0].split() == ["format", "bits", "k/v", "nMSE", "x", "bound", "calibrated", "note"]
    row = next(line.split() for line in lines if line.startswith("kv4 "))
    assert row[:2] == ["kv4", "4.125"]
    assert row[4] == "yes"


def test_a_model_without_rows_is_refused() -> None:
    with pytest.raises(Refused, match="stores no rows"):
        rows(ModelSpec("states", 1, 1, 1, "bfloat16", (Stateless(),)), 128)
