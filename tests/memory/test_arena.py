"""What the arena promises: schedules change nothing, every byte is accounted for, and nothing stale is read."""

from __future__ import annotations

import copy
import itertools
import random
import re
from array import array

import pytest
import torch
from memory.toys import (
    HYBRID,
    Toy,
    formats_of,
    gdn,
    gqa,
    make_arena,
    make_plan,
    mamba2,
    mla,
    model_spec,
    random_tokens,
    states,
)

from truekv.core.batch import Chunk
from truekv.core.errors import Corrupted, Refused
from truekv.formats.choice import codecs
from truekv.kernels.table import select
from truekv.memory.arena import Arena, OutOfPages, OutOfSlots
from truekv.memory.plan import plan

TOY = Toy()
RECURRENT = (gdn(), mamba2())
EDGES = (31, 32, 33, 63, 64, 65)


def chunked(tokens: list[int], sizes: list[int]) -> list[list[int]]:
    """Cut tokens into chunks of the given sizes, repeated as often as needed."""
    cuts: list[list[int]] = []
    cycle = itertools.cycle(sizes)
    while tokens:
        size = next(cycle)
        cuts.append(tokens[:size])
        tokens = tokens[size:]
    return cuts


@pytest.mark.parametrize("sizes", [[1], [7], [32], [1, 31, 2], [64, 1, 3], [33, 31, 65]])
@pytest.mark.parametrize("length", [1, 2, *EDGES, 150])
def test_any_chunking_equals_one_shot_bitwise(length: int, sizes: list[int]) -> None:
    tokens = random_tokens(length, seed=length)
    arena = make_arena()
    sequence = arena.open()
    parts = [TOY.feed(arena, sequence, part) for part in chunked(tokens, sizes)]
    assert torch.equal(torch.cat(parts), TOY.plain(tuple(tokens)))
    assert arena.kernels.calls["scan[gdn]"] == len(parts)
    assert arena.kernels.calls["attend[f32/f32]"] == 3 * len(parts)


@pytest.mark.parametrize("name", sorted(codecs()))
def test_any_chunking_equals_one_shot_bitwise_in_every_format(name: str) -> None:
    layers = (gqa(heads=2, dim=64), mla(latent=64, rope=32))
    toy = Toy(layers)
    tokens = random_tokens(70)
    arena = make_arena(layers, name)
    sequence = arena.open()
    parts = [toy.feed(arena, sequence, part) for part in chunked(tokens, [33, 1, 5])]
    assert torch.equal(torch.cat(parts), toy.plain(tuple(tokens), name))
    assert arena.kernels.calls[f"store[{name}]"] in (3 * len(parts), 4 * len(parts))
    assert sum(count for call, count in arena.kernels.calls.items() if call.startswith("attend[")) == 2 * len(parts)


@pytest.mark.parametrize("seed", range(8))
def test_companions_order_pages_and_slots_change_nothing(seed: int) -> None:
    pick = random.Random(seed)
    arena = make_arena(drafts=2)
    pick.shuffle(arena._free_pages)
    pick.shuffle(arena._free_slots)
    sequences = {arena.open(): random_tokens(pick.choice((*EDGES, 5, 90)), seed=100 * seed + n) for n in range(3)}
    done = {sequence: [] for sequence in sequences}
    while any(len(tokens) > sequence.position for sequence, tokens in sequences.items()):
        turn = [s for s in sequences if s.position < len(sequences[s]) and pick.random() < 0.8]
        pick.shuffle(turn)
        chunks = [Chunk(s, sequences[s][s.position :][: pick.choice((1, 2, 13, 40))]) for s in turn]
        if not chunks:
            continue
        for chunk, out in zip(chunks, TOY.run(arena, *chunks), strict=True):
            done[chunk.sequence].append(out)
            arena.advance(chunk.sequence, len(chunk.tokens))
        arena.check()
    for sequence, tokens in sequences.items():
        assert torch.equal(torch.cat(done[sequence]), TOY.plain(tuple(tokens)))


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "kv4"])
def test_poison_changes_nothing(name: str) -> None:
    layers = (gdn(), gqa(dim=64), mamba2(), mla(64, 32), gqa(dim=64, window=20))
    toy = Toy(layers)
    outputs: list[list[torch.Tensor]] = []
    for poison in (False, True):
        arena = make_arena(layers, name, poison=poison, drafts=3, max_num_seqs=2)
        first, second = arena.open(), arena.open()
        got = toy.run(arena, Chunk(first, random_tokens(40)), Chunk(second, random_tokens(5), 3))
        arena.advance(first, 40)
        arena.advance(second, 3)
        got += toy.run(arena, Chunk(second, random_tokens(30, seed=1)), Chunk(first, random_tokens(4, seed=2), 3))
        arena.advance(second, 30)
        arena.advance(first, 1)
        arena.close(first)
        third = arena.open()
        got += toy.run(arena, Chunk(third, random_tokens(65, seed=3)), Chunk(second, random_tokens(2, seed=4), 1))
        outputs.append(got)
    assert all(torch.equal(plain, poisoned) for plain, poisoned in zip(*outputs, strict=True))


