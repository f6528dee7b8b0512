"""Native operations against the reference, on every instruction set of the machine, and row by row to the bit."""

from typing import Any, Literal

import pytest
import torch

from truekv.core.errors import Refused
from truekv.core.ops import Expert, Ops, Part, Routing
from truekv.kernels.native.library import Library, library
from truekv.kernels.native.linear import Packed
from truekv.kernels.native.ops import OPS as NATIVE
from truekv.kernels.reference.ops import OPS as REFERENCE

ISAS = () if library() is None else library().isas  # type: ignore[union-attr]
pytestmark = pytest.mark.skipif(not ISAS, reason="the native library is not built")
DTYPES = [torch.float32, torch.bfloat16]


each_isa = pytest.mark.usefixtures("isa")


def native() -> Library:
    found = library()
    assert found is not None
    return found


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


SHAPES = [(1, 1, 1), (1, 64, 32), (2, 16, 3), (3, 17, 5), (6, 63, 64), (7, 65, 127), (13, 130, 1025), (195, 17, 2049)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "out", "into"), SHAPES)
@each_isa
def test_linear_is_the_product(rows: int, out: int, into: int, dtype: torch.dtype) -> None:
    weight, bias = random(out, into, seed=1, dtype=dtype), random(out, seed=2, dtype=dtype)
    x = random(rows, into, dtype=dtype)
    x[0, 0], x[-1, -1] = -0.0, 1e-40
    exact = x.double() @ weight.double().T + bias.double()
    size = x.double().abs() @ weight.double().abs().T + bias.double().abs()
    matrix = NATIVE.matrix([Part(weight, bias)])
    same(matrix(poisoned(x), widened=True), exact.float(), size)
    rounded = matrix(x)
    assert rounded.dtype == dtype
    same(rounded, exact.to(dtype), size)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "into"), [(64, 64), (81, 1025), (200, 40)])
@each_isa
def test_a_row_knows_nothing_of_other_rows_nor_of_threads(out: int, into: int, dtype: torch.dtype) -> None:
    matrix = NATIVE.matrix([Part(random(out, into, seed=1, dtype=dtype))])
    x = random(201, into, dtype=dtype)
    together = matrix(x)
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            assert torch.equal(matrix(x), together)
    finally:
        torch.set_num_threads(threads)
    for size in (1, 2, 5, 7, 193):
        parts = [matrix(x[start : start + size]) for start in range(0, len(x), size)]
        assert torch.equal(torch.cat(parts), together)


@pytest.mark.parametrize("dtype", DTYPES)
def test_machines_with_fused_products_agree_to_the_bit(dtype: torch.dtype) -> None:
    """The hardware's product of bfloat16 pairs adds in the order that the others follow."""
    matrix = NATIVE.matrix([Part(random(81, 1025, seed=1, dtype=dtype))])
    x = random(9, 1025, dtype=dtype)
    results: list[torch.Tensor] = []
    for name in ISAS[1:]:
        with native().using(name):
            results.append(matrix(x, widened=True))
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("outs", [(5, 70, 16), (64, 64), (1, 1, 1)])
@each_isa
def test_maps_of_one_input_are_one_map(outs: tuple[int, ...], dtype: torch.dtype) -> None:
    parts = [Part(random(out, 33, seed=out, dtype=dtype)) for out in outs]
    parts[1] = Part(parts[1].weight, random(outs[1], seed=9, dtype=dtype))
    x = random(4, 33, dtype=dtype)
    assert torch.equal(NATIVE.matrix(parts)(x), torch.cat([NATIVE.matrix([part])(x) for part in parts], 1))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("out", "into"), [(1, 1), (100, 7), (130, 64)])
def test_packing_keeps_every_weight_and_fills_up_with_zeros(out: int, into: int, dtype: torch.dtype) -> None:
    weight = random(into, out, dtype=dtype).T  # a transposed view
    matrix = NATIVE.matrix([Part(weight)])
    indices = torch.randint(out, (50,), generator=torch.Generator().manual_seed(0))
    assert torch.equal(matrix.rows(indices), weight[indices])
    beyond = matrix.rows(torch.tensor([0, -1, out, 1 << 40]))
    assert torch.equal(beyond.isnan().any(1), torch.tensor([False, True, True, True]))
    assert torch.equal(beyond.isnan().all(1), torch.tensor([False, True, True, True]))
    packed = Packed(1, out, into, dtype)
    packed.data.fill_(torch.nan)
    packed.put(0, [weight])
    assert packed.data.isfinite().all()
    assert packed.data.count_nonzero() == weight.count_nonzero()


