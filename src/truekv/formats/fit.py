"""From running statistics of rows to a frame: the mathematics of calibration, without a model.

The scale of a key channel balances what a rounding error costs against the room a number takes: among all
scales per channel, s = sqrt(sigma_k / sigma_q) makes the expected error of the score least, because the
error of a stored channel comes back multiplied by s * q. Values are averaged, not scored, and are brought to
unit variance. A common factor per head then leaves fp8 twice the largest number seen as headroom; formats with
a scale per row do not notice it.
"""

# Shape suffixes: T tokens, H heads, D dim.

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final, Literal

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.formats.frame import Frame

if TYPE_CHECKING:
    from collections.abc import Mapping

FP8_TOP: Final = 448.0
HEADROOM: Final = 2.0
"""The largest number seen in calibration may be exceeded by this factor before fp8 clips."""
# A channel that hardly moved while it was measured may move later: no channel's spread counts as less than
# this share of its head's median.
_LEAST_SPREAD: Final = 0.05


@dataclass(slots=True, eq=False)
class Statistics:
    """Per head and channel, in float64: how many rows, their mean, spread and extremes. Observes, changes nothing."""

    heads: int
    dim: int
    count: int = 0
    _values: dict[str, torch.Tensor] = field(default_factory=dict[str, "torch.Tensor"])

    def observe(self, rows_THD: torch.Tensor) -> None:
        """Take in rows [T, H, D]; Corrupted if any is not finite, Refused if the shape differs."""
        if rows_THD.ndim != 3 or rows_THD.shape[1:] != (self.heads, self.dim):
            raise Refused(f"statistics of [T, {self.heads}, {self.dim}] rows got {list(rows_THD.shape)}")
        rows = rows_THD.detach().to("cpu", torch.float64)
        if not bool(torch.isfinite(rows).all()):
            raise Corrupted("rows seen in calibration hold NaN or infinity: no frame can be measured on them")
        if not len(rows):
            return
        mean = rows.mean(0)
        found = {
            "mean": mean,
            "deviations": (rows - mean).square().sum(0),
            "low": rows.amin(0),
            "high": rows.amax(0),
        }
        self._join(len(rows), found)

    def merge(self, other: Statistics) -> None:
        """Take in what another object of the same shape has observed."""
        if (other.heads, other.dim) != (self.heads, self.dim):
            raise Refused(f"statistics of [{self.heads}, {self.dim}] rows cannot take in [{other.heads}, {other.dim}]")
        if other.count:
            self._join(other.count, other._values)

    @property
    def mean(self) -> torch.Tensor:
        """Mean [H, D]."""
        return self._seen("mean")

    @property
    def spread(self) -> torch.Tensor:
        """Standard deviation [H, D]."""
        return (self._seen("deviations") / self.count).sqrt()

    @property
    def second_moment(self) -> torch.Tensor:
        """Mean square [H, D], not centred."""
        return self._seen("deviations") / self.count + self._seen("mean").square()

    @property
    def low(self) -> torch.Tensor:
        """Smallest number [H, D]."""
        return self._seen("low")

    @property
    def high(self) -> torch.Tensor:
        """Largest number [H, D]."""
        return self._seen("high")

    @property
    def amax(self) -> torch.Tensor:
        """Largest magnitude of each head, [H]."""
        return torch.maximum(self.high, -self.low).amax(-1)

    def _seen(self, name: str) -> torch.Tensor:
        if not self.count:
            raise Refused("no row was observed, so there is nothing to measure: calibrate with prompts that reach it")
        return self._values[name]

    def _join(self, count: int, new: Mapping[str, torch.Tensor]) -> None:
        """Combine two sets of moments (Chan, Golub and LeVeque 1979)."""
        if not self.count:
            self.count, self._values = count, dict(new)
            return
        old, total = self._values, self.count + count
        delta = new["mean"] - old["mean"]
        between = delta.square() * (self.count * count / total)
        self._values = {
            "mean": old["mean"] + delta * (count / total),
            "deviations": old["deviations"] + new["deviations"] + between,
            "low": torch.minimum(old["low"], new["low"]),
            "high": torch.maximum(old["high"], new["high"]),
        }
        self.count = total


def fit(role: Literal["key", "value", "both"], rows: Statistics, queries: Statistics | None = None) -> Frame:
    """Return the frame of one field: centre = mean, scale as the module explains, both float32 [H, D].

    `queries`: statistics of the query heads that read these rows, a multiple of H of them, as they are
    scored (after the rotary embedding). Without queries, and for values, every channel gets unit variance.
    Raises Refused if nothing was observed, or if a key field comes without its queries.
    """
    if role != "value" and queries is None:
        raise Refused(f"the frame of a field of role '{role}' balances it against its queries, which were not observed")
    scale = _floored(rows.spread)
    if role != "value" and queries is not None:
        scale = (scale / _floored(_pooled(queries, rows.heads))).sqrt()
    furthest = torch.maximum(rows.high - rows.mean, rows.mean - rows.low)
    reach = (furthest / scale).amax(-1, keepdim=True)
    # A head that never moved has no reach; its scale is then free.
    reach = torch.where(reach > 0, reach, 1.0)
    return Frame(rows.mean.float(), (scale * reach * (HEADROOM / FP8_TOP)).float())


def static_scale(rows: Statistics) -> torch.Tensor:
    """Return the scale of each head for fp8_e4m3 without a centre, [H]: twice its largest number over 448."""
    amax = rows.amax
    return torch.where(amax > 0, amax * (HEADROOM / FP8_TOP), 1.0)


def _pooled(queries: Statistics, heads: int) -> torch.Tensor:
    """Root mean square of each channel over the query heads that share a kv head, [H, D]."""
    if queries.heads % heads:
        raise Refused(f"{queries.heads} query heads cannot share {heads} kv heads evenly")
    moments = queries.second_moment
    return moments.reshape(heads, queries.heads // heads, queries.dim).mean(1).sqrt()


def _floored(spread: torch.Tensor) -> torch.Tensor:
    """Raise channels that hardly moved to a share of their head's median; a head that never moved gets ones."""
    middle = spread.median(-1, keepdim=True).values
    middle = torch.where(middle > 0, middle, spread.amax(-1, keepdim=True))
    return torch.maximum(spread, torch.where(middle > 0, middle * _LEAST_SPREAD, 1.0))
