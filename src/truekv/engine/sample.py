"""From rows of logits to the tokens of one request; a draw depends on the seed and the place, on nothing else."""

from __future__ import annotations

import hashlib
import math
import secrets
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from truekv.core.errors import Corrupted, Refused
from truekv.core.lazy import torch
from truekv.core.sampling import Draw, Reading
from truekv.kernels.table import fastest_sampling

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from truekv.core.options import SamplingParams
    from truekv.core.sampling import Sampling
    from truekv.engine.constrain import Constraint


ALL: Final = 1 << 62
"""More logits than any row has."""
NOTHING: Final = Reading(0)
MOST_READ: Final = 1024
"""Beyond so many a whole row is as good."""


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
    with others draws the same, and no generator state exists. A verify step takes token after token
    and stops at the first draft that differs, so nothing is ever taken back; what is drawn for the rows
    after it is forgotten. The order of the processors is vLLM's: grammar, min_tokens, logit_bias,
    penalties, temperature, min_p, top_k, top_p; the last four are the kernel's.
    """

    def __init__(
        self,
        params: SamplingParams,
        prompt: Sequence[int],
        vocab_size: int,
        ends: frozenset[int],
        constraint: Constraint | None = None,
        sampling: Sampling | None = None,
    ) -> None:
        """Fix the seed: the one asked for, or a fresh one where sampling needs it.

        `ends`: the ids that end an answer (none for ignore_eos). `sampling`: the kernels, else the fastest
        that are there. Refused: ids the vocabulary lacks.
        """
        self.sampling = fastest_sampling() if sampling is None else sampling
        self.params = params
        self.ends = ends | frozenset(params.stop_token_ids)
        """The ids that end this answer: those of the checkpoint and those asked for."""
        bias = params.logit_bias or {}
        _check("logit_bias", bias, vocab_size)
        _check("stop_token_ids", params.stop_token_ids, vocab_size)
        self.seed = params.seed if params.seed is not None or params.temperature == 0 else secrets.randbits(63)
        self._constraint = constraint
        self._vocab_size = vocab_size
        self._chosen = 0
        self._banned = torch.tensor(sorted(self.ends), dtype=torch.int64) if params.min_tokens else None
        self._biased = torch.tensor(list(bias), dtype=torch.int64) if bias else None
        self._bias = torch.tensor(list(bias.values()), dtype=torch.float32)
        punished = params.repetition_penalty != 1 or params.presence_penalty or params.frequency_penalty
        self._penalties = Penalties(params, prompt, vocab_size) if punished else None
        changed = constraint, self._penalties, self._biased, self._banned
        self.independent = all(one is None for one in changed)
        """Whether a row of logits is all that a token depends on, so that later rows can be drawn from at once."""
        self.greedy = self.independent and (params.temperature == 0 or params.top_k == 1)
        """Whether each token is the first of the largest logits of its row, whatever they are."""

    @property
    def finished(self) -> bool:
        """Whether the grammar admits nothing more but the end; `choose` must not be called then."""
        return self._constraint is not None and self._constraint.finished

    def allowed(self, drafts: list[int]) -> list[int]:
        """Return the longest beginning of the drafts that the grammar admits, without advancing it."""
        return drafts if self._constraint is None else drafts[: self._constraint.admits(drafts)]

    def reads(self, drafts: int = 0) -> Reading:
        """How much is looked at of the rows of the next token and of so many drafts after it.

        Where a token is that of the largest, or temperature alone draws it, the token will do. With top_k so many of
        the best and one more, which says that there are others: so the draw takes the way that it takes in the whole
        row, and adds up the same numbers in the same order. With top_p or min_p alone as many of the best as they
        hardly ever leave.
        """
        params = self.params
        if self.greedy:
            return NOTHING
        if not self.independent or params.top_k >= MOST_READ:
            return Reading(ALL)
        if params.top_k:
            return Reading(params.top_k + 1)
        if params.top_p == 1 and params.min_p == 0:
            return Reading(ALL, params.temperature, points=tuple(map(self._point, range(1 + drafts))))
        return Reading(MOST_READ, params.temperature, params.top_p, params.min_p)

    def ask(self, logits_V: torch.Tensor, ahead: int = 0) -> Draw:
        """Return the draw of the next token, or of the one that follows `ahead` others if it is `independent`.

        Logits are finite float32 [vocab] on the CPU and stay as they are; or as much of them as this `reads`. Raises
        ConstraintFailed where the grammar cannot go on.
        """
        params, point = self.params, self._point(ahead)
        if len(logits_V) < self._vocab_size and self.reads().filters:
            # Filtered already: see settle.py.
            return Draw(logits_V, params.temperature, 0, params.top_p if params.min_p else 1.0, 0.0, point)
        adjusted_V = self._adjust(logits_V)
        return Draw(adjusted_V, params.temperature, params.top_k, params.top_p, params.min_p, point)

    def take(self, token: int) -> int:
        """Remember a token that was drawn, and return it.

        Raises Corrupted for -1, which is what a row without a distribution gives, and ConstraintFailed where
        the grammar cannot go on.
        """
        if token < 0:
            raise Corrupted(
                f"the logits of token {self._chosen} of the answer have no largest number after bias and penalties; "
                "ask for smaller ones"
            )
        self._chosen += 1
        if self._penalties is not None:
            self._penalties.count(token)
        if self._constraint is not None:
            self._constraint.advance(token)
        return token

    def choose(self, logits_V: torch.Tensor) -> int:
        """Draw the next token of the answer from its row alone, and remember it."""
        (token,) = self.sampling.draw([self.ask(logits_V)])
        return self.take(token)

    def _point(self, ahead: int) -> float:
        return 0.0 if self.params.temperature == 0 else draw(self.seed or 0, self._chosen + ahead)

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


def logprobs(sampling: Sampling, logits_NV: torch.Tensor, tokens: Sequence[int], count: int) -> tuple[Logprob, ...]:
    """Return the log-probability of a token of each row, and of the row's `count` most likely ones."""
    if not tokens:
        return ()
    chosen_N, places_NK, found_NK = sampling.logprobs(logits_NV, tokens, count)
    own = cast("list[float]", chosen_N.tolist())
    places, found = cast("list[list[int]]", places_NK.tolist()), cast("list[list[float]]", found_NK.tolist())
    best = (tuple(zip(*pair, strict=True)) for pair in zip(places, found, strict=True))
    return tuple(Logprob(*item) for item in zip(tokens, own, best, strict=True))


def _check(name: str, tokens: Iterable[int], vocab_size: int) -> None:
    wrong = next((token for token in tokens if token >= vocab_size), None)
    if wrong is not None:
        raise Refused(f"{name} names token {wrong}, but the ids of this model go from 0 to {vocab_size - 1}")
