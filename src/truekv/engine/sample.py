"""From one row of logits to one token; the draw depends on the seed and the place, on nothing else."""

from __future__ import annotations

import hashlib
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.lazy import torch

if TYPE_CHECKING:
    from truekv.core.options import SamplingParams

# Nuclei rarely need more candidates; a full sort of 150,000 logits costs ten times as much.
_USUAL_NUCLEUS = 1024


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability under the model, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token, logprob) pairs, best first."""


class Sampler:
    """Chooses the tokens of one request.

    The number drawn for the i-th token is a hash of (seed, i): a request that is restarted, batched
    with others or sampled twice at the same place draws the same, and no generator state exists.
    """

    def __init__(self, params: SamplingParams) -> None:
        """Fix the seed: the one asked for, or a fresh one where sampling needs it."""
        self.params = params
        greedy = params.temperature == 0
        self.seed = params.seed if params.seed is not None or greedy else secrets.randbits(63)

    def choose(self, logits_V: torch.Tensor, index: int) -> int:
        """Return the `index`-th token of the answer; logits are finite float32 [vocab] on the CPU."""
        if self.params.temperature == 0 or self.params.top_k == 1:
            return int(logits_V.argmax())
        weights_K, tokens_K = self._candidates(logits_V)
        cumulated_K = weights_K.cumsum(0)
        if self.params.top_p < 1:
            # A candidate stays while the mass before it is below top_p, so the best one always does.
            cumulated_K = cumulated_K[(cumulated_K - weights_K) < self.params.top_p]
        point = draw(self.seed or 0, index) * float(cumulated_K[-1])
        place = int(torch.searchsorted(cumulated_K, point, right=True))
        return int(tokens_K[min(place, len(cumulated_K) - 1)])

    def _candidates(self, logits_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (probabilities, tokens) after temperature and top-k, best first where a filter needs the order."""
        # The largest logit is taken off first: a tiny temperature then gives -inf and 0, never inf - inf.
        scaled_V = (logits_V.double() - logits_V.max()) / self.params.temperature
        if self.params.top_k:
            best = scaled_V.topk(min(self.params.top_k, len(scaled_V)))
            return torch.softmax(best.values, dim=0), best.indices
        weights_V = torch.softmax(scaled_V, dim=0)
        if self.params.top_p == 1:
            return weights_V, torch.arange(len(weights_V))
        best = weights_V.topk(min(_USUAL_NUCLEUS, len(weights_V)))
        if float(best.values.sum()) < self.params.top_p:
            best = weights_V.sort(descending=True, stable=True)
        return best[0], best[1]


def draw(seed: int, index: int) -> float:
    """Return a number in [0, 1): the same for the same seed and place on any machine."""
    digest = hashlib.blake2b(b"%d:%d" % (seed, index), digest_size=8).digest()
    return (int.from_bytes(digest) >> 11) * 2.0**-53


def logprob(logits_V: torch.Tensor, token: int, count: int) -> Logprob:
    """Return the log-probability of a token and of the `count` most likely ones."""
    logprobs_V = torch.log_softmax(logits_V.float(), dim=0)
    best = logprobs_V.topk(min(count, len(logprobs_V)))
    top = tuple(zip((int(item) for item in best.indices), (float(item) for item in best.values), strict=True))
    return Logprob(token, float(logprobs_V[token]), top)
