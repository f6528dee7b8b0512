"""The kernel table: total for what was chosen, refused otherwise, and counted."""

from __future__ import annotations

import dataclasses
import re

import pytest
import torch
from memory.toys import HYBRID, Toy, formats_of, gdn, gqa, make_arena, mamba2, mla, model_spec

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.folder import members
from truekv.kernels import table
from truekv.kernels.table import select


def test_every_rule_of_the_folder_is_offered() -> None:
    kernels = select(model_spec(HYBRID), formats_of(HYBRID), backend="reference")
    assert set(kernels.scans) == set(members("truekv.kernels.reference", "SCAN")) == {"gdn", "mamba2"}


def test_the_table_names_every_operation_of_every_layer_once() -> None:
    layers = (*HYBRID, gqa(dim=64))
    rows = select(model_spec(layers), formats_of(layers, "bf16"), backend="reference").describe()
    assert rows == (
        ("scan gdn key_heads=2 value_heads=4", "reference"),
        ("store k=bf16 2x16", "reference"),
        ("store v=bf16 2x16", "reference"),
        ("attend k=bf16 2x16, v=bf16 2x16", "reference"),
        ("scan mamba2 heads=4 groups=2", "reference"),
        ("store latent=bf16 1x32", "reference"),
        ("store rope=bf16 1x16", "reference"),
        ("attend latent=bf16 1x32, rope=bf16 1x16", "reference"),
        ("attend k=bf16 2x16, v=bf16 2x16, window 20", "reference"),
        ("store k=bf16 2x64", "reference"),
        ("store v=bf16 2x64", "reference"),
        ("attend k=bf16 2x64, v=bf16 2x64", "reference"),
        ("sample vocab=64", "reference"),
    )


def test_draft_layers_are_part_of_the_table_when_they_run() -> None:
    spec = model_spec((gdn(),), (gqa(dim=64),))
    assert len(select(spec, ((),)).describe()) == 2
    assert len(select(spec, (None,), formats_of(spec.draft_layers, "int8")).describe()) == 5


def test_an_unknown_rule_is_refused_by_name() -> None:
    unknown = dataclasses.replace(gdn(), rule="gdn3")
    with pytest.raises(
        Refused, match=re.escape("layer 1 of toy: the reference backend has no scan kernel for the rule 'gdn3'")
    ):
        select(model_spec((mamba2(), unknown)), ((), ()), backend="reference")


def test_the_native_backend_is_chosen_where_it_can_run_every_layer() -> None:
    layers = (gqa(dim=64), mla(latent=64, rope=32))
    assert select(model_spec(layers), formats_of(layers, "int8")).backend == "native"
    odd = (gqa(dim=24),)
    with pytest.raises(Refused, match="a multiple of 16, but the field 'k' has 24"):
        select(model_spec(odd), formats_of(odd), backend="native")


def test_without_a_library_the_reference_runs_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table._say_slow.cache_clear()
    monkeypatch.setattr(table, "library", lambda: None)
    for _ in range(2):
        assert select(model_spec(HYBRID), formats_of(HYBRID)).backend == "reference"
    (message,) = caplog.messages
    assert message == (
        "the reference kernels run, which are 50-100x slower, because no native library was built: "
        "install truekv again where there is a C++ compiler"
    )
    with pytest.raises(Refused, match="no native library was built"):
        select(model_spec(HYBRID), formats_of(HYBRID), backend="native")


def test_auto_is_the_fast_backend_of_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (gdn(), gqa(dim=64))
    assert select(model_spec(layers), formats_of(layers)).backend == "native"
    assert select(model_spec(layers), formats_of(layers), device="cuda").backend == "triton"
    monkeypatch.setattr(table, "library", lambda: None)
    assert select(model_spec(layers), formats_of(layers)).backend == "reference"


def test_triton_is_refused_on_a_cpu_that_does_not_interpret_it(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = (gqa(dim=64),)
    assert select(model_spec(layers), formats_of(layers), backend="triton").backend == "triton"
    monkeypatch.setattr(table, "_interpreted", lambda: False)
    message = "run on a CUDA device, not on the CPU: use the native backend, or use the reference backend"
    with pytest.raises(Refused, match=message):
        select(model_spec(layers), formats_of(layers), backend="triton")
    assert select(model_spec(layers), formats_of(layers), backend="triton", device="cuda").backend == "triton"


def test_without_triton_a_gpu_runs_the_reference_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    table._say_slow.cache_clear()
    monkeypatch.setattr(table.importlib.util, "find_spec", lambda _: None)
    layers = (gqa(dim=64),)
    assert select(model_spec(layers), formats_of(layers), device="cuda").backend == "reference"
    assert caplog.messages[0].endswith("because triton is not installed: install it")
    with pytest.raises(Refused, match="triton is not installed: install it, or use the reference backend"):
        select(model_spec(layers), formats_of(layers), backend="triton", device="cuda")


def test_a_rule_without_a_native_scan_runs_in_the_reference_and_the_table_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers = (gdn(), mamba2(), gqa(dim=64))
    known = {"reference": {"gdn": 1, "mamba2": 2}, "native": {"gdn": 3}}
    monkeypatch.setattr(table, "_scans", known.get)
    kernels = select(model_spec(layers), formats_of(layers), backend="native")
    assert kernels.scans == {"gdn": 3, "mamba2": 2}
    assert [where for name, where in kernels.describe() if name.startswith("scan")] == ["native", "reference"]


def test_an_unknown_backend_is_refused_with_the_nearest_one() -> None:
    with pytest.raises(Refused, match="unknown kernel backend 'refrence': did you mean 'reference'"):
        select(model_spec(HYBRID), formats_of(HYBRID), backend="refrence")


def test_calls_are_counted_by_operation_and_format() -> None:
    layers = (gdn(), gqa(dim=64), mamba2(), gqa(dim=64))
    toy, arena = Toy(layers), make_arena(layers, "int8")
    sequence = arena.open()
    toy.feed(arena, sequence, [1, 2])
    toy.run(arena, Chunk(sequence, [3]))
    assert arena.kernels.calls == {"scan[gdn]": 2, "scan[mamba2]": 2, "store[int8]": 8, "attend[int8/int8]": 4}


def test_two_tables_count_apart() -> None:
    first, second = (select(model_spec((gqa(dim=64),)), formats_of((gqa(dim=64),))) for _ in range(2))
    first.calls["attend"] += 1
    assert not second.calls


def test_the_reference_has_no_path_that_depends_on_a_length_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Captured graphs replay with other lengths, so a kernel that reads a number off a tensor is a wrong kernel."""
    layers = (gdn(), gqa(), mamba2())
    toy = Toy(layers)
    arena = make_arena(layers, drafts=2, backend="reference")
    for layer in (*arena._paged(), *arena._states()):
        layer.check_finite = False
    sequence = arena.open()
    step = arena.reserve([Chunk(sequence, [1, 2, 3], 2)])

    def forbidden(*_: object) -> None:
        raise AssertionError("a kernel read a value on the host")

    for verb in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, verb, forbidden)
    # The f32 codec checks its rows for NaN on the host; that check belongs to the codec, not to the kernel.
    monkeypatch.setattr("truekv.formats.plain.finite", lambda rows: rows)
    out = toy.forward(step, arena.layers)
    monkeypatch.undo()
    fresh = make_arena(layers, backend="reference")
    assert torch.equal(out, toy.feed(fresh, fresh.open(), [1, 2, 3]))
