"""The native recurrent rules against the reference, on every instruction set, and bitwise against themselves."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
from kernels.scans import SLOTS, Case, far, name_of, random_case
from memory.toys import Toy, gdn, make_arena, mamba2, random_tokens, states

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.folder import members
from truekv.kernels.native import library as native
from truekv.kernels.native.timeline import MAX_TAPS

if TYPE_CHECKING:
    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent

LIBRARY = native.library()
ISAS = () if LIBRARY is None else LIBRARY.isas
pytestmark = pytest.mark.skipif(LIBRARY is None, reason="the native library is not built")

REFERENCE = cast("dict[str, ScanKernel]", members("truekv.kernels.reference", "SCAN"))
NATIVE = cast("dict[str, ScanKernel]", members("truekv.kernels.native", "SCAN"))

# Odd sizes, sizes on the edge of a vector and of a block of columns, and those of real models.
LAYERS = (
    gdn(),
    gdn(key_heads=1, value_heads=1, key_dim=4, value_dim=4),
    gdn(key_heads=2, value_heads=6, key_dim=20, value_dim=12, taps=2),
    gdn(key_heads=1, value_heads=2, key_dim=17, value_dim=40, taps=MAX_TAPS),
    gdn(key_heads=1, value_heads=3, key_dim=64, value_dim=96, taps=5),
    gdn(key_heads=1, value_heads=2, key_dim=128, value_dim=128),
    mamba2(),
    mamba2(heads=1, head_dim=4, groups=1, size=4),
    mamba2(heads=6, head_dim=10, groups=3, size=12, taps=2),
    mamba2(heads=10, head_dim=9, groups=2, size=33, taps=MAX_TAPS),
    mamba2(heads=5, head_dim=64, groups=1, size=128, taps=3),
)
SMALL = (LAYERS[0], LAYERS[2], LAYERS[4], LAYERS[6], LAYERS[8], LAYERS[9])


@functools.cache
def expected_of(layer: Recurrent, dtype: torch.dtype, seed: int) -> tuple[Case, Any]:
    """A case and what the reference makes of it; slow, so once for all instruction sets."""
    case = random_case(layer, dtype, seed)
    return case, case.run(REFERENCE[layer.rule])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_every_instruction_set_equals_the_reference(layer: Recurrent, dtype: torch.dtype, isa: str) -> None:
    del isa
    for seed in range(2):
        case, (expected, expected_state, expected_log) = expected_of(layer, dtype, seed)
        got, state, log = case.run(NATIVE[layer.rule])
        assert got.dtype == torch.float32
        assert far(got, expected) < 2e-6
        assert far(state["state"][case.step.slot], expected_state["state"][case.step.slot]) < 2e-6
        assert torch.equal(state["conv"][case.step.slot], expected_state["conv"][case.step.slot])
        drafts = (case.step.count - case.step.certain).tolist()
        for name, slab in log.items():
            for slot, logged in zip(case.step.slot.tolist(), drafts, strict=True):
                assert torch.equal(slab[slot, :logged], expected_log[name][slot, :logged])


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
def test_other_slots_and_the_rest_of_the_log_keep_their_bytes(layer: Recurrent) -> None:
    for seed in range(4):
        case = random_case(layer, torch.float32, seed)
        _, state, log = case.run(NATIVE[layer.rule])
        drafts = dict(zip(case.step.slot.tolist(), (case.step.count - case.step.certain).tolist(), strict=True))
        for slot in range(SLOTS):
            for name, slab in log.items():
                before = case.log[name][slot, drafts.get(slot, 0) :]
                assert torch.equal(slab[slot, drafts.get(slot, 0) :].view(torch.int32), before.view(torch.int32))
            if slot not in drafts:
                assert all(torch.isnan(slab[slot]).all() for slab in state.values())


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
def test_the_number_of_threads_changes_nothing_bitwise(layer: Recurrent, isa: str) -> None:
    del isa
    case = random_case(layer, torch.bfloat16, 1)
    alone = case.run(NATIVE[layer.rule])
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out, state, _ = case.run(NATIVE[layer.rule])
            assert torch.equal(out, alone[0])
            assert torch.equal(state["state"][case.step.slot], alone[1]["state"][case.step.slot])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_chunks_drafts_and_companions_change_nothing_bitwise(layer: Recurrent, drafts: int, isa: str) -> None:
    """Chunks shorter than the convolution and longer than a run, among companions, under poison."""
    toy, arena = Toy((layer,)), make_arena((layer,), drafts=drafts)
    assert arena.kernels.backend == "native"
    sequence, companion = arena.open(), arena.open()
    tokens = random_tokens(120)
    for turn, count in enumerate((1, 1, 2, 33, 1, 5, 40, 1)):
        start = sequence.position
        guesses = random_tokens(drafts, seed=turn)
        accepted = min(turn % (drafts + 1), len(tokens) - start - count)
        certain, following = tokens[start : start + count], tokens[start + count :][:accepted]
        guesses[:accepted] = following
        chunks = [Chunk(sequence, certain + guesses, drafts), Chunk(companion, random_tokens(1 + 35 * (turn % 2)))]
        outs = toy.run(arena, *(chunks if turn % 2 else chunks[::-1]))
        own = outs[0 if turn % 2 else 1]
        assert torch.equal(own, toy.plain((*tokens[:start], *certain, *guesses))[start:]), isa
        arena.advance(sequence, count + accepted)
        arena.advance(companion, len(chunks[1].tokens))
    if not drafts:
        whole = make_arena((layer,), poison=False, max_num_seqs=1)
        alone = whole.open()
        toy.feed(whole, alone, tokens[: sequence.position])
        assert all(map(torch.equal, states(arena, sequence), states(whole, alone)))


def test_gates_at_their_ends_stay_exact() -> None:
    """A decay that forgets everything, one that forgets nothing, beta 0 and 1, channels of zeros and denormals."""
    for layer in (LAYERS[0], LAYERS[6]):
        case = random_case(layer, torch.float32, 3)
        ends = torch.tensor([0.0, -0.0, -1e-42, -88.0, -200.0, -torch.inf])
        for name, values in case.inputs.items():
            if name == "decay":
                values.copy_(ends.repeat(values.numel())[: values.numel()].view_as(values))
            elif name == "beta":
                values.copy_((torch.arange(values.numel()) % 2).view_as(values))
            elif name == "dt":
                values.copy_(torch.tensor([0.0, 1e-42, 1e4]).repeat(values.numel())[: values.numel()].view_as(values))
            else:
                values[::3] = 0.0
                values[1::3] = -1e-42
        expected, expected_state, _ = case.run(REFERENCE[layer.rule])
        got, state, _ = case.run(NATIVE[layer.rule])
        assert far(got, expected) < 2e-6
        assert far(state["state"][case.step.slot], expected_state["state"][case.step.slot]) < 2e-6


@pytest.mark.parametrize("value", [-1e30, -200.0, -88.5, 88.5, 200.0, 1e30])
def test_channels_far_from_zero_keep_silu_finite(value: float) -> None:
    case = random_case(LAYERS[6], torch.float32, 5)
    case.inputs["conv"][-1] = value
    expected, got = case.run(REFERENCE["mamba2"])[0], case.run(NATIVE["mamba2"])[0]
    assert torch.isfinite(got).all() == torch.isfinite(expected).all()
    if abs(value) < 1e3:
        assert far(got, expected) < 2e-6


def test_mixed_dtypes_are_refused() -> None:
    case = random_case(LAYERS[0], torch.float32, 0)
    case.weights["conv"] = case.weights["conv"].bfloat16()
    with pytest.raises(Refused, match=r"in one dtype, float32 or bfloat16, not in torch\.bfloat16, torch\.float32"):
        case.run(NATIVE["gdn"])


def test_too_many_taps_are_refused() -> None:
    case = random_case(gdn(taps=MAX_TAPS + 1), torch.float32, 0)
    with pytest.raises(Refused, match=f"at most {MAX_TAPS} taps, not {MAX_TAPS + 1}; use the reference backend"):
        case.run(NATIVE["gdn"])


def test_every_rule_of_the_reference_is_native() -> None:
    assert set(NATIVE) == set(REFERENCE)


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
def test_rows_without_tokens_and_tokens_without_a_row_change_nothing(layer: Recurrent, isa: str) -> None:
    del isa
    case = random_case(layer, torch.float32, 3)
    out, state, log = case.run(NATIVE[layer.rule])
    nobody = next(slot for slot in range(SLOTS) if slot not in case.step.slot.tolist())
    padded = dataclasses.replace(
        case,
        inputs={name: torch.cat([rows, torch.full_like(rows[:1], torch.nan)]) for name, rows in case.inputs.items()},
        # Two rows on one slot, as in a padded step.
        step=dataclasses.replace(
            case.step,
            gather=torch.nn.functional.pad(case.step.gather, (0, 0, 0, 2)),
            slot=torch.cat([case.step.slot, torch.tensor([nobody, nobody])]),
            **{
                name: torch.nn.functional.pad(getattr(case.step, name), (0, 2))
                for name in ("position", "count", "certain", "replay")
            },
        ),
    )
    got, padded_state, padded_log = padded.run(NATIVE[layer.rule])
    assert torch.equal(got[:-1], out)
    assert not got[-1].any()
    for one, other in ((state, padded_state), (log, padded_log)):
        for name, slab in one.items():
            assert torch.equal(slab.view(torch.uint8), other[name].view(torch.uint8))
