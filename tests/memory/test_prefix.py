"""What the prefix cache promises: a hit is a miss that costs less, and nobody sees what is not committed."""

from __future__ import annotations

import pytest
import torch
from memory.toys import Toy, formats_of, gdn, gqa, make_arena, mamba2, mla, model_spec, random_tokens, states

from truekv.core.batch import Chunk, Sequence
from truekv.core.errors import Corrupted, Refused
from truekv.core.spec import Recurrent
from truekv.kernels.table import select
from truekv.memory.arena import Arena, OutOfPages
from truekv.memory.plan import plan
from truekv.memory.prefix import UNLIMITED, PrefixStats

ATTENTION = Toy((gqa(1, 16), mla(16, 16), gqa(1, 16, window=20)))
HYBRID = Toy((gdn(1, 2, 4, 4), gqa(1, 16), mamba2(2, 4, 1, 4), gqa(1, 16, window=9)))
WIDE = Toy((gqa(1, 64, window=20), mla(64, 32), gqa(1, 64)))
WIDE_HYBRID = Toy((gdn(1, 2, 4, 4), gqa(1, 64), mla(64, 32)))
KINDS = pytest.mark.parametrize("toy", [ATTENTION, HYBRID], ids=["attention", "hybrid"])


def recurrent(toy: Toy) -> bool:
    return any(isinstance(layer, Recurrent) for layer in toy.layers)


def cached(toy: Toy, name: str = "f32", *, interval: int = 1024, pages: int | None = None, **planned: object) -> Arena:
    """An arena with a prefix cache, poison, and so many pages."""
    settings = {"checkpoints": 12 if recurrent(toy) else 0, "max_model_len": 400} | planned
    if pages is not None:
        roomy = make_arena(toy.layers, name, **settings).plan
        settings["memory"] = roomy.total_bytes + (pages - roomy.pages) * roomy.page_bytes
        settings["max_model_len"] = 32 * pages
    return make_arena(toy.layers, name, interval=interval, **settings)


def catch_up(toy: Toy, arena: Arena, sequence: Sequence, tokens: list[int], most: int = 1000) -> None:
    """Compute what memory does not hold of `tokens`, in chunks as the cache wants, and compare with a plain run."""
    expected = toy.plain(tuple(tokens))
    while (start := sequence.position) < len(tokens):
        end = start + min(most, arena.certain_limit(sequence), len(tokens) - start)
        assert torch.equal(toy.feed(arena, sequence, tokens[start:end]), expected[start:end])
        arena.check()


def run(toy: Toy, arena: Arena, prompt: list[int], answer: list[int] | None = None, salt: str = "") -> int:
    """Compute a request, its answer token by token, and close it; return its hit."""
    sequence = arena.open(prompt, salt=salt)
    hit = sequence.position
    catch_up(toy, arena, sequence, prompt)
    catch_up(toy, arena, sequence, [*prompt, *(answer or [])], most=1)
    arena.close(sequence)
    arena.check()
    return hit


