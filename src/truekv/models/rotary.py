"""Rotary positions: which frequencies a config asks for, and how a head is turned by them.

Shapes: T tokens, H heads, D head size, R rotated dimensions (the first R of D), P = R / 2 planes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable
    from collections.abc import Sequence as Seq

    from truekv.core.config import Config
    from truekv.core.ops import Ops
    from truekv.models.blocks import RMSNorm


@dataclass(frozen=True, slots=True)
class Rope:
    """What a config says about rotary positions. Fields carry the names of `rope_parameters`."""

    dim: int
    """R, the rotated dimensions of a head."""
    rope_theta: float
    rope_type: str = "default"
    factor: float = 1.0
    original_max_position_embeddings: int = 0
    attention_factor: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 0.0
    mscale_all_dim: float = 0.0
    truncate: bool = True
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    interleaved: bool = False
    """Whether a plane is dimensions (2i, 2i + 1) instead of (i, i + P)."""

    @property
    def amplitude(self) -> float:
        """What cos and sin are multiplied by: YaRN's attention temperature, 1 for every other type."""
        if self.rope_type != "yarn":
            return 1.0
        if self.attention_factor is not None:
            return self.attention_factor
        if self.mscale and self.mscale_all_dim:
            return yarn_mscale(self.factor, self.mscale) / yarn_mscale(self.factor, self.mscale_all_dim)
        return yarn_mscale(self.factor, 1.0)

    def frequencies(self) -> torch.Tensor:
        """Return the [P] float32 angles per position."""
        exponents_P = torch.arange(0, self.dim, 2, dtype=torch.float32) / self.dim
        return _FREQUENCIES[self.rope_type](self, 1.0 / (self.rope_theta**exponents_P))


def read_rope(
    config: Config, head_dim: int, max_positions: int, *, partial: float = 1.0, interleaved: bool = False
) -> Rope:
    """Read `rope_parameters`, or the older `rope_theta`, `rope_scaling`, `partial_rotary_factor`.

    `partial` is the family's own share of rotated dimensions, for configs that do not say.
    """
    old_theta = config.number("rope_theta", 10000.0)
    old_partial = config.number("partial_rotary_factor", partial)
    nested = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    config.ignore("rope_parameters", "rope_scaling")
    rope = config.nested(nested, {})
    kind = rope.string("rope_type", rope.string("type", "default"))
    if kind not in _FREQUENCIES:
        raise Refused(
            f"{rope.where}: rope_type '{kind}' is not implemented; truekv has {', '.join(sorted(_FREQUENCIES))}"
        )
    dim = int(head_dim * rope.number("partial_rotary_factor", old_partial))
    if not 2 <= dim <= head_dim or dim % 2:
        raise Refused(f"{rope.where}: {dim} of {head_dim} dimensions would be rotated, which must be an even number")
    theta = rope.number("rope_theta", old_theta)
    fields = _read_scaling(rope, kind, max_positions) if kind != "default" else {}
    if theta <= 1.0:
        raise Refused(f"{rope.where}: rope_theta is {theta:g}, but must be greater than 1")
    # Multimodal positions: in text, the three axes hold the same position, so their interleaving is the identity.
    rope.ignore("mrope_section", "mrope_interleaved")
    rope.close()
    return Rope(dim, theta, kind, interleaved=interleaved, **fields)  # type: ignore[arg-type]


def _read_scaling(rope: Config, kind: str, max_positions: int) -> dict[str, float | int | bool | None]:
    """Read the fields of the scaled types."""
    trained = rope.integer("original_max_position_embeddings", max_positions)
    factor = rope.number("factor", max_positions / trained)
    if not 1.0 <= factor < math.inf:
        raise Refused(f"{rope.where}: factor is {factor:g}, but must be a finite number of at least 1")
    fields: dict[str, float | int | bool | None] = {"factor": factor, "original_max_position_embeddings": trained}
    if kind == "yarn":
        fields["attention_factor"] = rope.number("attention_factor") if "attention_factor" in rope else None
        for name, usual in (("beta_fast", 32.0), ("beta_slow", 1.0), ("mscale", 0.0), ("mscale_all_dim", 0.0)):
            fields[name] = rope.number(name, usual)
        fields["truncate"] = rope.boolean("truncate", default=True)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor"), rope.number("high_freq_factor")
        if not 0.0 < low < high:
            raise Refused(f"{rope.where}: low_freq_factor {low:g} must be positive and below high_freq_factor {high:g}")
        fields |= {"low_freq_factor": low, "high_freq_factor": high}
    return fields


