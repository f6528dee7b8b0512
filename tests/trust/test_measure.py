"""The measures themselves: known answers, known orders, and numbers that are not finite."""

from __future__ import annotations

import math

import pytest
import torch

from truekv.core.errors import Refused
from truekv.formats.choice import codecs
from truekv.trust.measure import Divergence, attention_kl, bits_per_value, distortion, divergence, kl


def logits(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_divergence_of_known_distributions() -> None:
    reference = torch.tensor([[0.5, 0.5], [0.9, 0.1]]).log()
    found = torch.tensor([[0.25, 0.75], [0.9, 0.1]]).log()
    first = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert kl(reference, found).tolist() == pytest.approx([first, 0.0], abs=1e-7)
    result = divergence(reference, found)
    assert result.mean == pytest.approx(first / 2, abs=1e-7)
    assert result.largest == pytest.approx(first, abs=1e-7)
    assert result.top1 == 0.5


def test_divergence_ignores_what_softmax_ignores_and_nothing_else() -> None:
    reference = logits(50, 300)
    assert divergence(reference, reference) == Divergence(0.0, 0.0, 1.0)
    assert divergence(reference, reference + 100).mean < 1e-9
    assert divergence(reference, reference + 0.01 * logits(50, 300, seed=1)).mean == pytest.approx(5e-5, rel=0.2)
    moved = reference.clone()
    moved[7, 3] += 5
    result = divergence(reference, moved)
    assert result.largest == pytest.approx(50 * result.mean, rel=1e-6)


def test_divergence_sees_small_differences_of_large_logits() -> None:
    # In float32 the logarithm of the sum would round these away.
    reference = torch.tensor([[1000.0, 1000.0]])
    found = torch.tensor([[1000.0, 1000.001]])
    assert divergence(reference, found).mean == pytest.approx(float(found[0, 1] - 1000) ** 2 / 8, rel=1e-3)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_are_infinitely_far(bad: float) -> None:
    reference, found = logits(3, 5), logits(3, 5)
    found[1, 2] = bad
    for pair in ((reference, found), (found, reference)):
        assert kl(*pair).tolist() == [0.0, math.inf, 0.0]
        result = divergence(*pair)
        assert result.mean == result.largest == math.inf


@pytest.mark.parametrize(("one", "other"), [((3, 5), (3, 4)), ((3, 5), (2, 5)), ((5,), (5,)), ((0, 5), (0, 5))])
def test_divergence_refuses_what_cannot_be_compared(one: tuple[int, ...], other: tuple[int, ...]) -> None:
    with pytest.raises(Refused, match=r"logits \[T, V\] of equal shape"):
        divergence(torch.zeros(one), torch.zeros(other))


def test_distortion_of_a_uniform_quantizer_is_the_textbooks() -> None:
    # int8: the row's largest number over 127 is the step; a uniform error has a variance of step^2 / 12.
    rows = logits(4096, 128, seed=4)
    step = rows.abs().amax(-1) / 127
    expected = float(step.square().mean() / 12)
    found = distortion(codecs()["int8"], seed=4)
    assert found.nmse == pytest.approx(expected, rel=0.02)
    assert found.bits == 8.125 == bits_per_value(codecs()["int8"], 128)
    assert found.ratio == pytest.approx(found.nmse * 2**16.25)


def test_distortion_falls_by_the_bits_spent() -> None:
    found = {name: distortion(codec, rows=512).nmse for name, codec in codecs().items()}
    assert found["f32"] == 0
    order = ["bf16", "q8_0", "int8", "turboquant_fp8", "fp8_e4m3", "fp8_e5m2", "iq4_nl", "q4_0", "kv4", "kv3"]
    assert [found[name] for name in order] == sorted(found[name] for name in order)
    assert distortion(codecs()["kv4"], rows=64, seed=1) == distortion(codecs()["kv4"], rows=64, seed=1)
    assert distortion(codecs()["kv4"], rows=64, seed=1) != distortion(codecs()["kv4"], rows=64, seed=2)


def test_exact_keys_have_exact_attention() -> None:
    for keys in ("gaussian", "outliers", "offset"):
        assert attention_kl(codecs()["f32"], keys, tokens=256).largest < 1e-9  # type: ignore[arg-type]


def test_attention_sees_what_a_block_format_does_to_hard_keys() -> None:
    codec = codecs()["q4_0"]
    easy = attention_kl(codec, "gaussian", tokens=512)
    hard = attention_kl(codec, "outliers", tokens=512)
    assert hard.mean > 20 * easy.mean
    assert hard.top1 < easy.top1


def test_key_error_predicts_the_divergence() -> None:
    # The divergence is half the variance of the error of the scores, hence proportional to nMSE.
    four, three = attention_kl(codecs()["kv4"]), attention_kl(codecs()["kv3"])
    ratio = distortion(codecs()["kv3"]).nmse / distortion(codecs()["kv4"]).nmse
    assert three.mean / four.mean == pytest.approx(ratio, rel=0.1)