def test_poison_fills_what_is_not_real_and_nothing_else() -> None:
    arena = make_arena((gqa(), gdn()), drafts=3, max_num_seqs=2)
    pages, slots = arena._paged()[0], arena._states()[0]
    assert (pages.data == 0xFF).all()
    assert all(torch.isnan(slab).all() for slab in (*slots.state.values(), *slots.log.values()))
    sequence = arena.open()
    toy = Toy((gqa(), gdn()))
    toy.run(arena, Chunk(sequence, random_tokens(35), 3))
    arena.advance(sequence, 33)
    rows = pages.data[sequence.pages].view(2, 2, 2, 32, 64)  # pages, fields, heads, lines, bytes
    assert not (rows[0] == 0xFF).all(-1).any()
    assert not (rows[1, :, :, 0] == 0xFF).all(-1).any()
    assert (rows[1, :, :, 1:] == 0xFF).all()
    log = slots.log["conv"][sequence.slot]
    assert torch.isfinite(log[0]).all()
    assert torch.isnan(log[1:]).all()
    slot = sequence.slot
    arena.close(sequence)
    assert (pages.data == 0xFF).all()
    assert all(torch.isnan(slab[slot]).all() for slab in (*slots.state.values(), *slots.log.values()))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(range(4), repeat=2)))
def test_accepting_any_number_of_drafts_equals_the_plain_run(first: int, second: int) -> None:
    """Two sequences, two verified steps of three drafts, every pair of accepted counts, then one plain step."""
    arena = make_arena(drafts=3, max_num_seqs=2)
    pair = [arena.open(), arena.open()]
    real = [random_tokens(30, seed=1), random_tokens(2, seed=2)]
    for out, tokens in zip(TOY.run(arena, *map(Chunk, pair, real)), real, strict=True):
        assert torch.equal(out, TOY.plain(tuple(tokens)))
    for sequence, tokens in zip(pair, real, strict=True):
        arena.advance(sequence, len(tokens))
    for turn, accepted in enumerate(((first, second), (second, first))):
        new = [random_tokens(4, seed=10 * turn + row) for row in range(2)]
        outs = TOY.run(arena, *(Chunk(sequence, part, 3) for sequence, part in zip(pair, new, strict=True)))
        for row in range(2):
            # The logits of drafts count too: those of rejected ones decide the rejection.
            assert torch.equal(outs[row], TOY.plain((*real[row], *new[row]))[-4:])
            arena.advance(pair[row], 1 + accepted[row])
            real[row] = real[row] + new[row][: 1 + accepted[row]]
        arena.check()
    # One sequence gets a long chunk, the other a single token.
    last = [random_tokens(40, seed=5), random_tokens(1, seed=6)]
    for row, out in enumerate(TOY.run(arena, *map(Chunk, pair, last))):
        real[row] = real[row] + last[row]
        assert torch.equal(out, TOY.plain(tuple(real[row]))[-len(last[row]) :])
        arena.advance(pair[row], len(last[row]))
        plain = make_arena(poison=False, max_num_seqs=1)
        alone = plain.open()
        TOY.feed(plain, alone, real[row])
        assert all(map(torch.equal, states(arena, pair[row]), states(plain, alone)))


@pytest.mark.parametrize("layer", RECURRENT, ids=lambda layer: layer.rule)
@pytest.mark.parametrize("accepted", range(6))
def test_the_state_and_the_convolution_tail_hold_exactly_the_real_tokens(layer: object, accepted: int) -> None:
    """Fewer tokens than taps at the start, so the tail still holds zeros from before the sequence."""
    toy = Toy((layer,))
    arena = make_arena((layer,), drafts=5, max_num_seqs=1)
    sequence = arena.open()
    tokens = random_tokens(6)
    toy.run(arena, Chunk(sequence, tokens, 5))
    arena.advance(sequence, 1 + accepted)
    assert sequence.replay == accepted
    toy.feed(arena, sequence, [9])
    plain = make_arena((layer,), poison=False, max_num_seqs=1)
    alone = plain.open()
    toy.feed(plain, alone, [*tokens[: 1 + accepted], 9])
    assert all(map(torch.equal, states(arena, sequence), states(plain, alone)))
    tail = arena._states()[0].state["conv"][sequence.slot]
    inputs = toy.tables[0]["conv"][torch.tensor([*tokens[: 1 + accepted], 9])]
    expected = torch.cat([torch.zeros(3, inputs.shape[1]), inputs])[-3:].T
    assert torch.equal(tail, expected)


