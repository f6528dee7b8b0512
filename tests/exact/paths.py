"""Every way through the engine, and what watches it: each logit, stored byte and state against the oracle."""

from __future__ import annotations

import dataclasses
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

import torch
from exact.oracle import states, stored_rows

from truekv import SamplingParams
from truekv.core.options import Speculation
from truekv.engine.events import Sampled

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from exact.oracle import Oracle, Seen

    from truekv import LLM
    from truekv.core.batch import Chunk
    from truekv.core.batch import Sequence as Held
    from truekv.core.sampling import Reading
    from truekv.engine.generate import Engine
    from truekv.engine.request import Request
    from truekv.engine.run import Ran
    from truekv.engine.speculate.drafting import Verified

Wave = list[tuple[list[int], SamplingParams]]
CONTEXT: Final = 128
DRAFTS: Final = 3
ANSWER: Final = 8
PATHS: Final[dict[str, frozenset[str]]] = {
    "plain": frozenset(),
    "chunked": frozenset({"chunked"}),
    "batched": frozenset({"batched"}),
    "preempted": frozenset({"batched", "preempted"}),
    "drafted": frozenset({"drafted"}),
    "prefix": frozenset({"prefix"}),
    "ngram": frozenset({"ngram"}),
    "mtp": frozenset({"mtp"}),
    "captured": frozenset({"captured"}),
    "all, ngram": frozenset({"chunked", "batched", "robbed", "prefix", "ngram", "captured"}),
    "all, mtp": frozenset({"chunked", "batched", "robbed", "prefix", "mtp", "captured"}),
}


def repeated(*tokens: int, count: int) -> list[int]:
    return (list(tokens) * count)[:count]


