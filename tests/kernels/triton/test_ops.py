"""The Triton operations against the reference, in the interpreter, and row by row to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernels.triton.watched import Watched

from truekv.core.ops import Expert, Part, Routing
from truekv.kernels.reference.ops import OPS as REFERENCE
from truekv.kernels.triton import experts as grouped
from truekv.kernels.triton import rows as on_rows
from truekv.kernels.triton.interpreter import INTERPRETED
from truekv.kernels.triton.ops import OPS as TRITON

pytestmark = pytest.mark.skipif(not INTERPRETED, reason="compiled kernels run on a GPU only: make gpu tests them there")
DTYPES = [torch.float32, torch.bfloat16]
DIMS = [1, 17, 96, 1030]
EDGES = torch.tensor([0.0, -0.0, 1e-38, -1e-38, 20.0, -20.0, 88.0, -88.0, 3e38, -3e38])


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def poisoned(x: torch.Tensor, extra: int = 5) -> torch.Tensor:
    """The same numbers, with NaN between the rows."""
    wide = torch.full((*x.shape[:-1], x.shape[-1] + extra), torch.nan, dtype=x.dtype)
    wide[..., : x.shape[-1]] = x
    return wide[..., : x.shape[-1]]


def same(ours: torch.Tensor, theirs: torch.Tensor, scale: torch.Tensor | float | None = None) -> None:
    """Within 2e-6 of the size of what was added up; bfloat16 within one unit in the last place besides."""
    assert ours.dtype == theirs.dtype
    assert ours.shape == theirs.shape
    tolerance = 2e-6 * (theirs.double().abs() if scale is None else scale) + 1e-36
    if theirs.dtype == torch.bfloat16:
        tolerance = tolerance + theirs.double().abs() * 2**-7
    assert bool(((ours.double() - theirs.double()).abs() <= tolerance).all())


def alike(op: str, arguments: tuple[Any, ...], scale: float | None = None, **options: Any) -> None:
    """Ours as the reference; and one row alone as all rows together."""
    ours, theirs = (getattr(ops, op)(*arguments, **options) for ops in (TRITON, REFERENCE))
    rows, row = len(arguments[0]), len(arguments[0]) - 1
    one = [item[row:] if isinstance(item, torch.Tensor) and len(item) == rows else item for item in arguments]
    alone = getattr(TRITON, op)(*one, **options)
    if isinstance(ours, torch.Tensor):
        ours, theirs, alone = (ours,), (theirs,), (alone,)
    for out, expected, last in zip(ours, theirs, alone, strict=True):
        same(out, expected, scale)
        assert torch.equal(last, out[row:])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_norms(dim: int, dtype: torch.dtype) -> None:
    x = random(4, 3, dim, dtype=dtype) * torch.tensor([1e-3, 1.0, 1e3, 0.0], dtype=dtype)[:, None, None]
    gain = random(dim, seed=1) + 1.0
    for rows in (poisoned(x), x[:, 0]):
        alike("rms_norm", (rows, gain, 1e-6))
        alike("rms_norm", (rows, None, 1e-6))
    change = poisoned(random(4, dim, seed=2, dtype=dtype))
    alike("add_norm", (x[:, 1], change, gain, 1e-6))
    total, normed = TRITON.add_norm(x[:, 1], change, gain, 1e-6)
    assert torch.equal(total, x[:, 1] + change)
    assert torch.equal(normed, TRITON.rms_norm(total, gain, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("gate_first", [False, True])
def test_gated_norm(dim: int, gate_first: bool, dtype: torch.dtype) -> None:
    x, gate = random(2, 3, dim), poisoned(random(2, 3 * dim, seed=1, dtype=dtype) * 4)
    for gain in (random(dim, seed=2), random(3 * dim, seed=3)):
        alike("gated_norm", (x, gate, gain, 1e-6), gate_first=gate_first)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
def test_activations_and_gates(dim: int, dtype: torch.dtype) -> None:
    x, by = poisoned(random(3, 2 * dim, dtype=dtype) * 5), poisoned(random(3, 2, dim, seed=1, dtype=dtype) * 5)
    alike("activate", (x, "swiglu"))
    alike("activate", (x, "relu2"))
    for values in (random(3, 2, dim, seed=2), random(3, 2, dim, seed=2).bfloat16()):
        alike("gate", (values, by))
        alike("gate", (values, by[..., :1]))
    wide = random(3, 4 * dim, seed=5, dtype=dtype)
    alike("delta_gates", (wide[:, ::4], wide[:, :dim], random(dim, seed=3), -random(dim, seed=4).sigmoid()))
    alike("softplus", (x, random(2 * dim, seed=3)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.filterwarnings("ignore:overflow encountered in exp:RuntimeWarning")
def test_activations_and_gates_at_the_edges(dtype: torch.dtype) -> None:
    x = EDGES.to(dtype)[None]
    alike("delta_gates", (x, x, torch.zeros(10), torch.ones(10)))
    alike("softplus", (x, torch.zeros(10)))
    alike("activate", (x[:, :8], "relu2"))
    alike("activate", (torch.cat((x[:, :8], x[:, :8].flip(1)), 1), "swiglu"))


@pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning")
def test_what_is_not_a_number_stays_none() -> None:
    for dtype in DTYPES:
        x = torch.full((2, 34), torch.nan, dtype=dtype)
        for result in (
            *TRITON.delta_gates(x, x, torch.zeros(34), torch.ones(34)),
            TRITON.softplus(x, torch.zeros(34)),
            TRITON.activate(x, "swiglu"),
            TRITON.activate(x, "relu2"),
            TRITON.gate(torch.ones(2, 1, 34), x[:, None]),
            TRITON.rms_norm(x, None, 1e-6),
        ):
            assert result.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "planes"), [(2, 1), (64, 32), (80, 35)])
def test_rotary_positions(dim: int, planes: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = turns(3, planes)
    for x in heads_of(3, dim, dtype):
        ((ours,), (theirs,), (alone,)) = (
            ops.norm_rotate((x[rows],), (None,), 0.0, cos[rows], sin[rows], interleaved=interleaved)
            for ops, rows in ((TRITON, slice(None)), (REFERENCE, slice(None)), (TRITON, slice(2, None)))
        )
        same(ours, theirs, 8.0)
        assert torch.equal(alone, ours[2:])


def turns(tokens: int, planes: int) -> tuple[torch.Tensor, torch.Tensor]:
    return TRITON.angles(torch.arange(tokens) * 131071, 1.0 / 1e4 ** (torch.arange(planes) / planes), 1.25)


def heads_of(tokens: int, dim: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys as a product leaves them: queries with gates between them, all in rows of one tensor.

    What is neither is NaN.
    """
    product = torch.full((tokens, 2 * 3 + 2 + 3, dim), torch.nan, dtype=dtype)
    product[:, 0:6:2], product[:, 6:8] = random(tokens, 3, dim, dtype=dtype), random(tokens, 2, dim, seed=1)
    return product[:, 0:6:2], product[:, 6:8]


