"""The Triton recurrent rules against the reference, in the interpreter."""

from __future__ import annotations

import dataclasses
import random
from typing import TYPE_CHECKING, Any, cast

import pytest
import torch
import triton
import triton.language as tl
from kernels.scans import SLOTS, Case, far, name_of, random_case
from kernels.triton.tensor_core import tensor_core_dot
from memory.toys import Toy, gdn, make_arena, mamba2, random_tokens
from triton.runtime.interpreter import InterpreterBuilder

from truekv.core.batch import Chunk
from truekv.core.errors import Refused
from truekv.core.folder import members
from truekv.kernels.triton import gdn as gdn_kernels
from truekv.kernels.triton import mamba2 as mamba2_kernels
from truekv.kernels.triton.chunks import LONG, TOKENS, most_long
from truekv.kernels.triton.gdn import VALUES
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.mamba2 import DIMS
from truekv.kernels.triton.timeline import CHANNELS, PLACES, SPAN, find_part, most_parts

if TYPE_CHECKING:
    from collections.abc import Iterator

    from truekv.core.protocols import ScanKernel
    from truekv.core.spec import Recurrent

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels run on a GPU only: make gpu tests them there")

REFERENCE = cast("dict[str, ScanKernel]", members("truekv.kernels.reference", "SCAN"))
TRITON = cast("dict[str, ScanKernel]", members("truekv.kernels.triton", "SCAN"))
KERNELS = {"gdn": gdn_kernels, "mamba2": mamba2_kernels}

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
# Several blocks of values and of a state's lines, the last of them not full.
TALL = (
    gdn(key_heads=1, value_heads=2, key_dim=35, value_dim=40, taps=2),
    mamba2(heads=2, head_dim=40, groups=1, size=35, taps=2),
)
LENGTHS = (0, 1, 1, 2, PLACES - 1, PLACES + 3)
# Around one chunk and two, with those that go token by token among them.
LONGER = (1, LONG - 1, LONG, LONG + 1, TOKENS - 1, TOKENS, TOKENS + 1, 2 * TOKENS + 3)


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


