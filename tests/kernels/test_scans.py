"""The recurrent rules against float64 recurrences written from the papers, and against transformers."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from memory.toys import Toy, gdn, make_arena, mamba2, random_tokens

from truekv.core.batch import Chunk

if TYPE_CHECKING:
    from truekv.core.spec import Recurrent


def convolved(inputs: torch.Tensor, taps: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """Causal depthwise convolution and silu in float64 by torch's own convolution: [T, C]."""
    padded = torch.nn.functional.pad(inputs.double().T, (taps.shape[1] - 1, 0))
    out = torch.nn.functional.conv1d(
        padded, taps.double()[:, None], None if bias is None else bias.double(), groups=len(taps)
    )
    return torch.nn.functional.silu(out).T


def gdn_oracle(layer: Recurrent, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    heads, key_dim, value_dim = layer.state[0].shape
    mixed = convolved(inputs["conv"], weights["conv"])
    width = (mixed.shape[1] - heads * value_dim) // 2
    group = heads * key_dim // width
    state = torch.zeros(heads, key_dim, value_dim, dtype=torch.float64)
    out = torch.zeros(len(mixed), heads, value_dim, dtype=torch.float64)
    for t, row in enumerate(mixed):
        q, k = (part.view(-1, key_dim) for part in (row[:width], row[width : 2 * width]))
        v = row[2 * width :].view(heads, value_dim)
        for head in range(heads):
            query, key = q[head // group], k[head // group]
            query = query / (query @ query + 1e-6).sqrt() / key_dim**0.5
            key = key / (key @ key + 1e-6).sqrt()
            s = state[head] * inputs["decay"][t, head].double().exp()
            s = s + torch.outer(key, inputs["beta"][t, head].double() * (v[head] - s.T @ key))
            state[head] = s
            out[t, head] = s.T @ query
    return out


def mamba2_oracle(layer: Recurrent, inputs: dict[str, torch.Tensor], weights: dict[str, torch.Tensor]) -> torch.Tensor:
    heads, head_dim, size = layer.state[0].shape
    mixed = convolved(inputs["conv"], weights["conv"], weights.get("conv_bias"))
    groups = (mixed.shape[1] - heads * head_dim) // (2 * size)
    state = torch.zeros(heads, head_dim, size, dtype=torch.float64)
    out = torch.zeros(len(mixed), heads, head_dim, dtype=torch.float64)
    for t, row in enumerate(mixed):
        x = row[: heads * head_dim].view(heads, head_dim)
        b, c = row[heads * head_dim :].view(2, groups, size)
        for head in range(heads):
            group = head * groups // heads
            dt = inputs["dt"][t, head].double()
            state[head] = state[head] * (dt * weights["A"][head]).exp() + dt * torch.outer(x[head], b[group])
            out[t, head] = state[head] @ c[group] + weights["D"][head] * x[head]
    return out


ORACLES = {"gdn": gdn_oracle, "mamba2": mamba2_oracle}
LAYERS = (
    gdn(),
    gdn(key_heads=1, value_heads=1, key_dim=4, value_dim=4),
    gdn(key_heads=3, value_heads=3, key_dim=16, value_dim=8),
    gdn(key_heads=2, value_heads=6, key_dim=20, value_dim=12, taps=2),
    mamba2(),
    mamba2(heads=1, head_dim=4, groups=1, size=4),
    mamba2(heads=6, head_dim=10, groups=3, size=12, taps=2),
    mamba2(heads=4, head_dim=8, groups=1, size=16, taps=5),
)


def name_of(layer: Recurrent) -> str:
    return f"{layer.rule}-{'x'.join(map(str, layer.state[0].shape))}"


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
def test_the_rule_against_its_recurrence_in_float64(layer: Recurrent) -> None:
    toy = Toy((layer,))
    tokens = random_tokens(50)
    inputs = {name: table[torch.tensor(tokens)] for name, table in toy.tables[0].items()}
    expected = ORACLES[layer.rule](layer, inputs, toy.weights[0]).flatten(1)
    got = toy.plain(tuple(tokens)).double()
    assert (got - expected).abs().max() < 1e-5 * expected.abs().max()


@pytest.mark.parametrize("layer", LAYERS, ids=name_of)
@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_chunks_drafts_and_companions_change_nothing_bitwise(layer: Recurrent, drafts: int) -> None:
    """Chunks shorter than the convolution, one companion that prefills, another that comes and goes."""
    toy = Toy((layer,))
    arena = make_arena((layer,), drafts=drafts)
    sequence, companion = arena.open(), arena.open()
    tokens = random_tokens(60)
    for turn, count in enumerate((1, 1, 2, 17, 1, 5, 1)):
        start = sequence.position
        guesses = random_tokens(drafts, seed=turn)
        accepted = min(turn % (drafts + 1), len(tokens) - start - count)
        certain, following = tokens[start : start + count], tokens[start + count :][:accepted]
        guesses[:accepted] = following
        chunks = [Chunk(sequence, certain + guesses, drafts), Chunk(companion, random_tokens(1 + 7 * (turn % 3)))]
        outs = toy.run(arena, *(chunks if turn % 2 else chunks[::-1]))
        own = outs[0 if turn % 2 else 1]
        assert torch.equal(own, toy.plain((*tokens[:start], *certain, *guesses))[start:])
        arena.advance(sequence, count + accepted)
        arena.advance(companion, len(chunks[1].tokens))
    assert sequence.position >= 28


def test_the_gated_delta_rule_against_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

    layer = gdn(key_heads=2, value_heads=6, key_dim=16, value_dim=24)
    toy, tokens = Toy((layer,)), random_tokens(40)
    inputs = {name: table[torch.tensor(tokens)] for name, table in toy.tables[0].items()}
    mixed = convolved(inputs["conv"], toy.weights[0]["conv"]).float()
    q, k, v = mixed.split([32, 32, 144], -1)
    expected, _ = torch_recurrent_gated_delta_rule(
        q.view(1, -1, 2, 16),
        k.view(1, -1, 2, 16),
        v.view(1, -1, 6, 24),
        g=inputs["decay"][None],
        beta=inputs["beta"][None],
        use_qk_l2norm_in_kernel=True,
    )
    assert (toy.plain(tuple(tokens)) - expected[0].flatten(1)).abs().max() < 1e-5


def test_mamba2_against_transformers() -> None:
    from transformers.models.nemotron_h.modeling_nemotron_h import mamba2_chunk_scan

    layer = mamba2(heads=6, head_dim=10, groups=3, size=12)
    toy, tokens = Toy((layer,)), random_tokens(40)
    inputs = {name: table[torch.tensor(tokens)] for name, table in toy.tables[0].items()}
    weights = toy.weights[0]
    x, b, c = convolved(inputs["conv"], weights["conv"], weights["conv_bias"]).float().split([60, 36, 36], -1)
    expected = mamba2_chunk_scan(
        x.view(1, -1, 6, 10),
        inputs["dt"][None],
        weights["A"],
        b.view(1, -1, 3, 12),
        c.view(1, -1, 3, 12),
        chunk_size=16,
        D=weights["D"],
    )
    assert (toy.plain(tuple(tokens)) - expected[0].flatten(1)).abs().max() < 1e-4


def test_without_a_convolution_bias_none_is_added() -> None:
    layer = mamba2()
    toy = Toy((layer,))
    del toy.weights[0]["conv_bias"]
    tokens = random_tokens(20)
    inputs = {name: table[torch.tensor(tokens)] for name, table in toy.tables[0].items()}
    expected = mamba2_oracle(layer, inputs, toy.weights[0]).flatten(1)
    assert (toy.plain(tuple(tokens)).double() - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_rejected_draft_leaves_the_state_bytes_alone() -> None:
    """What a draft may touch is the log; the state and the convolution's tail hold certain tokens only."""
    layers = (gdn(), mamba2())
    toy, arena = Toy(layers), make_arena(layers, drafts=4)
    sequence = arena.open()
    toy.run(arena, Chunk(sequence, [1, 2, 3], 0))
    arena.advance(sequence, 3)
    toy.run(arena, Chunk(sequence, [4, 50, 51, 52, 53], 4))
    slabs = [slab[sequence.slot].clone() for layer in arena._states() for slab in layer.state.values()]
    plain = make_arena(layers, max_num_seqs=1)
    alone = plain.open()
    toy.feed(plain, alone, [1, 2, 3, 4])
    expected = [slab[alone.slot] for layer in plain._states() for slab in layer.state.values()]
    assert all(map(torch.equal, slabs, expected))
