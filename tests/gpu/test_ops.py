"""The compiled operations against the reference on the CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpu.place import DEVICE
from kernels.triton.test_ops import ROUTINGS

from truekv.core.ops import Expert, Part, Routing
from truekv.kernels.reference.ops import OPS as REFERENCE
from truekv.kernels.triton.ops import OPS as TRITON

DTYPES = [torch.float32, torch.bfloat16]


def random(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def alike(op: str, *arguments: Any, scale: float = 1.0, **options: Any) -> None:
    """Within 1e-5 of the largest number; bfloat16 within one unit in the last place besides."""
    theirs = getattr(REFERENCE, op)(*arguments, **options)
    ours = getattr(TRITON, op)(
        *(item.to(DEVICE) if isinstance(item, torch.Tensor) else item for item in arguments), **options
    )
    for out, expected in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (ours, theirs)), strict=True):
        assert out.device.type == DEVICE
        assert out.dtype == expected.dtype
        tolerance = 1e-5 * scale * float(expected.double().abs().max())
        if expected.dtype == torch.bfloat16:
            tolerance = tolerance + expected.double().abs() * 2**-7
        assert bool(((out.cpu().double() - expected.double()).abs() <= tolerance).all())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 96, 128, 1030, 5120])
def test_operations_on_rows(dim: int, dtype: torch.dtype) -> None:
    x, by, gain = random(9, 3, dim, dtype=dtype), random(9, 3, dim, seed=1, dtype=dtype), random(dim, seed=2) + 1
    alike("rms_norm", x, gain, 1e-6)
    alike("rms_norm", x[:, 1], None, 1e-6)
    alike("add_norm", x[:, 0], by[:, 1], gain, 1e-6)
    alike("gate", x, by)
    alike("gate", x, by[..., :1])
    for first in (False, True):
        alike("gated_norm", x.float(), by.flatten(1), gain, 1e-6, gate_first=first)
    alike("activate", x.flatten(1)[:, : 2 * dim] * 5, "swiglu")
    alike("activate", x.flatten(1), "relu2")
    alike("softplus", x[:, 0] * 5, gain)
    alike("delta_gates", x[:, 0], by[:, 1], gain, -gain.abs())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize(("dim", "planes"), [(64, 32), (80, 35), (256, 32)])
def test_rotary_positions(dim: int, planes: int, interleaved: bool, dtype: torch.dtype) -> None:
    cos, sin = REFERENCE.angles(torch.tensor([0, 1, 262143]), 1.0 / 1e4 ** (torch.arange(planes) / planes), 1.0)
    product, gain = random(3, 9, dim, dtype=dtype), random(dim, seed=2) + 1
    moved = product.to(DEVICE)
    none, (cos2, sin2) = (None, None), (part.to(DEVICE) for part in (cos, sin))
    theirs = REFERENCE.norm_rotate((product[:, :6:2], product[:, 6:8]), none, 0.0, cos, sin, interleaved=interleaved)
    heads = moved[:, :6:2], moved[:, 6:8]
    ours = TRITON.norm_rotate(heads, none, 0.0, cos2, sin2, interleaved=interleaved)
    for out, expected in zip(ours, theirs, strict=True):
        assert out.device.type == DEVICE
        rounding = 0.0 if dtype == torch.float32 else 2**-7
        allowed = 1e-5 * float(expected.abs().max()) + expected.double().abs() * rounding
        assert bool(((out.cpu().double() - expected.double()).abs() <= allowed).all())
    # What is normed is rounded as the norm alone rounds it.
    normed = [TRITON.rms_norm(x, gain.to(DEVICE), 1e-6) for x in heads]
    apart = TRITON.norm_rotate(normed, none, 0.0, cos2, sin2, interleaved=interleaved)
    together = TRITON.norm_rotate(heads, [gain.to(DEVICE)] * 2, 1e-6, cos2, sin2, interleaved=interleaved)
    assert all(torch.equal(*pair) for pair in zip(together, apart, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "tokens"), [(8, 1), (64, 3), (16, 400)])
def test_experts(count: int, tokens: int, dtype: torch.dtype) -> None:
    layer = [
        Expert((random(96, 128, seed=index, dtype=dtype),), random(128, 48, seed=index + 500, dtype=dtype))
        for index in range(count)
    ]
    x = random(tokens, 128, seed=1, dtype=dtype)
    weights, chosen = REFERENCE.route(random(tokens, count, seed=2), None, Routing(count, 4))
    expected = REFERENCE.experts(count, layer, "swiglu")(x, weights, chosen)
    moved = [Expert((one.first[0].to(DEVICE),), one.down.to(DEVICE)) for one in layer]
    got = TRITON.experts(count, moved, "swiglu")(x.to(DEVICE), weights.to(DEVICE), chosen.to(DEVICE))
    allowed = float(expected.abs().max()) * (1e-5 if dtype == torch.float32 else 2e-2)
    assert float((got.cpu().float() - expected.float()).abs().max()) <= allowed


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("routing", ROUTINGS, ids=lambda routing: f"{routing.experts}-{routing.score}-{routing.groups}")
def test_routers(routing: Routing, biased: bool) -> None:
    logits = random(200, routing.experts, seed=3) * 3
    bias = random(routing.experts, seed=4) * 0.3 if biased else None
    expected_weights, expected = REFERENCE.route(logits, bias, routing)
    weights, chosen = TRITON.route(logits.to(DEVICE), None if bias is None else bias.to(DEVICE), routing)
    # Scores that differ in their last bits may change places.
    same = (chosen.cpu() == expected).all(1)
    assert float(same.float().mean()) >= 0.99
    assert float((weights.cpu() - expected_weights)[same].abs().max()) <= 1e-5 * routing.scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [1, 1025, 4096, 151936])
def test_the_largest_of_each_row(dim: int, dtype: torch.dtype) -> None:
    wide = random(5, dim + 3, dtype=dtype) - 10
    x = wide[:, :dim]
    x[1, [dim // 3, dim - 1]] = torch.tensor([-0.0, 0.0], dtype=dtype)
    x[2, [dim // 2, dim - 1]] = 1.0
    x[3, dim // 4], x[4, dim - 1] = torch.nan, -torch.inf
    expected = REFERENCE.largest(x).tolist()
    assert expected[1:] == [dim // 3, dim // 2, -1, -1]
    moved = wide.to(DEVICE)[:, :dim]
    for rows in (slice(None), slice(1, None, 2), slice(1)):
        found = TRITON.largest(moved[rows])
        assert found.device.type == DEVICE
        assert found.tolist() == REFERENCE.largest(x[rows]).tolist()
    for count in {1, min(dim, 21)}:
        for got, wanted in zip(TRITON.best(moved[:3], count), REFERENCE.best(x[:3], count), strict=True):
            assert got.device.type == DEVICE
            assert torch.equal(got.cpu(), wanted)


@pytest.mark.parametrize("dtype", DTYPES)
def test_linear_maps(dtype: torch.dtype) -> None:
    parts = [Part(random(out, 256, seed=out, dtype=dtype)) for out in (64, 48)]
    x = random(5, 256, dtype=dtype)
    got = TRITON.matrix([Part(part.weight.to(DEVICE)) for part in parts])(x.to(DEVICE), widened=True).cpu()
    exact = x.double() @ torch.cat([part.weight for part in parts]).double().T
    assert float((got.double() - exact).abs().max()) <= float(exact.abs().max()) * (
        1e-5 if dtype == torch.float32 else 1e-2
    )
