"""One suite over the folder: whatever lies in truekv/formats keeps the promises of core.protocols.CacheFormat."""

from __future__ import annotations

import math
import pkgutil
from typing import TYPE_CHECKING

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import truekv.formats
from truekv.core.errors import Corrupted
from truekv.core.folder import members
from truekv.core.protocols import CacheFormat
from truekv.formats.choice import aliases, codecs, names, pairs

if TYPE_CHECKING:
    from collections.abc import Iterator

CODECS = codecs()
DIMS = (64, 80, 96, 128, 192, 256, 512)
SCALES = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1.0, 1e2, 1e4)
every_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
every_dim = pytest.mark.parametrize("dim", DIMS)


def gaussian(rows: int, dim: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))


def hard_rows(dim: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Rows on which codecs of this kind have gone wrong before."""
    for scale in SCALES:
        rows = gaussian(24, dim, seed=dim) * scale
        yield f"gaussian x {scale:g}", rows
        outliers = rows.clone()
        outliers[:, 3] *= 100
        yield f"a 100x outlier x {scale:g}", outliers
        alone = torch.zeros(2, dim)
        alone[0, dim - 1], alone[1, 0] = scale, -scale
        yield f"one number, the others zero, x {scale:g}", alone
        yield f"constants x {scale:g}", torch.tensor([[scale], [-scale]]).expand(2, dim)
        yield f"an offset of 20 sigma x {scale:g}", rows + 20 * scale
        yield f"two signs x {scale:g}", torch.where(torch.arange(dim) % 2 == 0, scale, -scale)[None]
    yield "zeros", torch.zeros(1, dim)
    yield "negative zeros", -torch.zeros(1, dim)
    yield "denormal numbers", torch.full((1, dim), 1e-42)
    yield "one denormal number", torch.nn.functional.pad(torch.tensor([[-1.4e-45]]), (0, dim - 1))
    yield "close to the end of fp16", torch.full((1, dim), 65504.0)
    yield "far beyond fp16", gaussian(4, dim) * 1e12
    yield "close to the end of float32", gaussian(4, dim).sign() * 3.4e38


def within_bound(codec: CacheFormat, rows: torch.Tensor) -> torch.Tensor:
    """Check one set of rows against the declared bound; return the errors."""
    decoded = codec.decode(codec.encode(rows), rows.shape[-1])
    assert decoded.dtype == torch.float32
    assert decoded.shape == rows.shape
    assert bool(torch.isfinite(decoded).all())
    error = (decoded.double() - rows.double()).abs()
    bound = codec.bound(rows).double().expand_as(error)
    assert bool((error <= bound).all()), f"error {error.max():g} where the bound is {bound[error > bound].min():g}"
    return error


@every_codec
@every_dim
def test_the_declared_bound_holds_on_hard_rows(codec: CacheFormat, dim: int) -> None:
    for kind, rows in hard_rows(dim):
        try:
            within_bound(codec, rows)
        except AssertionError as error:
            raise AssertionError(f"{kind}: {error}") from error


@every_codec
@given(st.binary(min_size=4 * 48, max_size=4 * 48))
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_declared_bound_holds_on_any_finite_row(codec: CacheFormat, bits: bytes) -> None:
    # Any bit pattern is some float32: magnitudes from 1e-45 to 1e38 side by side.
    rows = torch.frombuffer(bytearray(bits), dtype=torch.float32)[None]
    within_bound(codec, torch.where(torch.isfinite(rows), rows, 1.0))


@every_codec
@every_dim
def test_the_bound_says_something(codec: CacheFormat, dim: int) -> None:
    rows = gaussian(256, dim)
    error = within_bound(codec, rows)
    bound = codec.bound(rows).double().expand_as(error)
    if codec.name == "f32":
        assert float(bound.max()) == 0
    else:
        assert float(error.max()) > 0
        assert float(bound.max()) <= 10 * float(error.max())
        assert float(bound.mean()) <= 20 * float(error.mean())


@every_codec
@pytest.mark.parametrize("dim", [16, 24, 40, *DIMS])
def test_a_row_takes_the_bytes_of_its_planes(codec: CacheFormat, dim: int) -> None:
    encoded = codec.encode(gaussian(6, dim).reshape(3, 2, dim))
    planes = codec.planes(dim)
    assert encoded.dtype == torch.uint8
    assert encoded.shape == (3, 2, sum(planes))
    assert all(width > 0 for width in planes)
    # The first plane holds the codes, whole bytes of them; scales and block headers come on top.
    assert math.ceil(dim * codec.code_bits / 8) <= sum(planes)


@every_codec
@every_dim
def test_re_encoding_changes_no_byte_where_the_format_says_so(codec: CacheFormat, dim: int) -> None:
    if not codec.idempotent:
        # The promise that is left: the norm of what is read does not drift away over many rounds.
        rows = gaussian(64, dim)
        first = codec.decode(codec.encode(rows), dim)
        again = first
        for _ in range(16):
            again = codec.decode(codec.encode(again), dim)
        assert float((again - first).norm() / first.norm()) < 0.02
        return
    for kind, rows in hard_rows(dim):
        encoded = codec.encode(rows)
        again = codec.encode(codec.decode(encoded, dim))
        assert torch.equal(encoded, again), kind


@every_codec
def test_a_row_does_not_depend_on_its_batch(codec: CacheFormat) -> None:
    rows = gaussian(130, 80)
    together = codec.encode(rows)
    for index in (0, 1, 64, 129):
        assert torch.equal(codec.encode(rows[index : index + 1])[0], together[index])
        assert torch.equal(codec.encode(rows[index]), together[index])
    assert torch.equal(codec.encode(rows.reshape(13, 10, 80)).flatten(0, 1), together)
    assert torch.equal(codec.encode(rows.T.contiguous().T), together)
    decoded = codec.decode(together, 80)
    assert torch.equal(codec.decode(together[7], 80), decoded[7])


@every_codec
def test_no_rows_are_rows_too(codec: CacheFormat) -> None:
    encoded = codec.encode(torch.zeros(0, 2, 128))
    assert encoded.shape == (0, 2, sum(codec.planes(128)))
    assert codec.decode(encoded, 128).shape == (0, 2, 128)


@every_codec
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_rows_that_are_not_finite_are_refused(codec: CacheFormat, bad: float) -> None:
    rows = gaussian(4, 128).reshape(2, 2, 128)
    rows[1, 0, 77] = bad
    with pytest.raises(Corrupted, match="1 of 4 cache rows hold NaN or infinity"):
        codec.encode(rows)


@every_codec
def test_encoding_leaves_its_input_alone(codec: CacheFormat) -> None:
    rows = gaussian(8, 128)
    before = rows.clone()
    encoded = codec.encode(rows)
    data = encoded.clone()
    codec.decode(encoded, 128)
    codec.bound(rows)
    assert torch.equal(rows, before)
    assert torch.equal(encoded, data)


@every_codec
def test_zeros_stay_zeros_and_signs_stay_signs(codec: CacheFormat) -> None:
    assert not bool(codec.decode(codec.encode(torch.zeros(1, 128)), 128).any())
    rows = gaussian(64, 128)
    decoded = codec.decode(codec.encode(rows), 128)
    large = rows.abs() > 1
    assert torch.equal(decoded.sign()[large], rows.sign()[large])


def test_the_folder_is_the_registry() -> None:
    modules = {module.name for module in pkgutil.iter_modules(truekv.formats.__path__)}
    assert set(members("truekv.formats", "FORMATS")) <= modules
    listed = [codec for file in members("truekv.formats", "FORMATS").values() for codec in file]  # type: ignore[attr-defined]
    assert all(isinstance(codec, CacheFormat) for codec in listed)
    assert len({codec.name for codec in listed}) == len(listed) == len(CODECS)
    assert all(codec in CODECS for pair in pairs().values() for codec in pair)
    assert all(codec in CODECS for codec in aliases().values())
    assert len(set(names())) == len(names())
    promised = """auto bf16 f32 fp8 fp8_e4m3 fp8_e5m2 int8 kv4 kv3 k8v4 k4v3 turboquant_k8v4 turboquant_4bit_nc
        turboquant_k3v4_nc turboquant_3bit_nc q8_0 q5_1 q5_0 q4_1 q4_0 iq4_nl"""
    assert set(promised.split()) <= set(names())


def test_int8_needs_no_calibration_and_low_bits_do() -> None:
    needed = {name for name, codec in CODECS.items() if codec.calibrated}
    assert needed == {"kv4", "kv3", "fp8_e4m3", "fp8_e5m2"}
    plain = {name for name, codec in CODECS.items() if not codec.rotated}
    blocks = {"q8_0", "q5_1", "q5_0", "q4_1", "q4_0", "iq4_nl"}
    assert plain == {"f32", "bf16", "fp8_e4m3", "fp8_e5m2", "turboquant_fp8"} | blocks