def yarn_mscale(factor: float, mscale: float) -> float:
    """YaRN's temperature for a context `factor` times longer (Peng et al. 2023, eq. 22; DeepSeek's mscale)."""
    return 1.0 if factor <= 1.0 else 0.1 * mscale * math.log(factor) + 1.0


def _plain(_rope: Rope, plain_P: torch.Tensor) -> torch.Tensor:
    return plain_P


def _linear(rope: Rope, plain_P: torch.Tensor) -> torch.Tensor:
    return plain_P / rope.factor


def _llama3(rope: Rope, plain_P: torch.Tensor) -> torch.Tensor:
    """Llama 3.1: divide slow frequencies, keep fast ones, blend between two wavelengths."""
    turns_P = rope.original_max_position_embeddings * plain_P / (2.0 * math.pi)
    low, high = rope.low_freq_factor, rope.high_freq_factor
    kept_P = ((turns_P - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 - kept_P) * plain_P / rope.factor + kept_P * plain_P


def _yarn(rope: Rope, plain_P: torch.Tensor) -> torch.Tensor:
    """YaRN (Peng et al. 2023, section 3.2): keep planes that turn often, divide those that hardly turn."""

    def plane_of(turns: float) -> float:
        ratio = rope.original_max_position_embeddings / (turns * 2.0 * math.pi)
        return rope.dim * math.log(ratio) / (2.0 * math.log(rope.rope_theta))

    first, last = plane_of(rope.beta_fast), plane_of(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.dim - 1)
    last = last + 0.001 if first == last else last  # a step, not a division by zero
    planes_P = torch.arange(rope.dim // 2, dtype=torch.float32)
    divided_P = ((planes_P - first) / (last - first)).clamp(0.0, 1.0)
    return plain_P / rope.factor * divided_P + plain_P * (1.0 - divided_P)


_FREQUENCIES: dict[str, Callable[[Rope, torch.Tensor], torch.Tensor]] = {
    "default": _plain,
    "linear": _linear,
    "llama3": _llama3,
    "yarn": _yarn,
}


@dataclass(frozen=True, slots=True)
class Angles:
    """The positions of one step, ready to turn heads."""

    ops: Ops
    cos: torch.Tensor
    """[T, P] float32."""
    sin: torch.Tensor
    """[T, P] float32."""
    interleaved: bool

    def rotate(self, *heads: torch.Tensor, norms: Seq[RMSNorm] = ()) -> tuple[torch.Tensor, ...]:
        """Turn the first R dimensions of one or two tensors [T, H, D], each through its norm first if there are norms.

        In float32; interleaved planes come out as halves.
        """
        gains = [norm.weight for norm in norms] or [None] * len(heads)
        # Both norms of a layer are of one family.
        (eps,) = {norm.eps for norm in norms} or {0.0}
        return self.ops.norm_rotate(heads, gains, eps, self.cos, self.sin, interleaved=self.interleaved)


class Rotary:
    """Makes a step's angles; nothing is tabled ahead, so no length is baked in."""

    def __init__(self, rope: Rope, ops: Ops, device: torch.device | str = "cpu") -> None:
        """Compute the frequencies once, in float32 whatever the model's dtype, and the same on every device."""
        self.rope = rope
        self.ops = ops
        self.frequencies_P = rope.frequencies().to(device)

    def angles(self, positions: torch.Tensor) -> Angles:
        """Return the angles of [T] positions."""
        cos_TP, sin_TP = self.ops.angles(positions, self.frequencies_P, self.rope.amplitude)
        return Angles(self.ops, cos_TP, sin_TP, self.rope.interleaved)
