"""The Triton recurrent rules against the reference, in the interpreter."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, cast

import pytest
import torch
from kernels.scans import SLOTS, far, name_of, random_case
from memory.toys import Toy, gdn, make_arena, mamba2, random_tokens

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.folder import members
from truekv.kernels.triton.gdn import VALUES
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.mamba2 import DIMS
from truekv.kernels.triton.timeline import CHANNELS, PLACES

if TYPE_CHECKING:
    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels run on a GPU only: make gpu tests them there")

REFERENCE = cast("dict[str, ScanKernel]", members("truekv.kernels.reference", "SCAN"))
TRITON = cast("dict[str, ScanKernel]", members("truekv.kernels.triton", "SCAN"))

# Odd sizes, several blocks of channels and of values, and many taps.
LAYERS = (
    gdn(),
    gdn(key_heads=1, value_heads=1, key_dim=4, value_dim=4, taps=1),
    gdn(key_heads=2, value_heads=6, key_dim=20, value_dim=12, taps=2),
    gdn(key_heads=1, value_heads=2, key_dim=33, value_dim=40, taps=8),
    mamba2(),
    mamba2(heads=1, head_dim=4, groups=1, size=4),
    mamba2(heads=6, head_dim=10, groups=3, size=12, taps=2),
    mamba2(heads=4, head_dim=40, groups=2, size=33, taps=8),
)
SMALL = (LAYERS[0], LAYERS[4])
LENGTHS = (0, 1, 1, 2, PLACES - 1, PLACES + 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_outputs_states_and_logs_are_the_references(layer: Recurrent, dtype: torch.dtype) -> None:
    case = random_case(layer, dtype, 0 if dtype == torch.float32 else 1, LENGTHS)
    expected, expected_state, expected_log = case.run(REFERENCE[layer.rule])
    got, state, log = case.run(TRITON[layer.rule])
    slots = case.step.slot
    assert got.dtype == torch.float32
    assert far(got, expected) < 2e-6
    assert far(state["state"][slots], expected_state["state"][slots]) < 2e-6
    assert torch.equal(state["conv"][slots], expected_state["conv"][slots])
    drafts = (case.step.count - case.step.certain).tolist()
    for name, slab in log.items():
        for slot, logged in zip(slots.tolist(), drafts, strict=True):
            assert torch.equal(slab[slot, :logged], expected_log[name][slot, :logged])


def test_layers_of_both_rules_take_several_blocks() -> None:
    for layer, most in ((LAYERS[3], VALUES), (LAYERS[7], DIMS)):
        assert layer.log[0].shape[0] > CHANNELS
        assert max(layer.state[0].shape[1:]) > most


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
@pytest.mark.parametrize("seed", range(3))
def test_other_slots_and_the_rest_of_the_log_keep_their_bytes(layer: Recurrent, seed: int) -> None:
    case = random_case(layer, torch.float32, seed, LENGTHS)
    _, state, log = case.run(TRITON[layer.rule])
    drafts = dict(zip(case.step.slot.tolist(), (case.step.count - case.step.certain).tolist(), strict=True))
    for slot in range(SLOTS):
        for name, slab in log.items():
            before = case.log[name][slot, drafts.get(slot, 0) :]
            assert torch.equal(slab[slot, drafts.get(slot, 0) :].view(torch.int32), before.view(torch.int32))
        if slot not in drafts:
            assert all(torch.isnan(slab[slot]).all() for slab in state.values())


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
def test_rows_without_tokens_and_tokens_without_a_row_change_nothing(layer: Recurrent) -> None:
    case = random_case(layer, torch.float32, 3, LENGTHS)
    out, state, log = case.run(TRITON[layer.rule])
    nobody = next(slot for slot in range(SLOTS) if slot not in case.step.slot.tolist())
    padded = dataclasses.replace(
        case,
        inputs={name: torch.cat([rows, torch.full_like(rows[:1], torch.nan)]) for name, rows in case.inputs.items()},
        # Two rows on one slot, as in a padded step.
        step=dataclasses.replace(
            case.step,
            gather=torch.nn.functional.pad(case.step.gather, (0, 2, 0, 2)),
            slot=torch.cat([case.step.slot, torch.tensor([nobody, nobody])]),
            **{
                name: torch.nn.functional.pad(getattr(case.step, name), (0, 2))
                for name in ("position", "count", "certain", "replay")
            },
        ),
    )
    got, padded_state, padded_log = padded.run(TRITON[layer.rule])
    assert torch.equal(got[:-1], out)
    assert not got[-1].any()
    for one, other in ((state, padded_state), (log, padded_log)):
        for name, slab in one.items():
            assert torch.equal(slab.view(torch.uint8), other[name].view(torch.uint8))


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
@pytest.mark.parametrize("drafts", [0, 3])
def test_chunks_drafts_and_companions_change_nothing_bitwise(layer: Recurrent, drafts: int) -> None:
    """Chunks shorter than the convolution and longer than a block of places, among companions, under poison."""
    toy, arena = Toy((layer,)), make_arena((layer,), drafts=drafts, backend="triton")
    assert arena.kernels.backend == "triton"
    sequence, companion = arena.open(), arena.open()
    tokens = random_tokens(60)
    whole = make_arena((layer,), poison=False, max_num_seqs=1, backend="triton")
    expected = toy.feed(whole, whole.open(), tokens)
    for turn, count in enumerate((1, 2, PLACES + 3, 1, 5)):
        start = sequence.position
        guesses = random_tokens(drafts, seed=turn)
        accepted = turn % (drafts + 1)
        guesses[:accepted] = tokens[start + count :][:accepted]
        chunks = [Chunk(sequence, tokens[start : start + count] + guesses, drafts), Chunk(companion, [turn] * 2)]
        outs = toy.run(arena, *(chunks if turn % 2 else chunks[::-1]))
        real = count + accepted
        assert torch.equal(outs[0 if turn % 2 else 1][:real], expected[start : start + real])
        arena.advance(sequence, real)
        arena.advance(companion, 2)
    assert sequence.position >= 20
    assert arena.kernels.calls[f"scan[{layer.rule}]"] == 5


def test_mixed_dtypes_are_refused() -> None:
    case = random_case(LAYERS[0], torch.float32, 0, LENGTHS)
    case.weights["conv"] = case.weights["conv"].bfloat16()
    with pytest.raises(Refused, match=r"in one dtype, not in torch\.bfloat16, torch\.float32"):
        case.run(TRITON["gdn"])


def test_every_rule_of_the_reference_is_there() -> None:
    assert set(TRITON) == set(REFERENCE)