def test_other_dtypes_are_refused() -> None:
    with pytest.raises(Refused, match=r"float32 and bfloat16, not torch\.float16"):
        NATIVE.matrix([Part(random(2, 2).half())])


@pytest.mark.parametrize("dtype", DTYPES)
@each_isa
def test_heads_have_maps_of_their_own(dtype: torch.dtype) -> None:
    weight, x = random(3, 70, 33, dtype=dtype), random(9, 3, 40, seed=1, dtype=dtype)[..., :33]
    ours, theirs = NATIVE.head_matrices(weight), REFERENCE.head_matrices(weight)
    size = torch.einsum("thi,hoi->tho", x.double().abs(), weight.double().abs())
    same(ours(x), theirs(x), size)
    assert torch.equal(ours(x[4:5]), ours(x)[4:5])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ["swiglu", "relu2"])
@pytest.mark.parametrize("count", [4, 40])
@each_isa
def test_experts(count: int, activation: Any, dtype: torch.dtype) -> None:
    inner, halves = 20, 2 if activation == "swiglu" else 1
    experts = [
        Expert(
            tuple(random(inner, 33, seed=3 * index + half, dtype=dtype) for half in range(halves)),
            random(33, inner, seed=1000 + index, dtype=dtype),
        )
        for index in range(count)
    ]
    x = random(30, 33, seed=1, dtype=dtype)
    weights, chosen = NATIVE.route(random(30, count, seed=2), None, Routing(count, 3))
    ours, theirs = (ops.experts(count, experts, activation) for ops in (NATIVE, REFERENCE))
    together, expected = ours(x, weights, chosen), theirs(x, weights, chosen)
    same(together, expected, expected.double().abs().max() * (1 if dtype == torch.float32 else 4000))
    for start, size in ((0, 1), (7, 3), (20, 10)):
        rows = slice(start, start + size)
        assert torch.equal(ours(x[rows], weights[rows], chosen[rows]), together[rows])


DIMS = [1, 15, 16, 17, 96, 1030]


def alike(op: str, arguments: tuple[Any, ...], scale: float | None = None, **options: Any) -> torch.Tensor:
    """Native as the reference; and each row alone as all rows together."""
    ours = getattr(NATIVE, op)(*arguments, **options)
    same(ours, getattr(REFERENCE, op)(*arguments, **options), scale)
    rows = len(arguments[0])
    for row in range(rows):
        one = [
            item[row : row + 1] if isinstance(item, torch.Tensor) and len(item) == rows else item for item in arguments
        ]
        assert torch.equal(getattr(NATIVE, op)(*one, **options), ours[row : row + 1])
    return ours


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@each_isa
def test_rms_norm(dim: int, dtype: torch.dtype) -> None:
    x = random(5, 3, dim, dtype=dtype) * torch.tensor([1e-20, 1e-3, 1.0, 1e3, 0.0], dtype=dtype)[:, None, None]
    gain = random(dim, seed=1) + 1.0
    for rows in (x, poisoned(x), x[:, 0]):
        alike("rms_norm", (rows, gain, 1e-6))
        alike("rms_norm", (rows, None, 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@pytest.mark.parametrize("gate_first", [False, True])
@each_isa
def test_gated_norm(dim: int, gate_first: bool, dtype: torch.dtype) -> None:
    x, gate = random(5, 3, dim), poisoned(random(5, 3 * dim, seed=1, dtype=dtype) * 4)
    for gain in (random(dim, seed=2), random(3 * dim, seed=3)):
        alike("gated_norm", (x, gate, gain, 1e-6), gate_first=gate_first)


def delta_gates(ops: Ops, b: torch.Tensor, a: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    heads = a.shape[1]
    return ops.delta_gates(b[:, :heads], a, random(heads, seed=3), -random(heads, seed=4).sigmoid())


EDGES = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 20.0, -20.0, 88.0, -88.0, 3e38, -3e38])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@each_isa
def test_activations_and_gates(dim: int, dtype: torch.dtype) -> None:
    x, by = poisoned(random(5, 2 * dim, dtype=dtype) * 5), poisoned(random(5, 3, dim, seed=1, dtype=dtype) * 5)
    alike("activate", (x, "swiglu"))
    alike("activate", (x, "relu2"))
    for values in (random(5, 3, dim, seed=2), random(5, 3, dim, seed=2).bfloat16()):
        alike("gate", (values, by))
        alike("gate", (values, by[..., :1]))
    wide = random(5, 4 * dim, seed=5, dtype=dtype)
    for ours, theirs in zip(
        *(delta_gates(ops, wide[:, ::2], wide[:, :dim]) for ops in (NATIVE, REFERENCE)), strict=True
    ):
        same(ours, theirs)
    alike("softplus", (x, random(2 * dim, seed=3)))


@pytest.mark.parametrize("dtype", DTYPES)
@each_isa
def test_activations_and_gates_at_the_edges(dtype: torch.dtype) -> None:
    x = EDGES.to(dtype)[None]
    for ours, theirs in zip(delta_gates(NATIVE, x, x), delta_gates(REFERENCE, x, x), strict=True):
        same(ours, theirs)
    same(NATIVE.softplus(x, torch.zeros(10)), REFERENCE.softplus(x, torch.zeros(10)))
    small = x[:, :8]
    same(NATIVE.activate(small, "relu2"), REFERENCE.activate(small, "relu2"))
    halves = torch.cat((small, small.flip(1)), 1)
    # Products below 1e-36 are zero to the one and denormal to the other.
    same(NATIVE.activate(halves, "swiglu"), REFERENCE.activate(halves, "swiglu"))


@each_isa
def test_what_is_not_a_number_stays_none() -> None:
    x = torch.full((2, 34), torch.nan)
    x3 = x[:, None]
    for result in (
        *delta_gates(NATIVE, x, x),
        NATIVE.softplus(x, torch.zeros(34)),
        NATIVE.activate(x, "swiglu"),
        NATIVE.activate(x, "relu2"),
        NATIVE.gate(torch.ones(2, 1, 34), x3),
        NATIVE.rms_norm(x, None, 1e-6),
        NATIVE.route(x, None, Routing(34, 3))[0],
        NATIVE.route(x, None, Routing(34, 3, "sigmoid"))[0],
    ):
        assert result.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "planes"), [(2, 1), (32, 8), (64, 32), (80, 35), (256, 32)])
