"""The compiled recurrent rules against the reference on the CPU, with replay, drafts, ragged rows and poison."""

from __future__ import annotations

from typing import TYPE_CHECKING, cast

import pytest
import torch
from gpu.place import DEVICE, ON_DEVICE
from kernels.scans import DRAFTS, SLOTS, Case, far, name_of, random_case
from memory.toys import gdn, mamba2

from truekv.core.folder import members
from truekv.kernels.triton.chunks import LONG, TOKENS

if TYPE_CHECKING:
    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent

LAYERS = (
    gdn(),
    gdn(key_heads=1, value_heads=2, key_dim=33, value_dim=40, taps=8),
    gdn(key_heads=2, value_heads=4, key_dim=128, value_dim=128),
    mamba2(),
    mamba2(heads=4, head_dim=40, groups=2, size=33, taps=8),
    mamba2(heads=8, head_dim=64, groups=2, size=128),
)
# The device's exp and rsqrt are off by a few units in the last place, and 40 tokens add them up.
BOUND = 2e-5


def scans(backend: str) -> dict[str, ScanKernel]:
    return cast("dict[str, ScanKernel]", members(f"truekv.kernels.{backend}", "SCAN"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
@pytest.mark.parametrize("seed", range(4))
def test_outputs_states_and_logs_are_the_references(layer: Recurrent, dtype: torch.dtype, seed: int) -> None:
    case = random_case(layer, dtype, seed, (0, 1, 1, 2, 7, 33))
    expected, expected_state, expected_log = case.run(scans("reference")[layer.rule])
    got, state, log = case.to(DEVICE).run(scans("triton")[layer.rule])
    assert got.device.type == DEVICE
    slots = case.step.slot
    drafts = dict(zip(slots.tolist(), (case.step.count - case.step.certain).tolist(), strict=True))
    assert far(got.cpu(), expected) < BOUND
    assert far(state["state"].cpu()[slots], expected_state["state"][slots]) < BOUND
    assert torch.equal(state["conv"].cpu()[slots], expected_state["conv"][slots])
    for slot in range(SLOTS):
        logged = drafts.get(slot, 0)
        for name, slab in log.items():
            assert torch.equal(slab[slot, :logged].cpu(), expected_log[name][slot, :logged])
            after, before = slab[slot, logged:].cpu(), case.log[name][slot, logged:]
            assert torch.equal(after.contiguous().view(torch.uint8), before.contiguous().view(torch.uint8))
        if slot not in drafts:
            assert all(torch.isnan(slab[slot]).all() for slab in state.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
@pytest.mark.parametrize("seed", [0, 1, 3, 5])
def test_prompts_in_chunks(layer: Recurrent, dtype: torch.dtype, seed: int) -> None:
    lengths = (1, LONG, TOKENS, TOKENS + 1, 6 * TOKENS + 5) if ON_DEVICE else (LONG,)
    case = random_case(layer, dtype, seed, lengths, most_drafts=0)
    assert case.step.count.max() >= LONG
    expected, expected_state, _ = case.run(scans("reference")[layer.rule])
    got, state, _ = case.to(DEVICE).run(scans("triton")[layer.rule])
    slots = case.step.slot
    assert far(got.cpu(), expected) < BOUND
    assert far(state["state"].cpu()[slots], expected_state["state"][slots]) < BOUND
    assert torch.equal(state["conv"].cpu()[slots], expected_state["conv"][slots])


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
@pytest.mark.parametrize("most_drafts", [0, DRAFTS])
def test_the_same_step_gives_the_same_bits(layer: Recurrent, most_drafts: int) -> None:
    case: Case = random_case(layer, torch.bfloat16, 5, most_drafts=most_drafts).to(DEVICE)
    (first, state, log), (again, second_state, second_log) = (case.run(scans("triton")[layer.rule]) for _ in range(2))
    assert torch.equal(first, again)
    for one, other in ((state, second_state), (log, second_log)):
        assert all(torch.equal(one[name].view(torch.uint8), other[name].view(torch.uint8)) for name in one)