def drawn(count: int, seed: int) -> list[int]:
    return torch.randint(64, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


GREEDY: Final = SamplingParams(max_tokens=ANSWER, ignore_eos=True)
DRAWN: Final = SamplingParams(max_tokens=ANSWER, ignore_eos=True, temperature=0.4, top_p=0.95, seed=11)
PUNISHED: Final = dataclasses.replace(DRAWN, temperature=0.9, repetition_penalty=1.1, frequency_penalty=0.2, seed=12)
# Three of them grow by a page while they answer.
PROMPTS: Final = (
    (drawn(60, 1), PUNISHED),
    (repeated(5, 9, 2, count=61), DRAWN),
    (drawn(33, 2) + repeated(7, 8, count=30), GREEDY),
    (drawn(3, 3), GREEDY),
)


def options(path: frozenset[str]) -> dict[str, Any]:
    """The options of LLM that make the engine take a path."""
    found: dict[str, Any] = {
        "max_model_len": CONTEXT,
        "max_num_seqs": 4 if "batched" in path else 1,
        "max_num_batched_tokens": 256 if "chunked" not in path else 64 if "batched" in path else 11,
        "enable_prefix_caching": "prefix" in path,
        "prefix_checkpoint_interval": 32,
        "capture": "on" if "captured" in path else "off",
        "debug_poison": True,
    }
    if path & {"drafted", "ngram", "mtp"}:
        method = "mtp" if "mtp" in path else "ngram"
        found["speculative_config"] = Speculation(method=method, num_speculative_tokens=DRAFTS, adaptive=False)
    return found


class Scripted:
    """Drafts that are right for as many tokens as told, and wrong after that."""

    room = 0

    def __init__(self, oracle: Oracle, right: Callable[[Request], int], count: int = DRAFTS) -> None:
        self.oracle = oracle
        self.right = right
        self.count = count

    def follow(self, verified: Sequence[Verified], _: torch.Tensor) -> None:
        for item in verified:
            request = item.share.request
            if item.share.samples and not item.ended:
                answer = self.oracle.answer(request.prompt, request.params)[len(request.generated) :]
                known = (answer + [0] * self.count)[: self.count]
                right = self.right(request)
                best = int(self.oracle.look(request.tokens + known[:right]).logits[-1].argmax())
                # The likeliest token, where that is not what is drawn, would tempt a sampler most.
                wrong = [best if best != token else (token + 1) % 64 for token in known[right:]]
                request.guess = known[:right] + wrong

    def forget(self, request: Request) -> None:
        request.guess = []


@dataclass
class Watch:
    """Looks over an engine's shoulder: compares whatever becomes real, and counts what happened."""

    engine: Engine
    oracle: Oracle
    counts: Counter[str] = field(default_factory=Counter[str])
    told: dict[int, list[int]] = field(default_factory=dict[int, list[int]])
    """The tokens that events told of each request."""
    _pending: dict[int, tuple[Request, Chunk, torch.Tensor]] = field(default_factory=dict[int, Any])

    def __post_init__(self) -> None:
        runner, arena = self.engine.runner, self.engine.runner.arena
        self._idle = arena.free_slots, arena.held_pages, arena.available_pages
        self._run, self._advance, self._close = runner.run, arena.advance, arena.close
        runner.run, arena.advance, arena.close = self.run, self.advance, self.close

    def run(self, chunks: Sequence[Chunk], wanted: Sequence[int], read: Sequence[Reading]) -> Ran:
        ran = self._run(chunks, wanted, read)
        with torch.inference_mode():
            logits_TV = self.engine.runner.model.logits(ran.hidden).float()
        owners = {id(request.held): request for request in self.engine.schedule.running}
        start = 0
        for chunk, count, asked, got, places in zip(chunks, wanted, read, ran.rows, ran.likeliest, strict=True):
            rows = logits_TV[start : start + len(chunk.tokens)]
            start += len(chunk.tokens)
            assert isinstance(got, torch.Tensor), got
            last = rows[len(rows) - count :]
            assert same(got, last if asked.most else last[:0]), "the engine's logits are not those of its residuals"
            assert places == last.argmax(-1).tolist(), "the likeliest tokens are not those of the engine's residuals"
            self._pending[id(chunk.sequence)] = owners[id(chunk.sequence)], chunk, rows
        self.counts["steps"] += 1
        self.counts["companions"] += len(chunks) > 1
        return ran

    def close(self, sequence: Held, *, suspect: bool = False) -> None:
        self._pending.pop(id(sequence), None)
        self._close(sequence, suspect=suspect)

    def advance(self, sequence: Held, count: int) -> None:
        request, chunk, rows = self._pending.pop(id(sequence))
        start = sequence.position
        self._advance(sequence, count)
        certain = len(chunk.tokens) - chunk.drafts
        self.counts["accepted"] += count - certain
        self.counts["rejected"] += len(chunk.tokens) - count
        self.counts["unfinished"] += sequence.position < len(request.prompt)
        assert request.tokens[:start] + chunk.tokens[:count] == request.tokens[: sequence.position]
        self._compare(request, sequence, start, rows[:count])

    def serve(
        self, wave: Wave, *, together: bool, before: Callable[[Sequence[Request]], None] = lambda _: None
    ) -> list[Request]:
        """Run requests one by one, or together, of which the last comes when the others are under way."""
        engine = self.engine
        requests: list[Request] = []
        left = list(wave)
        started = self.counts["steps"]
        while left or engine._answers:
            if left and (len(left) > 1 or self.counts["steps"] > started + 2 if together else not engine._answers):
                prompt, params = left.pop(0)
                requests.append(engine.add(prompt, params))
                continue
            before(requests)
            self.step()
            assert self.counts["steps"] < started + 400, "the engine runs on and on"
        return requests

    def step(self) -> None:
        """Run one step; note what it told, and that every page is accounted for."""
        for event in self.engine.step():
            if isinstance(event, Sampled):
                self.told.setdefault(event.request, []).append(event.token)
        self.engine.runner.arena.check()

    def settle(self, requests: Sequence[Request], wave: Wave, *, idle: bool = True) -> None:
        """Assert that all have ended with the right answers and, where nobody is left, given everything back."""
        for request, (prompt, params) in zip(requests, wave, strict=True):
            answer = self.oracle.answer(prompt, params)
            assert request.generated == answer, f"request {request.identity}: other tokens"
            assert self.told[request.identity] == answer, f"request {request.identity}: tokens told twice or never"
            self.counts["cached"] += request.cached or 0
        if idle:
            self.rest()

    def rest(self) -> None:
        """Assert that everything came back."""
        arena = self.engine.runner.arena
        arena.check()
        assert (arena.free_slots, arena.held_pages, arena.available_pages) == self._idle, "not everything came back"
        assert not self._pending

    def rob(self, *, began: bool = True) -> None:
        """Take the memory of whoever came last (and has begun to answer), as the schedule does when pages run out."""
        running = [request for request in self.engine.schedule.running if request.generated or not began]
        if len(running) > began and self.counts["robbed"] < 6:
            self.engine._memory.release(running[-1])
            self.engine.schedule.again(running[-1])
            self.counts["robbed"] += 1

    def _compare(self, request: Request, sequence: Held, start: int, rows: torch.Tensor) -> None:
        tokens = request.tokens[: sequence.position]
        expected: Seen = self.oracle.look(tokens)
        where = f"request {request.identity}, positions {start} to {sequence.position - 1}"
        arena = self.engine.runner.arena
        assert same(rows, expected.logits[start:]), f"{where}: other logits"
        for got, wanted in zip(stored_rows(arena, sequence), expected.rows, strict=True):
            assert torch.equal(got, wanted), f"{where}: other rows stored"
        # Accepted drafts are folded in by the next step.
        folded = self.oracle.look(tokens[: sequence.position - sequence.replay])
        for got, wanted in zip(states(arena, sequence), folded.states, strict=True):
            assert same(got, wanted), f"{where}: other state"


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Whether all numbers are the same bits; NaN is never right."""
    return torch.equal(got.cpu(), wanted.cpu())


def play(llm: LLM, oracle: Oracle, path: frozenset[str]) -> Counter[str]:
    """Serve all prompts along a path with everything compared; return how often what happened."""
    engine = llm._engine
    watch = Watch(engine, oracle)
    if "drafted" in path:
        engine.drafting = Scripted(oracle, lambda request: (request.identity + len(request.generated)) % (DRAFTS + 1))

    def rob(_: Sequence[Request]) -> None:
        if "robbed" in path and watch.counts["steps"] % 4 == 3:
            watch.rob()

    for wave in waves(oracle, path):
        requests = watch.serve(wave, together="batched" in path, before=rob)
        watch.settle(requests, wave)
    watch.counts["preempted"] = engine.schedule.preemptions
    if "captured" in path:
        watch.counts["replayed"] = engine.runner.forward.replays
    return watch.counts


def waves(oracle: Oracle, path: frozenset[str]) -> list[Wave]:
    """Prompts, and after their end the second turns of the same conversations where a cache may know the first."""
    first = [(list(prompt), params) for prompt, params in PROMPTS]
    if "ngram" in path:
        # It has said this before.
        start, params = first[-1]
        first[-1] = start + 2 * (oracle.answer(start, params) + start), params
    if "prefix" not in path:
        return [first]
    second = [([*prompt, *oracle.answer(prompt, params), *drawn(4, 9)], params) for prompt, params in first]
    return [first, second]


TAKEN: Final[dict[str, Callable[[Counter[str]], bool]]] = {
    "chunked": lambda counts: counts["unfinished"] > 1,
    "batched": lambda counts: counts["companions"] > 3,
    "preempted": lambda counts: counts["preempted"] > 0,
    "robbed": lambda counts: counts["robbed"] > 0,
    "drafted": lambda counts: counts["accepted"] > 5 and counts["rejected"] > 5,
    "ngram": lambda counts: counts["accepted"] > 0 and counts["rejected"] > 0,
    "mtp": lambda counts: counts["accepted"] > 0 and counts["rejected"] > 0,
    "prefix": lambda counts: counts["cached"] > 0,
    "captured": lambda counts: counts["replayed"] > 3,
}
"""Whether a path was taken, and not only asked for."""