SIZES = [(0, 64, 32), (1, 256, 32), (3, 80, 20), (2, 24, 3)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("gained", [(True, True), (True, False), (False, True), (False, False)])
@pytest.mark.parametrize(("tokens", "dim", "planes"), SIZES)
def test_queries_and_keys_are_normed_and_turned_in_one_launch(
    tokens: int,
    dim: int,
    planes: int,
    gained: tuple[bool, bool],
    interleaved: bool,
    dtype: torch.dtype,
) -> None:
    """To the bits of a norm of each and then a turn of each."""
    heads, (cos, sin) = heads_of(tokens, dim, dtype), turns(tokens, planes)
    gains = [random(dim, seed=7 + place) + 1.0 if wanted else None for place, wanted in enumerate(gained)]
    normed = [x if gain is None else TRITON.rms_norm(x, gain, 1e-6) for x, gain in zip(heads, gains, strict=True)]
    expected = [TRITON.norm_rotate((x,), (None,), 0.0, cos, sin, interleaved=interleaved)[0] for x in normed]
    with pytest.MonkeyPatch.context() as patched:
        watched = Watched(patched, "_norm_rotate", on_rows)
        got = TRITON.norm_rotate(heads, gains, 1e-6, cos, sin, interleaved=interleaved)
    assert watched.grids == [(5 * tokens,)] * (tokens > 0)
    for ours, wanted, x in zip(got, expected, heads, strict=True):
        assert ours.dtype == dtype
        assert ours.shape == x.shape
        assert torch.isfinite(ours).all()
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_maps_of_one_input_are_one_map(dtype: torch.dtype) -> None:
    parts = [Part(random(out, 33, seed=out, dtype=dtype)) for out in (5, 70, 16)]
    parts[1] = Part(parts[1].weight, random(70, seed=9, dtype=dtype))
    x = random(4, 33, dtype=dtype)
    size = torch.cat([x.double().abs() @ part.weight.double().abs().T + 3 for part in parts], 1)
    for widened in (False, True):
        ours, theirs = (ops.matrix(parts)(x, widened=widened) for ops in (TRITON, REFERENCE))
        same(ours.to(dtype), theirs.to(dtype), size)


def expert_layer(count: int, activation: str, dtype: torch.dtype, *, hidden: int, inner: int) -> list[Expert]:
    halves = 2 if activation == "swiglu" else 1
    return [
        Expert(
            tuple(random(inner, hidden, seed=3 * index + half, dtype=dtype) for half in range(halves)),
            random(hidden, inner, seed=1000 + index, dtype=dtype),
        )
        for index in range(count)
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("count", [4, 40])
def test_experts(count: int, activation: Any, dtype: torch.dtype) -> None:
    layer = expert_layer(count, activation, dtype, hidden=70, inner=20)
    x = random(30, 70, seed=1, dtype=dtype)
    weights, chosen = TRITON.route(random(30, count, seed=2), None, Routing(count, 3))
    ours, theirs = (ops.experts(count, layer, activation) for ops in (TRITON, REFERENCE))
    together, expected = ours(x, weights, chosen), theirs(x, weights, chosen)
    # The reference rounds each expert's answer, and these only the sum.
    same(together, expected, expected.double().abs().max() * (1 if dtype == torch.float32 else 4000))
    for start, size in ((0, 1), (20, 10)):
        rows = slice(start, start + size)
        assert torch.equal(ours(x[rows], weights[rows], chosen[rows]), together[rows])


ROUTINGS = (
    Routing(8, 2),
    Routing(60, 4, normalised=False),
    Routing(512, 10),
    Routing(64, 8, "sigmoid", scale=2.5),
    Routing(160, 6, groups=8, kept_groups=3, normalised=False, scale=16.0),
    Routing(48, 5, "sigmoid", groups=6, kept_groups=2),
)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: f"{routing.experts}-{routing.score}-{routing.groups}")
def test_routers(routing: Routing, biased: bool) -> None:
    logits = random(20, routing.experts, seed=3) * 3
    bias = random(routing.experts, seed=4) * 0.3 if biased else None
    weights, chosen = TRITON.route(logits, bias, routing)
    expected_weights, expected = REFERENCE.route(logits, bias, routing)
    assert torch.equal(chosen, expected)
    assert float((weights - expected_weights).abs().max()) <= 1e-6 * routing.scale


def test_a_router_takes_the_first_of_equal_ones_and_whatever_is_not_a_number() -> None:
    logits = torch.zeros(4, 12)
    logits[1, 5] = -torch.tensor(torch.nan)
    logits[2] = torch.nan
    logits[3, 7] = torch.inf
    for routing in (Routing(12, 3), Routing(12, 3, "sigmoid"), Routing(12, 3, "sigmoid", groups=4, kept_groups=2)):
        weights, chosen = TRITON.route(logits, None, routing)
        assert chosen[0].tolist() == [0, 1, 2]
        assert weights[1].isnan().any()
        assert weights[2].isnan().all()
        assert all(len({*row, *range(12)}) == 12 and len({*row}) == 3 for row in chosen.tolist())
        if routing.score == "sigmoid":
            assert chosen[3, 0] == 7


@pytest.mark.parametrize("rows", [1, 17, 200])
def test_every_pair_is_in_one_tile_of_its_expert(rows: int) -> None:
    """Experts without a token, one with all of them, and more tiles than are needed."""
    make = torch.Generator().manual_seed(rows)
    for chosen in (torch.randint(2, (rows, 3), generator=make) * 3 + 1, torch.full((rows, 3), 5)):
        tiles = grouped.tile(chosen, 6)
        assert tiles.rows == grouped.TILES[rows == 200]
        by_torch = grouped.sort(chosen, 6, tiles.rows, len(tiles.expert))
        assert torch.equal(tiles.pair, by_torch.pair)
        assert torch.equal(tiles.expert, by_torch.expert)
        for name in ("first", "end"):
            known = tiles.expert < 6
            assert torch.equal(getattr(tiles, name)[known], getattr(by_torch, name)[known])
        found: list[int] = []
        for expert, first, end in zip(tiles.expert.tolist(), tiles.first.tolist(), tiles.end.tolist(), strict=True):
            pairs = tiles.pair[first : min(first + tiles.rows, end)].tolist() if expert < 6 else []
            assert all(chosen.flatten()[pair] == expert for pair in pairs)
            found += pairs
        assert sorted(found) == list(range(3 * rows))


def test_experts_read_nothing_on_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    def forbidden(*_: object) -> None:
        raise AssertionError("a size depends on the choice of experts")

    for verb in ("item", "tolist", "__bool__", "__int__", "__index__", "__float__", "nonzero"):
        monkeypatch.setattr(torch.Tensor, verb, forbidden)
    assert len(grouped.tile(torch.tensor([[0, 2], [2, 1]]), 4).expert) == 5
