"""How far a stored cache is from the truth: distortion of a codec, divergence of attention, divergence of logits.

Every number here is measured, on rows or logits that are given or seeded; nothing is looked up.
"""

# Shape suffixes: N rows, S stored tokens, R queries, D dim, T positions, V vocabulary.

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.formats.fit import Statistics, fit
from truekv.formats.frame import Frame, frame_for

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat

Keys = Literal["gaussian", "outliers", "offset"]
"""Gaussian keys; four channels twenty times larger, and the queries smaller there; four channels moved by 20 sigma."""
_ODD_CHANNELS = (5, 37, 70, 111)


@dataclass(frozen=True, slots=True)
class Distortion:
    """What a codec does to Gaussian rows."""

    name: str
    bits: float
    """Per number, scales included."""
    nmse: float
    """Sum of squared errors over sum of squares."""
    ratio: float
    """nmse over 2^(-2 bits), the least that any code of this rate can reach on Gaussian rows."""


@dataclass(frozen=True, slots=True)
class Divergence:
    """How far one set of distributions is from a reference."""

    mean: float
    """Mean Kullback-Leibler divergence, nats."""
    largest: float
    """Largest over all positions, nats."""
    top1: float
    """Share of positions whose most likely entry is the same."""


def distortion(codec: CacheFormat, dim: int = 128, rows: int = 4096, seed: int = 0) -> Distortion:
    """Encode and decode seeded Gaussian rows [rows, dim] with the codec alone, without a frame."""
    rows_ND = torch.randn(rows, dim, generator=torch.Generator().manual_seed(seed))
    decoded_ND = codec.decode(codec.encode(rows_ND), dim)
    bits = bits_per_value(codec, dim)
    nmse = float((decoded_ND - rows_ND).double().square().sum() / rows_ND.double().square().sum())
    return Distortion(codec.name, bits, nmse, nmse * 4.0**bits)


def bits_per_value(codec: CacheFormat, dim: int) -> float:
    """Return the bits that one number of a row takes, scales included."""
    return 8 * sum(codec.planes(dim)) / dim


def attention_kl(
    codec: CacheFormat, keys: Keys = "gaussian", *, measured: bool = True, tokens: int = 2048, seed: int = 0
) -> Divergence:
    """Divergence of attention weights when keys are stored and everything else is exact.

    One kv head of 128 channels, 256 queries of which half look for one token. The three kinds of keys
    give the same exact attention; they only differ in how hard they are to store. With `measured`, the frame is
    fitted on other rows of the same kind; without, only the format's own rotation applies.
    """
    test = _Sample.draw(keys, tokens, 256, seed)
    calibration = _Sample.draw(keys, 1024, 256, seed + 1) if measured else None
    frame = frame_for(codec, calibration.frame() if calibration else None)
    stored_SD = codec.decode(codec.encode(frame.rows(test.keys)[:, 0]), 128)
    scores = test.queries[:, 0] @ test.keys[:, 0].T
    found = frame.query(test.queries)[:, 0] @ stored_SD.T
    return divergence(scores / math.sqrt(128), found / math.sqrt(128))


def divergence(reference_TV: torch.Tensor, found_TV: torch.Tensor) -> Divergence:
    """KL(softmax(reference) || softmax(found)) of logits or scores [T, V], in float64.

    Raises Refused if the shapes differ, are not [T, V] or hold no position. Logits that are not finite
    give an infinite divergence, never a NaN that compares as small.
    """
    if reference_TV.shape != found_TV.shape or reference_TV.ndim != 2 or not reference_TV.numel():
        raise Refused(
            f"divergence compares logits [T, V] of equal shape, "
            f"not {list(reference_TV.shape)} and {list(found_TV.shape)}"
        )
    kl_T = kl(reference_TV, found_TV)
    same = reference_TV.argmax(-1) == found_TV.argmax(-1)
    return Divergence(float(kl_T.mean()), float(kl_T.max()), float(same.double().mean()))


def kl(reference_TV: torch.Tensor, found_TV: torch.Tensor) -> torch.Tensor:
    """KL(softmax(reference) || softmax(found)) at each position, float64 [T]; infinite where a logit is not finite."""
    reference_log = torch.log_softmax(reference_TV.double(), -1)
    found_log = torch.log_softmax(found_TV.double(), -1)
    kl_T = (reference_log.exp() * (reference_log - found_log)).sum(-1)
    finite = torch.isfinite(reference_TV).all(-1) & torch.isfinite(found_TV).all(-1)
    # Rounding may leave -1e-17 for equal distributions.
    return torch.where(finite, kl_T.clamp(min=0), math.inf)


@dataclass(frozen=True, slots=True, eq=False)
class _Sample:
    """Keys [S, 1, D] and queries [R, 1, D] whose exact attention does not depend on the kind of keys."""

    keys: torch.Tensor
    queries: torch.Tensor

    @classmethod
    def draw(cls, keys: Keys, tokens: int, queries: int, seed: int) -> _Sample:
        """Draw Gaussian keys and queries, then make four channels hard in a way that attention cannot see."""
        generator = torch.Generator().manual_seed(seed)
        keys_SD = torch.randn(tokens, 128, generator=generator)
        queries_RD = 2 * torch.randn(queries, 128, generator=generator)
        wanted = torch.randint(0, tokens, (queries // 2,), generator=generator)
        # A weight of about 0.8 on the wanted token.
        queries_RD[: queries // 2] += 12 / math.sqrt(128) * keys_SD[wanted]
        odd = list(_ODD_CHANNELS)
        match keys:
            case "gaussian":
                pass
            case "outliers":
                keys_SD[:, odd] *= 20
                queries_RD[:, odd] /= 20
            case "offset":
                keys_SD[:, odd] += torch.tensor([20.0, -20.0, 20.0, -20.0])
        return cls(keys_SD[:, None], queries_RD[:, None])

    def frame(self) -> Frame:
        """Fit the frame of these keys."""
        keys, queries = Statistics(1, 128), Statistics(1, 128)
        keys.observe(self.keys)
        queries.observe(self.queries)
        return fit("key", keys, queries)
