"""From one row of logits to one token; the draw depends on the seed and the place, on nothing else."""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.engine.candidates import at_least, best, largest, nucleus

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from truekv.core.options import SamplingParams
    from truekv.engine.constrain import Constraint


@dataclass(frozen=True, slots=True)
class Logprob:
    """Natural logarithm of a token's probability under the model, before temperature and filters."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most likely (token, logprob) pairs, best first."""


class Sampler:
    """Chooses the tokens of one request, one after the other.

    The number drawn for the i-th token is a hash of (seed, i): a request that is restarted or batched
    with others draws the same, and no generator state exists. A verify step calls `choose` row by row
    and stops at the first draft that differs, so nothing is ever taken back. The order of the
    processors is vLLM's: grammar, min_tokens, logit_bias, penalties, temperature, min_p, top_k, top_p.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        ends: frozenset[int],
        constraint: Constraint | None = None,
    ) -> None:
        """Fix the seed: the one asked for, or a fresh one where sampling needs it.

        `ends`: the ids that end an answer (none for ignore_eos). Refused: ids the vocabulary lacks.
        """
        self.params = params
        self.ends = ends | frozenset(params.stop_token_ids)
        """The ids that end this answer: those of the checkpoint and those asked for."""
        bias = params.logit_bias or {}
        _check("logit_bias", bias, vocab_size)
        _check("stop_token_ids", params.stop_token_ids, vocab_size)
        self._greedy = params.temperature == 0 or params.top_k == 1
        self.seed = params.seed if params.seed is not None or params.temperature == 0 else secrets.randbits(63)
        self._constraint = constraint
        self._chosen = 0
        self._banned = torch.tensor(sorted(self.ends), dtype=torch.int64) if params.min_tokens else None
        self._biased = torch.tensor(list(bias), dtype=torch.int64) if bias else None
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        punished = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._penalties = Penalties(params, prompt, vocab_size) if punished else None

    @property
    def finished(self) -> bool:
        """Whether the grammar admits nothing more but the end; `choose` must not be called then."""
        return self._constraint is not None and self._constraint.finished

    def allowed(self, drafts: list[int]) -> list[int]:
        """Return the longest beginning of the drafts that the grammar admits, without advancing it."""
        return drafts if self._constraint is None else drafts[: self._constraint.admits(drafts)]

    def choose(self, logits_V: torch.Tensor, likeliest: int | None = None) -> int:
        """Return the next token of the answer and remember it; logits are finite float32 [vocab] on the CPU.

        `likeliest`: the place of the largest, of equal ones the first, where it is known. The logits stay as
        they are. Raises ConstraintFailed where the grammar cannot go on.
        """
        adjusted_V = self._adjust(logits_V)
        if not self._greedy:
            token = self._draw(adjusted_V)
        elif likeliest is None or adjusted_V is not logits_V:
            token = largest(adjusted_V)
        else:
            token = likeliest
        self._chosen += 1
        if self._penalties is not None:
            self._penalties.count(token)
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def _adjust(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Apply what can change the best token; the row itself is returned where nothing applies."""
        row_V = logits_V if self._constraint is None else self._constraint.mask(logits_V)
        if self._banned is not None and self._chosen < self.params.min_tokens:
            # Where the grammar admits nothing but an end, the grammar goes first.
            longer_V = row_V.index_fill(0, self._banned, -math.inf)
            row_V = longer_V if float(longer_V.max()) > -math.inf else row_V
        if self._biased is not None:
            row_V = row_V.index_add(0, self._biased, self._bias)
        return row_V if self._penalties is None else self._penalties.apply(row_V)

    def _draw(self, logits_V: torch.Tensor) -> int:
        """Sample from what temperature and filters leave."""
        weights_K, tokens_K = self._candidates(logits_V)
        cumulated_K = weights_K.cumsum(0)
        # Below the whole mass, so the first place beyond it exists and has a weight of its own.
        point = draw(self.seed or 0, self._chosen) * float(cumulated_K[-1])
        return int(tokens_K[int(torch.searchsorted(cumulated_K, point, right=True))])

    def _candidates(self, logits_V: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (weights in proportion to the probabilities, tokens) after temperature and filters."""
        top = logits_V.max()
        if self.params.top_k:
            values_K, tokens_K = best(logits_V, self.params.top_k)
            scaled_K = self._scaled(values_K, top)
            if self.params.min_p:
                scaled_K = scaled_K.masked_fill(scaled_K < math.log(self.params.min_p), -math.inf)
            return self._nucleus(torch.softmax(scaled_K, dim=0), tokens_K)
        if self.params.min_p:
            # The best one stands at 0, so this compares probabilities with that of the best.
            scaled_V = self._scaled(logits_V, top)
            tokens_K = at_least(scaled_V, math.log(self.params.min_p))
            return self._nucleus(torch.softmax(scaled_V[tokens_K], dim=0), tokens_K)
        weights_V = torch.softmax(self._scaled(logits_V, top), dim=0)
        return self._nucleus(weights_V, torch.arange(len(weights_V)))

    def _scaled(self, logits_K: torch.Tensor, top: torch.Tensor) -> torch.Tensor:
        """Return float64 logits over the temperature."""
        # The largest logit is taken off first: a tiny temperature then gives -inf and 0, never inf - inf.
        return (logits_K.double() - top) / self.params.temperature

    def _nucleus(self, weights_K: torch.Tensor, tokens_K: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Apply top-p to candidates."""
        if self.params.top_p == 1:
            return weights_K, tokens_K
        weights_K, places_K = nucleus(weights_K, self.params.top_p)
        return weights_K, tokens_K[places_K]


class Penalties:
    """Repetition penalty over prompt and answer; presence and frequency penalties over the answer alone."""

    def __init__(self, params: SamplingParams, prompt: Sequence[int], vocab_size: int) -> None:
        """Count nothing yet; the prompt matters to the repetition penalty only."""
        self._repetition = params.repetition_penalty
        self._presence = params.presence_penalty
        self._frequency = params.frequency_penalty
        met = dict.fromkeys(prompt if self._repetition != 1 else ())
        # Only tokens that were met are touched: a handful of ids instead of a pass over the vocabulary.
        room = min(vocab_size, len(met) + params.max_tokens)
        self._places = {token: place for place, token in enumerate(met)}
        self._tokens = torch.tensor([*met, *[0] * (room - len(met))], dtype=torch.int64)
        self._counts = torch.zeros(room)

    def count(self, token: int) -> None:
        """Take note of a token of the answer."""
        place = self._places.setdefault(token, len(self._places))
        self._tokens[place] = token
        self._counts[place] += 1

    def apply(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Return float32 [vocab] with the logits of the tokens that were met punished."""
        tokens_N, counts_N = self._tokens[: len(self._places)], self._counts[: len(self._places)]
        found_N = logits_V[tokens_N]
        found_N = torch.where(found_N > 0, found_N / self._repetition, found_N * self._repetition)
        found_N -= self._frequency * counts_N + self._presence * (counts_N > 0)
        return logits_V.index_put((tokens_N,), found_N)


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


def _check(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    wrong = next((token for token in tokens if token >= vocab_size), None)
    if wrong is not None:
        raise Refused(f"{name} names token {wrong}, but the ids of this model go from 0 to {vocab_size - 1}")