def test_a_chunk_without_tokens_folds_the_log_and_rides_along() -> None:
    arena = make_arena(RECURRENT, drafts=2, max_num_seqs=2)
    toy = Toy(RECURRENT)
    idle, busy = arena.open(), arena.open()
    toy.run(arena, Chunk(idle, [1, 2, 3], 2), Chunk(busy, [4]))
    arena.advance(idle, 3)
    arena.advance(busy, 1)
    _, out = toy.run(arena, Chunk(idle, []), Chunk(busy, [5]))
    arena.advance(idle, 0)
    arena.advance(busy, 1)
    assert (idle.position, idle.replay) == (3, 0)
    assert torch.equal(out, toy.plain((4, 5))[-1:])
    assert torch.equal(toy.feed(arena, idle, [6]), toy.plain((1, 2, 3, 6))[-1:])


def test_a_chunk_of_drafts_alone_may_be_rejected_whole() -> None:
    arena = make_arena(drafts=3)
    sequence = arena.open()
    TOY.feed(arena, sequence, [1, 2])
    TOY.run(arena, Chunk(sequence, [7, 8, 9], 3))
    arena.advance(sequence, 0)
    assert torch.equal(TOY.feed(arena, sequence, [3]), TOY.plain((1, 2, 3))[-1:])