@pytest.fixture(params=["float32", "three parts of TF32"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Products as the interpreter computes them, and as a tensor core does what the kernels ask for."""
    if request.param == "float32":
        yield
        return
    done = [0]

    def counted(*arguments: Any) -> Any:
        done[0] += 1
        return tensor_core_dot(*arguments)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", counted)
    yield
    assert done[0] > 0


def in_chunks(case: Case) -> list[bool]:
    """Which rows go so; some are short, and of long ones there are some with drafts and some without."""
    count, long = case.step.count, (case.step.count >= LONG) & (case.step.certain == case.step.count)
    assert long.any()
    assert ((count >= LONG) & ~long).any()
    assert (count < LONG).any()
    return long.tolist()


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layer", TALL, ids=name_of)
def test_long_rows_are_the_references(layer: Recurrent) -> None:
    case = random_case(layer, torch.float32, 10, LONGER, most_drafts=1)
    assert any(in_chunks(case))
    assert case.step.count.max() > SPAN
    expected, expected_state, expected_log = case.run(REFERENCE[layer.rule])
    got, state, log = case.run(TRITON[layer.rule])
    slots = case.step.slot
    assert far(got, expected) < 2e-6
    assert far(state["state"][slots], expected_state["state"][slots]) < 2e-6
    assert torch.equal(state["conv"][slots], expected_state["conv"][slots])
    drafts = (case.step.count - case.step.certain).tolist()
    for name, slab in log.items():
        for slot, logged in zip(slots.tolist(), drafts, strict=True):
            assert torch.equal(slab[slot, :logged], expected_log[name][slot, :logged])


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
def test_what_goes_in_chunks_adds_up_in_another_order(layer: Recurrent, monkeypatch: pytest.MonkeyPatch) -> None:
    case = random_case(layer, torch.float32, 29, LONGER, most_drafts=1)
    got, _, _ = case.run(TRITON[layer.rule])
    monkeypatch.setattr(KERNELS[layer.rule], "LONG", 10**6)
    by_tokens, _, _ = case.run(TRITON[layer.rule])
    for row, long in enumerate(in_chunks(case)):
        own = case.step.gather[row, : case.step.count[row]]
        assert torch.equal(got[own], by_tokens[own]) != long


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("layer", TALL, ids=name_of)
def test_strong_decays_and_keys_that_repeat_lose_nothing(layer: Recurrent) -> None:
    case = random_case(layer, torch.float32, 1, (2 * TOKENS + 5,), most_drafts=0)
    tokens, heads = len(case.inputs["conv"]), layer.state[0].shape[0]
    # What is left after the strong ones has to be as good as without them.
    decay = torch.full((tokens, heads), -1e-3)
    decay[::7] = -90.0
    decay[5::7] = 0.0
    if layer.rule == "gdn":
        case.inputs["decay"] = decay
        case.inputs["beta"] = torch.full((tokens, heads), 0.9999)
        keys = (layer.log[0].shape[0] - heads * layer.state[0].shape[2]) // 2
        case.inputs["conv"] = case.inputs["conv"].clone()
        case.inputs["conv"][:, keys : 2 * keys] = case.inputs["conv"][:1, keys : 2 * keys]
    else:
        case.inputs["dt"] = -decay
        case.weights["A"] = -torch.ones(heads)
    expected, expected_state, _ = case.run(REFERENCE[layer.rule])
    got, state, _ = case.run(TRITON[layer.rule])
    assert case.step.count.max() > TOKENS
    slots = case.step.slot
    assert far(got, expected) < 4e-6
    assert far(state["state"][slots], expected_state["state"][slots]) < 4e-6


@pytest.mark.parametrize("layer", SMALL, ids=name_of)
def test_companions_and_whole_chunks_change_no_long_row_bitwise(layer: Recurrent) -> None:
    toy, tokens = Toy((layer,)), random_tokens(4 * TOKENS + 20)
    alone = make_arena((layer,), max_num_seqs=1, backend="triton")
    expected = toy.feed(alone, alone.open(), tokens)
    arena = make_arena((layer,), backend="triton")
    sequence, companion = arena.open(), arena.open()
    start = 0
    for count in (TOKENS, 2 * TOKENS, TOKENS, 20):
        chunks = [Chunk(sequence, tokens[start : start + count]), Chunk(companion, random_tokens(40, seed=count))]
        (out, _) = toy.run(arena, *chunks)
        same = expected[start : start + count]
        # What is left is fewer than go in chunks, so it goes token by token.
        assert torch.equal(out, same) if count >= LONG else far(out, same) < 2e-6
        for chunk in chunks:
            arena.advance(chunk.sequence, len(chunk.tokens))
        start += count


@triton.jit
def find_all(  # noqa: ANN201 (Triton's, as are its arguments' types)
    counts,  # noqa: ANN001
    certains,  # noqa: ANN001
    replays,  # noqa: ANN001
    rows,  # noqa: ANN001
    places,  # noqa: ANN001
    starts,  # noqa: ANN001
    SIZE: tl.constexpr,
    LONG: tl.constexpr,
):
    row, start = find_part(tl.program_id(0), counts, certains, replays, rows, SIZE, LONG)
    tl.store(places + tl.program_id(0), row)
    tl.store(starts + tl.program_id(0), start)


@pytest.mark.parametrize("long", [0, LONG])
@pytest.mark.parametrize("seed", range(2))
def test_every_part_of_every_row_is_found(seed: int, long: int) -> None:
    chance = random.Random(seed)
    rows, drafts = 140, 5
    counts = [chance.choice((0, 1, 1, 1, 3, LONG - 1, LONG, 3 * TOKENS - 2)) for _ in range(rows)]
    replays = [chance.randint(0, drafts) if count else 0 for count in counts]
    certains = [count - chance.choice((0, min(count, drafts))) for count in counts]
    described = zip(counts, certains, replays, strict=True)
    lengths = [
        count + replay if long == 0 or (count >= long and certain == count) else 0
        for count, certain, replay in described
    ]
    wanted = [(row, start) for row, length in enumerate(lengths) for start in range(0, length, TOKENS)]
    bound = rows if long == 0 else min(rows, sum(counts) // LONG)
    most = most_parts(sum(counts), bound, drafts, TOKENS)
    assert len(wanted) <= most
    found = torch.zeros(2, most, dtype=torch.int32)
    find_all[(most,)](*(torch.tensor(x) for x in (counts, certains, replays)), rows, *found, TOKENS, long)
    assert [(row, start) for row, start in found.T.tolist() if row >= 0] == wanted
    assert found[0, len(wanted) :].eq(-1).all()


def test_more_numbers_than_32_bits_count_are_refused() -> None:
    case = random_case(LAYERS[0], torch.float32, 0, (LONG,), most_drafts=0)
    with pytest.raises(Refused, match=r"count numbers of a step in 32 bits, which \d+ places of 100000000 exceed"):
        most_long(case.step, 5, 10**8)


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
    beginning = whole.open()
    # In pieces that go token by token, as all that is compared does.
    expected = torch.cat(
        [toy.feed(whole, beginning, tokens[start : start + LONG - 1]) for start in range(0, 60, LONG - 1)]
    )
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