@each_isa
def test_rotary_positions(dim: int, planes: int, interleaved: bool, dtype: torch.dtype) -> None:
    positions = torch.tensor([0, 1, 7, 4000, 262143])
    frequencies = 1.0 / 1e4 ** (torch.arange(planes) / planes)
    cos, sin = NATIVE.angles(positions, frequencies, 1.25)
    for ours, theirs in zip((cos, sin), REFERENCE.angles(positions, frequencies, 1.25), strict=True):
        same(ours, theirs, 1.0)
    x, gain = poisoned(random(5, 3, dim, dtype=dtype)), random(dim, seed=2) + 1.0
    heads = x, poisoned(random(5, 2, dim, seed=1, dtype=dtype))
    ours = NATIVE.norm_rotate(heads, (None, gain), 1e-6, cos, sin, interleaved=interleaved)
    # Of the same rounded norms, as a bit of those is more than any rotation's.
    normed = x, NATIVE.rms_norm(heads[1], gain, 1e-6)
    expected = REFERENCE.norm_rotate(normed, (None, None), 0.0, cos, sin, interleaved=interleaved)
    for out, theirs in zip(ours, expected, strict=True):
        same(out, theirs, 8.0)
    for row in range(5):
        one = [item[row : row + 1] for item in (*heads, cos, sin)]
        alone = NATIVE.norm_rotate(one[:2], (None, gain), 1e-6, *one[2:], interleaved=interleaved)
        assert all(torch.equal(part, out[row : row + 1]) for part, out in zip(alone, ours, strict=True))


ROUTINGS = [
    Routing(8, 8),
    Routing(40, 3),
    Routing(40, 3, normalised=False, scale=2.5),
    Routing(48, 4, groups=6, kept_groups=2),
    Routing(48, 4, "sigmoid", groups=6, kept_groups=2, scale=0.5),
    Routing(5, 2, "sigmoid", normalised=False),
]


@pytest.mark.parametrize("routing", ROUTINGS)
@pytest.mark.parametrize("biased", [False, True])
@each_isa
def test_routers(routing: Routing, biased: bool) -> None:
    logits = random(50, routing.experts) * 3
    bias = random(routing.experts, seed=1) * 0.3 if biased else None
    weights, chosen = NATIVE.route(logits, bias, routing)
    expected, theirs = REFERENCE.route(logits, bias, routing)
    assert torch.equal(chosen, theirs)
    same(weights, expected)
    one = NATIVE.route(logits[13:14], bias, routing)
    assert torch.equal(one[0], weights[13:14])
    assert torch.equal(one[1], chosen[13:14])


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@each_isa
def test_of_equal_experts_the_first_are_chosen(score: Literal["softmax", "sigmoid"]) -> None:
    _, chosen = NATIVE.route(torch.zeros(2, 20), None, Routing(20, 3, score))
    assert chosen.tolist() == [[0, 1, 2]] * 2