@pytest.mark.parametrize("length", [1, *EDGES])
@pytest.mark.parametrize("drafts", [0, 1, 4])
def test_pages_follow_the_position_at_every_edge(length: int, drafts: int) -> None:
    arena = make_arena((gqa(),), drafts=4)
    total = arena.plan.pages
    sequence = arena.open()
    arena.reserve([Chunk(sequence, [0] * (length + drafts), drafts)])
    assert len(sequence.pages) == -(-(length + drafts) // 32)
    arena.advance(sequence, length)
    assert len(sequence.pages) == -(-length // 32)
    assert arena.free_pages + arena.held_pages == total
    arena.check()
    arena.close(sequence)
    assert (arena.free_pages, arena.free_slots) == (total, arena.plan.slots)


def test_closing_between_reserve_and_advance_returns_everything() -> None:
    arena = make_arena(drafts=2, max_num_seqs=2)
    kept, aborted = arena.open(), arena.open()
    TOY.run(arena, Chunk(kept, [1, 2, 3]), Chunk(aborted, random_tokens(70), 2))
    arena.close(aborted)
    arena.advance(kept, 3)
    arena.check()
    assert arena.free_pages == arena.plan.pages - 1
    again = arena.open()
    out = TOY.run(arena, Chunk(again, random_tokens(33, seed=3)), Chunk(kept, [4]))
    assert torch.equal(out[0], TOY.plain(tuple(random_tokens(33, seed=3))))
    assert torch.equal(out[1], TOY.plain((1, 2, 3, 4))[-1:])


def test_running_out_of_pages_changes_nothing() -> None:
    layers = (gqa(), gdn())
    page, slot = make_plan(layers).page_bytes, make_plan(layers).state_bytes_per_sequence
    arena = make_arena(layers, memory=3 * page + 2 * slot, max_num_seqs=2, max_model_len=90)
    toy = Toy(layers)
    first, second = arena.open(), arena.open()
    toy.feed(arena, first, random_tokens(40))
    with pytest.raises(OutOfPages, match="needs 3 more pages of 32 tokens, but 1 of 3 are free"):
        arena.reserve([Chunk(first, random_tokens(30)), Chunk(second, random_tokens(40))])
    assert (first.position, first.reserved, list(second.pages), second.reserved) == (40, None, [], None)
    arena.check()
    assert torch.equal(toy.feed(arena, second, [5]), toy.plain((5,)))


def test_slots_run_out_in_one_sentence() -> None:
    arena = make_arena(max_num_seqs=1)
    arena.open()
    with pytest.raises(OutOfSlots, match="all 1 sequence slots are in use"):
        arena.open()


def test_a_reopened_slot_starts_from_zero() -> None:
    arena = make_arena(poison=False, max_num_seqs=1)
    first = arena.open()
    TOY.feed(arena, first, random_tokens(50))
    arena.close(first)
    again = arena.open()
    assert torch.equal(TOY.feed(arena, again, [3, 4]), TOY.plain((3, 4)))


def test_a_sequence_that_is_not_what_its_slot_holds_is_corrupted() -> None:
    arena = make_arena(drafts=2)
    sequence, other = arena.open(), arena.open()
    TOY.feed(arena, sequence, [1, 2, 3])
    stale = copy.copy(sequence)
    with pytest.raises(Corrupted, match="does not own slot"):
        arena.reserve([Chunk(stale, [4])])
    for name, value in (("position", 2), ("replay", 1), ("pages", []), ("pages", [3]), ("reserved", (1, 0))):
        wrong = getattr(sequence, name)
        setattr(sequence, name, value)
        with pytest.raises(Corrupted, match=f"says {name} = .*; only the arena may change that"):
            arena.reserve([Chunk(sequence, [4])])
        setattr(sequence, name, wrong)
    sequence.slot, other.slot = other.slot, sequence.slot
    with pytest.raises(Corrupted, match="does not own slot"):
        arena.reserve([Chunk(sequence, [4])])
    sequence.slot, other.slot = other.slot, sequence.slot
    assert torch.equal(TOY.feed(arena, sequence, [4]), TOY.plain((1, 2, 3, 4))[-1:])
    arena.close(sequence)
    for verb in (arena.close, lambda gone: arena.advance(gone, 1), lambda gone: arena.reserve([Chunk(gone, [1])])):
        with pytest.raises(Corrupted, match="is closed"):
            verb(sequence)
    with pytest.raises(Corrupted, match="does not own slot"):
        arena.close(stale)


def test_closing_a_sequence_that_was_tampered_with_returns_what_was_handed_out() -> None:
    arena = make_arena((gqa(),))
    sequence = arena.open()
    arena.reserve([Chunk(sequence, [0] * 40)])
    sequence.pages, sequence.position = array("q", [arena.plan.pages - 1]), 7
    arena.close(sequence)
    arena.check()
    assert arena.free_pages == arena.plan.pages


def test_a_step_that_is_run_twice_or_skipped_is_noticed_by_the_state() -> None:
    arena = make_arena(RECURRENT)
    toy = Toy(RECURRENT)
    sequence = arena.open()
    step = arena.reserve([Chunk(sequence, [1, 2])])
    toy.forward(step, arena.layers)
    with pytest.raises(Corrupted, match="layer 0: slot 0 holds the state after 2 tokens, but the step expects 0"):
        toy.forward(step, arena.layers)
    arena.advance(sequence, 2)
    arena.reserve([Chunk(sequence, [3])])
    arena.advance(sequence, 1)
    with pytest.raises(Corrupted, match="after 2 tokens, but the step expects 3"):
        toy.run(arena, Chunk(sequence, [4]))


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_non_finite_row_is_corrupted_and_named(value: float) -> None:
    arena = make_arena((gdn(), gqa()))
    sequence = arena.open()
    before = arena._paged()[0].data.clone()
    step = arena.reserve([Chunk(sequence, [1, 2, 3])])
    rows = torch.randn(3, 2, 16)
    bad = rows.clone()
    bad[1, 0, 7] = value
    with pytest.raises(Corrupted, match="layer 1: the rows of 'v' hold NaN or infinity for 1 of 3 tokens"):
        arena.layers[1].attend((torch.randn(3, 2, 16),), (rows, bad), 1.0, step)
    assert torch.equal(arena._paged()[0].data, before)
    toy = Toy((gdn(),))
    inputs = {name: table[step.tokens] for name, table in toy.tables[0].items()}
    inputs["decay"] = inputs["decay"].clone().fill_(value)
    with pytest.raises(Corrupted, match="layer 0: the input 'decay' of the rule gdn"):
        arena.layers[0].scan(inputs, toy.weights[0], step)


def test_a_state_that_overflows_is_corrupted_and_named() -> None:
    arena = make_arena((mamba2(),))
    toy = Toy((mamba2(),))
    toy.weights[0]["A"] = torch.full((4,), 50.0)  # a growing state: no model has it, a broken checkpoint may
    sequence = arena.open()
    with pytest.raises(Corrupted, match="layer 0: the state 'state' of the rule mamba2"):
        toy.feed(arena, sequence, random_tokens(60))


def test_misuse_is_refused_in_one_sentence() -> None:
    arena = make_arena(drafts=2, max_model_len=64)
    sequence = arena.open()
    for chunks, sentence in (
        ([], "without any token"),
        ([Chunk(sequence, [])], "without any token"),
        ([Chunk(sequence, [1]), Chunk(sequence, [2])], "two chunks of one sequence"),
        ([Chunk(sequence, [1, 2, 3, 4], 3)], "has 3 drafts, but the plan logs at most 2"),
        ([Chunk(sequence, [1], 2)], "a chunk of 1 tokens has 2 drafts"),
        ([Chunk(sequence, [1], -1)], "has -1 drafts"),
        ([Chunk(sequence, [1] * 65)], "cannot take 65 more: the context ends at 64"),
    ):
        with pytest.raises(Refused, match=re.escape(sentence)):
            arena.reserve(chunks)
    with pytest.raises(Refused, match="without a reserved step"):
        arena.advance(sequence, 1)
    arena.reserve([Chunk(sequence, [1, 2, 3, 4], 2)])
    with pytest.raises(Refused, match="reserved again"):
        arena.reserve([Chunk(sequence, [5])])
    for count in (-1, 0, 1, 5):
        with pytest.raises(Refused, match="can be advanced by 2 to 4"):
            arena.advance(sequence, count)
    arena.check()
    arena.advance(sequence, 2)


def test_accounting_notices_a_lost_page_and_a_page_held_twice() -> None:
    arena = make_arena((gqa(),))
    sequence = arena.open()
    arena.reserve([Chunk(sequence, [1] * 40)])
    lost = arena._free_pages.pop()
    with pytest.raises(Corrupted, match="pages are free, held or cached"):
        arena.check()
    arena._free_pages += [lost, sequence.pages[0]]
    with pytest.raises(Corrupted, match="pages are free, held or cached"):
        arena.check()


def test_zeros_signs_and_denormals_come_back_as_they_went_in() -> None:
    arena = make_arena((gqa(heads=1, dim=16),), max_num_seqs=1)
    sequence = arena.open()
    rows = torch.tensor([-0.0, 0.0, 1e-45, -1e-45, 1.17e-38, 3e38, -3e38, 1.0] * 2)[None, None]
    step = arena.reserve([Chunk(sequence, [0])])
    out = arena.layers[0].attend((torch.zeros(1, 1, 16),), (rows, rows), 1.0, step)
    # One key only: the softmax is exactly one, so the value comes through unchanged.
    assert torch.equal(out[0, 0], rows[0, 0])
    stored = arena._paged()[0]
    line = stored.data[sequence.pages[0], :64].view(torch.float32)
    assert torch.equal(line.view(torch.int32), rows[0, 0].view(torch.int32))


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "kv4", "kv3", "q4_0", "turboquant_4bit"])
@pytest.mark.parametrize("drafts", [0, 3])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_allocated_is_what_was_planned(name: str, drafts: int, dtype: str) -> None:
    layers = (*HYBRID[:1], gqa(3, 64), *HYBRID[2:4], mla(64, 32))
    draft_layers = (gqa(1, 64),)
    spec = model_spec(layers, draft_layers)
    formats, draft_formats = formats_of(layers, name), formats_of(draft_layers, name)
    planned = plan(
        spec,
        formats,
        memory=5_000_000,
        max_num_seqs=3,
        drafts=drafts,
        dtype=dtype,
        draft_formats=draft_formats if drafts else None,
        checkpoints=2 * drafts,
    )
    arena = Arena(spec, planned, select(spec, formats, draft_formats))
    assert arena.nbytes == planned.total_bytes
    assert 0 <= 5_000_000 - planned.total_bytes < planned.page_bytes
    assert sum(layer.data.nbytes for layer in arena._paged()) == planned.pages * planned.page_bytes
    assert len(arena.draft_layers) == (1 if drafts else 0)


def test_bfloat16_states_keep_their_chunking_invariance() -> None:
    """The convolution's inputs are stored in the compute dtype, so a chunk's edge must not be rounded twice."""
    toy = Toy(RECURRENT)
    for table, weights in zip(toy.tables, toy.weights, strict=True):
        for held in (table, weights):
            held |= {name: values.bfloat16() for name, values in held.items() if name.startswith("conv")}
    outputs: list[torch.Tensor] = []
    for sizes in ([50], [1], [7, 2]):
        arena = make_arena(RECURRENT, dtype="bfloat16")
        sequence = arena.open()
        outputs.append(torch.cat([toy.feed(arena, sequence, part) for part in chunked(random_tokens(50), sizes)]))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
