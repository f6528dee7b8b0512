"""The tokens of a step as every recurrent rule sees them: replayed, then certain, then drafts, without gaps.

Legend: B rows, T new tokens, Q longest chunk, R log capacity (drafts of one step), N = R + Q places of
a row's timeline, C convolved channels, K taps of the convolution.

Row b's timeline is the `replay[b]` accepted drafts of its last step, from the log, and then its
`count[b]` new tokens; what is left of the N places is zero. Zero inputs are exact no-ops in every
rule, so no kernel needs a length on the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Mapping

    from truekv.core.batch import Step


@dataclass(frozen=True, slots=True)
class Timeline:
    """A step's tokens in order, and how far they are real."""

    inputs: Mapping[str, torch.Tensor]
    """[B, N, *shape] per logged input, in its own dtype; zero beyond a row's tokens."""
    window: torch.Tensor
    """[B, K - 1 + N, C] the convolution's inputs, led by the K - 1 that came before."""
    kept: torch.Tensor
    """[B] how many places are folded into the state for good: replayed and certain tokens."""
    step: Step

    def folds(self) -> list[torch.Tensor]:
        """Return [B] bool per place: whether its token goes into the saved state."""
        place = torch.arange(self.places, device=self.kept.device)
        return list((place[:, None] < self.kept).unbind(0))

    @property
    def places(self) -> int:
        """N."""
        return next(iter(self.inputs.values())).shape[1]

    def ragged(self, out_BN: torch.Tensor) -> torch.Tensor:
        """Pick the new tokens' outputs: [B, N, ...] to [T, ...]."""
        step = self.step
        return out_BN[step.owner, step.replay[step.owner] + step.offset]


def unroll(
    inputs: Mapping[str, torch.Tensor], tail: torch.Tensor, log: Mapping[str, torch.Tensor], step: Step
) -> Timeline:
    """Lay the step out in time.

    `inputs`: [T, *shape] per logged input, one of them "conv" [T, C]; `tail`: [slots, C, K - 1], the
    convolution's last inputs; `log`: [slots, R, *shape] under the names of `inputs`.
    """
    capacity = log["conv"].shape[1]
    longest = step.gather.shape[1]
    place = torch.arange(capacity + longest, device=step.position.device)
    # Accepted drafts fill the front of the log; new tokens follow them at once.
    shift = torch.where(place < step.replay[:, None], 0, capacity - step.replay[:, None])
    source_BN = (place + shift).clamp(max=capacity + longest - 1)
    absent_BN = place >= (step.replay + step.count)[:, None]
    rows = torch.arange(len(step.slot), device=step.position.device)[:, None]
    laid: dict[str, torch.Tensor] = {}
    for name, new in inputs.items():
        both = torch.cat([log[name][step.slot].to(new.dtype), new[step.gather]], 1)
        laid[name] = both[rows, source_BN].masked_fill(absent_BN.view(*absent_BN.shape, *[1] * (new.ndim - 1)), 0)
    before = tail[step.slot].transpose(1, 2).to(inputs["conv"].dtype)
    return Timeline(laid, torch.cat([before, laid["conv"]], 1), step.replay + step.certain, step)


def convolve(timeline: Timeline, taps_CK: torch.Tensor, bias_C: torch.Tensor | None = None) -> torch.Tensor:
    """Causal depthwise convolution and silu, in float32: [B, N, C].

    The taps are summed one after the other, and silu is written out: torch's fused silu rounds
    the last few elements of a tensor differently, so its values would depend on the chunk.
    """
    window = timeline.window.float()
    taps = taps_CK.float()
    places = timeline.places
    out = window[:, :places] * taps[:, 0]
    for k in range(1, taps.shape[1]):
        out = out + window[:, k : k + places] * taps[:, k]
    if bias_C is not None:
        out = out + bias_C.float()
    return out / (1 + torch.exp(-out))


def save_tail(timeline: Timeline, tail: torch.Tensor) -> None:
    """Keep the convolution's inputs of the last K - 1 tokens that were folded, in place."""
    step = timeline.step
    place = timeline.kept[:, None] + torch.arange(tail.shape[2], device=tail.device)
    rows = torch.arange(len(step.slot), device=tail.device)[:, None]
    tail[step.slot] = timeline.window[rows, place].transpose(1, 2).to(tail.dtype)


def save_drafts(timeline: Timeline, log: Mapping[str, torch.Tensor]) -> None:
    """Write the draft tokens' inputs to the front of the log, in place."""
    step = timeline.step
    rows = torch.arange(len(step.slot), device=step.position.device)[:, None]
    for name, entries in log.items():
        place = timeline.kept[:, None] + torch.arange(entries.shape[1], device=entries.device)
        drafted = timeline.inputs[name][rows, place.clamp(max=timeline.places - 1)]
        entries[step.slot] = drafted.to(entries.dtype)