def test_too_many_experts_are_refused() -> None:
    with pytest.raises(Refused, match="4096"):
        NATIVE.route(torch.zeros(1, 5000), None, Routing(5000, 1))


@pytest.mark.parametrize("dtype", DTYPES)
@each_isa
def test_finite_sees_every_number_of_the_rows_and_no_other(dtype: torch.dtype) -> None:
    x = random(4, 3, 11000, dtype=dtype)
    x[0, 0, 0], x[1, 0, 0] = 3e38, -1e-40
    assert NATIVE.finite(x)
    for place, value in ((0, torch.nan), (16383, torch.inf), (32999, -torch.inf), (16384, torch.nan)):
        spoilt = x.clone()
        spoilt[2].view(-1)[place] = value
        assert not NATIVE.finite(spoilt)
        assert not NATIVE.finite(spoilt, rows=torch.tensor([0, 2]))
        assert NATIVE.finite(spoilt, rows=torch.tensor([3, 0, 1]))
    assert NATIVE.finite(poisoned(x[:, 0]))
    assert NATIVE.finite(x[:0])


@each_isa
def test_finite_looks_at_all_parts_and_at_the_same_rows_of_each() -> None:
    parts = [random(4, 3, 50), random(4, 70000, seed=1).bfloat16(), random(4, 1), random(4, 2, 3)]
    assert NATIVE.finite(*parts)
    for place, part in enumerate(parts):
        spoilt = [*parts[:place], part.clone(), *parts[place + 1 :]]
        spoilt[place][3].view(-1)[-1] = torch.nan
        assert not NATIVE.finite(*spoilt)
        assert not NATIVE.finite(*spoilt, rows=torch.tensor([1, 3]))
        assert NATIVE.finite(*spoilt, rows=torch.tensor([2, 0]))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (4, 17), (2, 1024), (1, 33000), (3, 50001)])
@each_isa
def test_largest_finds_the_first_of_the_largest_numbers(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = poisoned(random(*shape, dtype=dtype) - 10)
    expected = x.argmax(-1)
    assert torch.equal(NATIVE.largest(x), expected)
    assert torch.equal(REFERENCE.largest(x), expected)
    for place in {0, shape[1] // 3, shape[1] // 2, shape[1] - 1}:
        tied = x.clone()
        tied[:, place:] = torch.maximum(tied[:, place:], torch.zeros(()))
        assert torch.equal(NATIVE.largest(tied), torch.full(shape[:1], place))
        assert torch.equal(REFERENCE.largest(tied), torch.full(shape[:1], place))
        for value in (torch.nan, torch.inf, -torch.inf):
            spoilt = x.clone()
            spoilt[-1, place] = value
            wanted = [*expected[:-1].tolist(), -1]
            assert NATIVE.largest(spoilt).tolist() == wanted
            assert REFERENCE.largest(spoilt).tolist() == wanted


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", DIMS)
@each_isa
def test_a_norm_adds_the_change_to_the_bit(dim: int, dtype: torch.dtype) -> None:
    x, change, gain = poisoned(random(5, dim, dtype=dtype)), random(5, dim, seed=1, dtype=dtype), random(dim, seed=2)
    total, normed = NATIVE.add_norm(x, change, gain, 1e-6)
    assert torch.equal(total, x + change)
    assert torch.equal(normed, NATIVE.rms_norm(x + change, gain, 1e-6))
    alone = NATIVE.add_norm(x[3:4], change[3:4], gain, 1e-6)
    assert torch.equal(alone[0], total[3:4])
    assert torch.equal(alone[1], normed[3:4])


@pytest.mark.parametrize("dtype", DTYPES)
@each_isa
def test_a_token_has_the_same_gates_in_any_batch(dtype: torch.dtype) -> None:
    b, a = random(2500, 16, dtype=dtype), random(2500, 16, seed=1, dtype=dtype)
    together = delta_gates(NATIVE, b, a)
    for row in (0, 1249, 2499):
        alone = delta_gates(NATIVE, b[row : row + 1], a[row : row + 1])
        assert all(torch.equal(one[0], many[row]) for one, many in zip(alone, together, strict=True))