@pytest.mark.parametrize(
    ("toy", "name"), [(ATTENTION, "f32"), (HYBRID, "f32"), (WIDE, "kv4"), (WIDE, "int8"), (WIDE_HYBRID, "kv4")]
)
def test_a_hit_of_every_length_computes_what_a_miss_computes(toy: Toy, name: str) -> None:
    stem = random_tokens(101)
    arena = cached(toy, name, interval=32)
    first = arena.open(stem)
    for start in range(0, len(stem), 32):
        toy.feed(arena, first, stem[start : start + 32])
    arena.close(first)
    for shared in range(101):
        tokens = [*stem[:shared], (stem[shared] + 1) % 64, *random_tokens(3, seed=shared)]
        sequence = arena.open(tokens)
        assert sequence.position == (shared // 32 * 32 if recurrent(toy) else shared)
        out = toy.feed(arena, sequence, tokens[sequence.position :])
        assert torch.equal(out, toy.plain(tuple(tokens), name)[-len(out) :])
        # A suspect, so that the next one finds the stem alone.
        arena.close(sequence, suspect=True)
        arena.check()
    assert arena.prefix.hits == (101 - 32 if recurrent(toy) else 100)
    assert arena.prefix.misses == (1 + 32 if recurrent(toy) else 2)


@KINDS
def test_a_known_prompt_leaves_one_token_to_compute(toy: Toy) -> None:
    for length in (1, 2, 31, 32, 33, 64, 65):
        arena = cached(toy)
        tokens = random_tokens(length)
        assert run(toy, arena, tokens) == 0
        expected = (length - 1) // 32 * 32 if recurrent(toy) else length - 1
        assert run(toy, arena, tokens) == expected
        assert run(toy, arena, tokens) == expected


@KINDS
@pytest.mark.parametrize("length", [63, 64, 65])
@pytest.mark.parametrize("generated", [1, 31, 32, 33, 70])
def test_the_next_turn_of_a_chat_starts_from_the_last_complete_page_of_the_answer(
    toy: Toy, length: int, generated: int
) -> None:
    arena = cached(toy)
    prompt, answer = random_tokens(length), random_tokens(generated, seed=1)
    run(toy, arena, prompt, answer)
    held = length + generated
    second = [*prompt, *answer, *random_tokens(20, seed=2)]
    assert run(toy, arena, second) == (held // 32 * 32 if recurrent(toy) else held)
    # An answer leaves one state behind, however many pages it has; the prompts left theirs.
    if recurrent(toy):
        boundaries = {(length - 1) // 32, held // 32, (len(second) - 1) // 32, len(second) // 32}
        assert arena.prefix.checkpoints == len(boundaries - {0})


def test_two_sequences_that_part_inside_a_page_write_to_pages_of_their_own() -> None:
    toy, stem = ATTENTION, random_tokens(40)
    arena = cached(toy)
    first = arena.open([*stem, 1])
    catch_up(toy, arena, first, [*stem, 1])
    other = arena.open([*stem[:32], *stem[32:], 1])
    assert other.position == 32
    run(toy, arena, stem)
    # The tail of the one that was closed holds eight tokens more.
    pair = [arena.open([*stem, 5, 6]), first]
    assert pair[0].position == 40
    assert pair[0].pages[0] == first.pages[0]
    assert pair[0].pages[1] != first.pages[1]
    (page,) = pair[0].pages[1:]
    for layer in arena._paged():
        lines = layer.data[page].view(len(layer.layer.fields), 32, -1)
        assert (lines[:, 8:] == 0xFF).all()
        assert not (lines[:, :8] == 0xFF).all(-1).any()
    catch_up(toy, arena, pair[0], [*stem, 5, 6])
    catch_up(toy, arena, first, [*stem, 1, 2, 3])
    catch_up(toy, arena, other, [*stem, 1, 9])
    for sequence in (*pair, other):
        arena.close(sequence)
    assert run(toy, arena, [*stem, 5, 6, 7]) == 42
    assert run(toy, arena, [*stem, 1, 2, 3, 4]) == 43
    assert run(toy, arena, [*stem, 1, 9, 4]) == 42


def test_rows_of_draft_layers_are_shared_and_copied_like_all_others() -> None:
    layers, draft_layers = (gqa(1, 16),), (gqa(1, 16),)
    spec, formats = model_spec(layers, draft_layers), formats_of(layers)
    planned = plan(spec, formats, max_model_len=100, max_num_seqs=2, draft_formats=formats)
    arena = Arena(spec, planned, select(spec, formats, formats), poison=True, prefix_interval=32)
    toy, tokens = Toy(layers), random_tokens(40)
    first = arena.open(tokens)
    toy.run(arena, Chunk(first, tokens))
    toy.forward(arena.draft_step([(first, 0, tokens)]), arena.draft_layers)
    arena.advance(first, 40)
    pages = first.pages
    arena.close(first)
    second = arena.open([*tokens[:36], 1])
    assert (second.position, second.pages[0]) == (36, pages[0])
    for layer in arena._paged():
        kept, copied = layer.data[[pages[1], second.pages[1]]].view(2, 2, 32, 64).unbind()
        assert torch.equal(kept[:, :4], copied[:, :4])
        assert not (kept[:, 4:8] == 0xFF).all(-1).any()
        assert (copied[:, 4:] == 0xFF).all()
    assert len(arena._paged()) == 2


@KINDS
def test_nothing_is_visible_before_it_is_advanced_over(toy: Toy) -> None:
    arena = cached(toy, drafts=3)
    tokens = random_tokens(64)
    sequence = arena.open(tokens)
    toy.run(arena, Chunk(sequence, tokens[:32]))
    assert not arena._cache.tree.roots
    waiting = arena.open(tokens)
    assert waiting.position == 0
    arena.advance(sequence, 32)
    assert len(arena._cache.tree.checkpoints) == recurrent(toy)
    late = arena.open(tokens)
    assert late.position == 32
    # An aborted step leaves what was real before it.
    toy.run(arena, Chunk(sequence, tokens[32:]))
    arena.close(sequence)
    arena.check()
    catch_up(toy, arena, waiting, tokens)
    catch_up(toy, arena, late, tokens)
    assert waiting.pages == late.pages
    assert arena.held_pages == 2


@KINDS
def test_rejected_drafts_are_never_published(toy: Toy) -> None:
    arena = cached(toy, drafts=3, max_num_seqs=3)
    tokens = random_tokens(60)
    sequence = arena.open(tokens[:30])
    catch_up(toy, arena, sequence, tokens[:30])
    # Of a draft over the page's edge the part up to the edge is accepted, the part behind it is not.
    toy.run(arena, Chunk(sequence, [tokens[30], tokens[31], 7, 8], 3))
    arena.advance(sequence, 2)
    assert arena._cache.tree.roots[""].order == [tuple(tokens[:32])]
    arena.check()
    out = toy.run(arena, Chunk(sequence, [*tokens[32:34], 9], 1))[0]
    assert torch.equal(out, toy.plain((*tokens[:34], 9))[-3:])
    arena.advance(sequence, 2)
    arena.close(sequence)
    wrong, right = arena.open([*tokens[:34], 9, 9]), arena.open([*tokens[:32], 7, 8, 9])
    assert (wrong.position, right.position) == ((0, 0) if recurrent(toy) else (34, 32))
    catch_up(toy, arena, wrong, [*tokens[:34], 9, 9])
    catch_up(toy, arena, right, [*tokens[:32], 7, 8, 9])


@pytest.mark.parametrize("accepted", range(4))
@pytest.mark.parametrize("begin", range(26, 33))
def test_drafts_within_their_limit_never_jump_over_a_state(begin: int, accepted: int) -> None:
    toy = HYBRID
    arena = cached(toy, drafts=3, max_num_seqs=1)
    real, drafted = random_tokens(begin), 0
    sequence = arena.open(real)
    catch_up(toy, arena, sequence, real)
    while len(real) < 70:
        limit = arena.draft_limit(sequence)
        assert limit > 1000 if len(real) % 32 == 31 else limit == max(0, 30 - len(real) % 32)
        drafts = min(3, limit)
        chunk = random_tokens(1 + drafts, seed=len(real))
        out = toy.run(arena, Chunk(sequence, chunk, drafts))[0]
        assert torch.equal(out, toy.plain((*real, *chunk))[len(real) :])
        kept = 1 + min(accepted, drafts)
        arena.advance(sequence, kept)
        real += chunk[:kept]
        drafted += kept - 1
        arena.check()
    assert (drafted > 0) == (accepted > 0)
    saved = arena._cache.tree.match("", real, 32)[1].checkpoint
    assert saved >= 0
    plain = make_arena(toy.layers, poison=False, max_num_seqs=1)
    alone = plain.open()
    toy.feed(plain, alone, real[:64])
    slabs = [slab[saved] for layer in arena._states() for slab in layer.state.values()]
    assert all(map(torch.equal, slabs, states(plain, alone)))
    arena.close(sequence)
    assert run(toy, arena, [*real[:64], 1, 2]) == 64


def test_a_state_that_another_sequence_started_from_stays_where_it_is() -> None:
    arena = cached(HYBRID)
    tokens = random_tokens(100)
    first = arena.open(tokens[:40])
    catch_up(HYBRID, arena, first, tokens[:65])
    second = arena.open([*tokens[:64], 1])
    assert second.position == 64
    catch_up(HYBRID, arena, first, tokens)
    saved = [node.checkpoint >= 0 for node in arena._leases[first.slot].nodes]
    assert saved == [True, True, True]
    arena.close(second)
    assert run(HYBRID, arena, [*tokens[:64], 2]) == 64


@KINDS
def test_without_drafts_or_recurrent_layers_nothing_is_limited(toy: Toy) -> None:
    plain = make_arena(toy.layers)
    assert plain.certain_limit(sequence := plain.open([1] * 100)) == UNLIMITED == plain.draft_limit(sequence)
    assert plain.prefix == PrefixStats()
    assert plain.available_pages == plain.free_pages == plain.plan.pages
    arena = cached(toy)
    assert arena.certain_limit(arena.open([1] * 100)) == (96 if recurrent(toy) else UNLIMITED)


def test_a_hybrid_without_saved_states_caches_nothing() -> None:
    arena = make_arena(HYBRID.layers, interval=32)
    assert run(HYBRID, arena, random_tokens(70)) == 0
    assert run(HYBRID, arena, random_tokens(70)) == 0
    assert (arena.cached_pages, arena.free_pages) == (0, arena.plan.pages)


def test_long_prompts_leave_states_at_intervals_rounded_to_pages() -> None:
    arena = cached(HYBRID, interval=40)
    run(HYBRID, arena, random_tokens(200))
    nodes = arena._cache.tree.match("", random_tokens(200), 32)
    assert [at for at, node in enumerate(nodes, 1) if node.checkpoint >= 0] == [2, 4, 6]


def test_one_long_prompt_does_not_push_out_what_others_left() -> None:
    arena = cached(HYBRID, interval=32, checkpoints=4)
    prompts = [random_tokens(40, seed=seed) for seed in (1, 2)]
    for prompt in prompts:
        run(HYBRID, arena, prompt)
    sequence = arena.open(random_tokens(300))
    for start in range(0, 224, 32):
        catch_up(HYBRID, arena, sequence, random_tokens(300)[: start + 32])
    assert arena.prefix.evicted_checkpoints == 1
    arena.close(sequence)
    assert run(HYBRID, arena, prompts[1]) == 32
    # Preempted in the middle of its prompt it goes on from where it was.
    assert arena.open(random_tokens(300)).position == 224


def test_where_prompts_part_the_second_one_leaves_a_state_for_the_third() -> None:
    arena = cached(HYBRID)
    system = random_tokens(70)
    hits = [run(HYBRID, arena, [*system, *random_tokens(60, seed=turn)]) for turn in range(1, 5)]
    assert hits == [0, 0, 64, 64]


@KINDS
def test_salts_are_strangers_to_each_other(toy: Toy) -> None:
    arena = cached(toy)
    tokens = random_tokens(70)
    assert [run(toy, arena, tokens, salt=salt) for salt in ("", "a", "b", "a")] == [
        0,
        0,
        0,
        64 + 5 * (not recurrent(toy)),
    ]
    asked = arena.prefix
    sequence = arena.open(tokens, salt="a", reuse=False)
    assert (sequence.position, arena.prefix.misses) == (0, asked.misses)


def test_tokens_are_compared_and_not_only_their_hash() -> None:
    first, second = [-1, *[0] * 40], [-2, *[0] * 40]
    assert hash(tuple(first[:32])) == hash(tuple(second[:32]))
    arena = cached(ATTENTION)
    tree = arena._cache.tree
    node = tree.extend("", None, tuple(first[:32]), 0, 1, 0)
    tree.rest(node)
    assert tree.match("", second, 32) == []
    assert tree.match("", first, 32) == [node]


@KINDS
def test_a_suspect_leaves_nothing_to_start_from(toy: Toy) -> None:
    arena = cached(toy, interval=32, max_num_seqs=4)
    shared, tokens = random_tokens(40), random_tokens(100)
    run(toy, arena, shared)
    before = arena.cached_pages
    suspect = arena.open([*shared[:32], *tokens])
    catch_up(toy, arena, suspect, [*shared[:32], *tokens])
    follower = arena.open([*shared[:32], *tokens[:64], *shared])
    catch_up(toy, arena, follower, [*shared[:32], *tokens[:64], *shared])
    copier = arena.open([*shared[:32], *tokens[:20], 1, 2])
    assert copier.position == (32 if recurrent(toy) else 52)
    catch_up(toy, arena, copier, [*shared[:32], *tokens[:20], 1, 2])
    arena.close(suspect, suspect=True)
    arena.check()
    catch_up(toy, arena, follower, [*shared[:32], *tokens[:64], *shared, 4])
    arena.close(follower)
    arena.close(copier)
    arena.check()
    assert arena.cached_pages == before
    assert run(toy, arena, [*shared[:32], *tokens]) == 32
    assert run(toy, arena, [*shared, 1]) == (32 if recurrent(toy) else 40)


def test_a_suspects_pages_are_wiped_before_they_are_free() -> None:
    arena = make_arena(ATTENTION.layers, interval=32, poison=False)
    sequence = arena.open(random_tokens(70))
    catch_up(ATTENTION, arena, sequence, random_tokens(70))
    pages = list(sequence.pages)
    assert all(layer.data[pages].any() for layer in arena._paged())
    arena.close(sequence, suspect=True)
    assert not any(layer.data[pages].any() for layer in arena._paged())
    assert arena.free_pages == arena.plan.pages


def test_the_state_of_a_suspect_is_dropped_where_the_page_is_anothers() -> None:
    arena = cached(HYBRID, max_num_seqs=4)
    system = random_tokens(64)
    run(HYBRID, arena, [*system, *random_tokens(60, seed=1)])
    suspect = arena.open([*system, *random_tokens(60, seed=2)])
    catch_up(HYBRID, arena, suspect, [*system, *random_tokens(60, seed=2)])
    follower = arena.open([*system, *random_tokens(60, seed=3)])
    assert follower.position == 64
    catch_up(HYBRID, arena, follower, [*system, *random_tokens(60, seed=3)])
    arena.close(suspect, suspect=True)
    arena.close(follower)
    arena.check()
    assert [run(HYBRID, arena, [*system, *random_tokens(60, seed=seed)]) for seed in (1, 3, 2)] == [96, 0, 64]


def test_the_page_that_was_left_longest_ago_goes_first_and_children_before_parents() -> None:
    arena = cached(ATTENTION, pages=6, max_num_seqs=2)
    first, second = random_tokens(64, seed=1), random_tokens(64, seed=2)
    run(ATTENTION, arena, first)
    run(ATTENTION, arena, second)
    run(ATTENTION, arena, first[:40])
    # Six pages: two of the first, which was used last, two of the second; the others are free.
    assert (arena.cached_pages, arena.free_pages, arena.available_pages) == (4, 2, 6)
    holder = arena.open()
    arena.reserve([Chunk(holder, [0] * 96)])
    assert arena.prefix.evicted_pages == 1
    assert len(arena._cache.tree.match("", second, 32)) == 1
    assert len(arena._cache.tree.match("", first, 32)) == 2
    arena.advance(holder, 96)
    arena.reserve([Chunk(holder, [0] * 32)])
    assert arena._cache.tree.match("", second, 32) == []
    arena.check()


def test_an_open_sequence_keeps_its_pages_however_little_is_left() -> None:
    arena = cached(ATTENTION, pages=4, max_num_seqs=2)
    tokens = random_tokens(64)
    run(ATTENTION, arena, tokens)
    holder, other = arena.open([*tokens, 1]), arena.open()
    assert (holder.position, arena.cached_pages, arena.available_pages) == (64, 0, 2)
    with pytest.raises(OutOfPages, match="needs 3 more pages of 32 tokens, but 2 of 4 are free"):
        arena.reserve([Chunk(other, [0] * 65)])
    arena.check()
    catch_up(ATTENTION, arena, holder, [*tokens, 1])


def test_a_hit_inside_a_page_ends_before_it_when_no_page_is_free_for_the_copy() -> None:
    arena = cached(ATTENTION, pages=2, max_num_seqs=2)
    tokens = random_tokens(50)
    run(ATTENTION, arena, tokens)
    assert arena.available_pages == 2
    again = arena.open(tokens)
    assert (again.position, arena.cached_pages) == (32, 1)
    catch_up(ATTENTION, arena, again, tokens)
    assert arena.prefix.evicted_pages == 1


def test_pages_that_no_state_needs_go_before_older_ones() -> None:
    arena = cached(HYBRID, pages=8, max_num_seqs=2, checkpoints=2)
    first, second = random_tokens(70, seed=1), random_tokens(70, seed=2)
    run(HYBRID, arena, first)
    run(HYBRID, arena, second)
    arena._cache.tree.drop_checkpoint(arena._cache.tree.match("", second, 32)[1])
    arena.check()
    assert arena.free_pages == 4
    holder = arena.open()
    arena.reserve([Chunk(holder, [0] * 192)])
    assert arena._cache.tree.match("", second, 32) == []
    assert len(arena._cache.tree.match("", first, 32)) == 2
    arena.close(holder)
    assert run(HYBRID, arena, first) == 64


def test_the_state_that_was_used_longest_ago_goes_first() -> None:
    arena = cached(HYBRID, checkpoints=2)
    prompts = [random_tokens(40, seed=seed) for seed in range(3)]
    run(HYBRID, arena, prompts[0])
    run(HYBRID, arena, prompts[1])
    assert run(HYBRID, arena, prompts[0]) == 32
    run(HYBRID, arena, prompts[2])
    assert arena.prefix.evicted_checkpoints == 1
    assert [run(HYBRID, arena, prompts[turn]) for turn in (0, 2, 1)] == [32, 32, 0]


@KINDS
def test_an_emptied_cache_finds_nothing_and_open_sequences_go_on(toy: Toy) -> None:
    arena = cached(toy)
    tokens = random_tokens(70)
    run(toy, arena, tokens)
    sequence = arena.open([*tokens, 1])
    arena.drop_cache()
    arena.check()
    assert (arena.cached_pages, arena.prefix.checkpoints) == (0, 0)
    catch_up(toy, arena, sequence, [*tokens, *random_tokens(60)])
    arena.close(sequence)
    arena.check()
    assert arena.free_pages == arena.plan.pages
    assert run(toy, arena, tokens) == 0


def test_statistics_count_what_happened() -> None:
    arena = cached(ATTENTION)
    tokens = random_tokens(70)
    run(ATTENTION, arena, tokens)
    run(ATTENTION, arena, [*tokens[:50], 1])
    assert arena.prefix == PrefixStats(hits=1, misses=1, tokens_hit=50, tokens_asked=121, cached_pages=4)


def test_a_state_that_is_not_where_the_step_says_is_not_published() -> None:
    arena = cached(HYBRID)
    sequence = arena.open(random_tokens(40))
    arena.reserve([Chunk(sequence, random_tokens(32))])
    with pytest.raises(Corrupted, match="layer 0: slot 0 holds the state after 0 tokens, but the step expects 32"):
        arena.advance(sequence, 32)
    arena.close(sequence)
    arena.check()
    assert (arena.cached_pages, arena.prefix.checkpoints) == (0, 0)


def test_draft_rows_inside_a_shared_page_are_refused() -> None:
    arena = cached(ATTENTION)
    sequence = arena.open(random_tokens(40))
    catch_up(ATTENTION, arena, sequence, random_tokens(40))
    arena.reserve([Chunk(sequence, [1], room=2)])
    arena.draft_step([(sequence, 32, [1, 2])])
    with pytest.raises(Refused, match="draft rows 31 to 32 lie outside of what is reserved"):
        arena.draft_step([(sequence, 31, [1, 2])])


def test_accounting_notices_a_wrong_holder_and_a_page_of_other_tokens() -> None:
    arena = cached(ATTENTION)
    sequence = arena.open(random_tokens(40))
    catch_up(ATTENTION, arena, sequence, random_tokens(40))
    node = arena._leases[sequence.slot].nodes[0]
    node.holders += 1
    with pytest.raises(Corrupted, match=r"page \d+ has 1 holders, but counts 2"):
        arena.check()
    node.holders -= 1
    arena._leases[sequence.slot].tokens[3] += 1
    with pytest.raises(Corrupted, match="holds pages of other tokens than its own"):
        arena.check()
