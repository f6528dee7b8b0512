"""The engine with several requests, each feature beside its absence, and llama.cpp: `python -m bench.serve_engine`.

Everything that is compared runs by turns in processes of its own, and the best round of each counts. Answers with
and without speculation must be the same tokens.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any, Final, TypeVar, cast

from bench.checkpoints import CONFIGS, checkpoint
from bench.convert import gguf
from bench.decode import FORMATS, NO_PEER, PEER_PYTHON, PEER_READY
from bench.machine import FOLDER, describe, positive
from bench.wire import ROOT, EngineFailed, Worker
from truekv.core.errors import Refused
from truekv.serve.progress import Bar

if TYPE_CHECKING:
    from collections.abc import Callable, Generator, Iterator, Sequence

E = TypeVar("E")
T = TypeVar("T")
SHAPES: Final = ("hybrid", "dense")
WORK: Final = ("throughput", "deep", "arrivals", "prefix", "speculation", "mtp", "memory")
CAPTURES: Final = ("auto", "on", "off")


@dataclass(frozen=True, slots=True)
class Size:
    """How much is measured."""

    models: tuple[str, ...] = SHAPES
    format: str = "int8"
    capture: str = "auto"
    work: tuple[str, ...] = WORK
    concurrent: tuple[int, ...] = (1, 4, 8, 16)
    prompt: int = 128
    """Tokens of each prompt of a batch."""
    answer: int = 64
    depth: int = 4096
    """Tokens that requests in the middle of an answer have behind them."""
    deep: int = 8
    """How many of those there are."""
    steps: int = 12
    """Tokens that each of them gets."""
    rounds: int = 3
    busy: int = 16
    """Requests in flight where the engine's own share of a step is measured, which is of twice as many."""
    shared: int = 4096
    """Tokens of a prompt that another request has had."""
    own: int = 32
    """Tokens after them that are new."""
    heard: int = 512
    """Tokens of a prompt before an answer with and without guesses."""
    spoken: int = 192
    """Tokens of an answer with and without guesses."""
    ngram: int = 7
    """Guesses by lookup."""
    mtp: int = 3
    embedded: str = "tiny-hybrid"


QUICK: Final = Size(prompt=32, answer=24, rounds=2)


@dataclass(frozen=True, slots=True)
class Bound:
    """What a number is held to."""

    limit: float
    least: bool = True
    of_ratio: bool = True
    """The ratio of both numbers is held to it, else truekv's own."""
    concurrent: int = 0
    """Where it holds; 0 everywhere."""


BOUNDS: Final = {
    "throughput": Bound(1.5, concurrent=8),
    "deep": Bound(1.5, concurrent=8),
    "overhead": Bound(0.03, least=False, of_ratio=False, concurrent=16),
    "prefix": Bound(20.0),
    "ngram": Bound(1.8),
    "rejected": Bound(0.95),
    "mtp": Bound(1.3),
    "memory": Bound(0.16e9, least=False, of_ratio=False),
    "log": Bound(float(1 << 20), least=False, of_ratio=False),
}


@dataclass(frozen=True, slots=True)
class Row:
    """One thing measured, and the same without it or by the peer."""

    what: str
    model: str
    concurrent: int
    unit: str
    truekv: float
    other: float | None
    """None where truekv's number stands alone."""
    against: str
    detail: dict[str, Any] = field(default_factory=dict[str, Any])

    @property
    def ratio(self) -> float | None:
        """How many times better truekv's number is: more tokens, less time."""
        if self.other is None:
            return None
        return self.other / self.truekv if self.unit == "s" else self.truekv / self.other

    @property
    def bound(self) -> Bound | None:
        """What it is held to."""
        bound = BOUNDS.get(self.what)
        return bound if bound and bound.concurrent in {0, self.concurrent} else None

    @property
    def met(self) -> bool | None:
        """Whether it is what it is held to; None where it is held to nothing."""
        bound = self.bound
        value = self.ratio if bound and bound.of_ratio else self.truekv
        if bound is None or value is None:
            return None
        return value >= bound.limit if bound.least else value <= bound.limit

    def as_json(self) -> dict[str, Any]:
        """Return everything, what follows from it included."""
        limit = self.bound.limit if self.bound else None
        return {**asdict(self), "ratio": self.ratio, "bound": limit, "met": self.met}


@dataclass(frozen=True, slots=True)
class Bench:
    """One run: what is asked, and the engines' versions as they become known."""

    size: Size
    threads: int
    peer: bool
    versions: dict[str, str]

    def rows(self) -> Iterator[Row]:
        """Measure everything that was asked for, and yield rows as they come."""
        if self.peer and {"throughput", "deep"}.intersection(self.size.work) and not PEER_READY.is_file():
            raise Refused(NO_PEER)
        for model in self.size.models:
            if {"throughput", "arrivals"}.intersection(self.size.work):
                yield from self._concurrent(model)
            if "deep" in self.size.work:
                yield self._deep(model)
            if "prefix" in self.size.work:
                yield from self._prefix(model)
            if "speculation" in self.size.work:
                yield from self._speculation(model)
        if "mtp" in self.size.work:
            yield from self._mtp()
        if "memory" in self.size.work:
            yield from planned()

    @contextmanager
    def _truekv(self, model: str, context: int, sequences: int = 1, **options: object) -> Generator[Worker]:
        path = str(checkpoint(model)) if model in CONFIGS else model
        chosen = {
            "kv_cache_dtype": self.size.format,
            "max_model_len": context,
            "max_num_seqs": sequences,
            "capture": self.size.capture,
            **options,
        }
        with Worker(
            sys.executable, "bench.engines.serving", path, threads=self.threads, options=json.dumps(chosen)
        ) as started:
            self.versions["truekv"] = started.version
            yield started

    @contextmanager
    def _llama(self, model: str, context: int, sequences: int) -> Generator[Worker]:
        kv = FORMATS[self.size.format]
        with Worker(
            str(PEER_PYTHON),
            "bench.engines.llama",
            str(gguf(model)),
            kv=kv,
            values=1,
            context=context,
            sequences=sequences,
            threads=self.threads,
        ) as started:
            self.versions["llama.cpp"] = started.version
            yield started

    def _concurrent(self, model: str) -> Iterator[Row]:
        size = self.size
        # Lengths of requests that come and go are up to half as long again.
        context, most = 2 * (size.prompt + size.answer), max(*size.concurrent, size.busy)
        with ExitStack() as stack:
            ours = stack.enter_context(self._truekv(model, context, most, enable_prefix_caching=False))
            if "throughput" in size.work:
                peers = [stack.enter_context(self._llama(model, context, most))] if self.peer else []
                yield from (self._together(model, count, [ours, *peers]) for count in size.concurrent)
            if "arrivals" in size.work:
                yield from self._arrivals(model, ours)

    def _together(self, model: str, concurrent: int, engines: Sequence[Worker]) -> Row:
        """Run requests that come together: all their tokens by the time for all of them."""
        size = self.size
        prompts, answers = concurrent * size.prompt, concurrent * size.answer
        times = by_turns(engines, lambda engine: engine.batch(concurrent, size.prompt, size.answer), size.rounds, sum)
        total = [(prompts + answers) / sum(time) for time in times]
        names = ("", "peer_")
        detail = {f"{name}prefill": prompts / time[0] for name, time in zip(names, times, strict=False)}
        # The first token of every answer comes with its prompt.
        detail |= {f"{name}decode": (answers - concurrent) / time[1] for name, time in zip(names, times, strict=False)}
        other = total[1] if len(total) > 1 else None
        return Row("throughput", model, concurrent, "tokens/s", total[0], other, "llama.cpp", detail)

    def _deep(self, model: str) -> Row:
        """Run requests in the middle of an answer."""
        size = self.size
        context = size.depth + size.steps + 2
        with ExitStack() as stack:
            # Room for one more, as requests are admitted when each of the others could grow by a page.
            engines = [stack.enter_context(self._truekv(model, context, size.deep + 1, enable_prefix_caching=False))]
            engines += [stack.enter_context(self._llama(model, context, size.deep))] if self.peer else []
            times = by_turns(engines, lambda one: one.deep(size.deep, size.depth, size.steps), size.rounds, float)
        ours, *others = (size.deep * size.steps / time for time in times)
        other = others[0] if others else None
        return Row("deep", model, size.deep, "tokens/s", ours, other, "llama.cpp", {"depth": size.depth})

    def _arrivals(self, model: str, engine: Worker) -> Iterator[Row]:
        """Run requests that come one after the other: tokens per second, and what is no part of the model's time."""
        size = self.size
        (spent,) = by_turns(
            [engine],
            lambda one: one.arrivals(2 * size.busy, size.busy, size.prompt, size.answer),
            size.rounds,
            lambda found: found["seconds"],
        )
        tokens, seconds, steps = (spent.pop(name) for name in ("tokens", "seconds", "steps"))
        shares = {name: time / steps for name, time in spent.items()}
        shares["loop"] = 1 - sum(shares.values())
        outside = sum(share for name, share in shares.items() if name not in {"model", "layout"})
        yield Row("arrivals", model, size.busy, "tokens/s", tokens / seconds, None, "")
        yield Row("overhead", model, size.busy, "of a step", outside, None, "", shares)

    def _prefix(self, model: str) -> Iterator[Row]:
        """Measure the time to the first token of a long prompt, first of its kind and then not."""
        size = self.size
        # Once without a hit is enough: a whole prompt takes long, and hits are far from their bound.
        with self._truekv(model, size.shared + size.own + 1, 2) as engine:
            cold, _none = engine.first_token(size.shared, size.own, 0)
            warm, cached = min(engine.first_token(size.shared, size.own, request) for request in range(1, 4))
        detail = {"cached_tokens": cached, "prompt_tokens": size.shared + size.own}
        yield Row("prefix", model, 1, "s", warm, cold, "no hit", detail)

    def _speculation(self, model: str) -> Iterator[Row]:
        """Measure prompt lookup where text repeats itself, and where it never does."""
        size = self.size
        speculation = {"method": "ngram", "num_speculative_tokens": size.ngram}
        context = size.heard + size.spoken
        with self._truekv(model, context, speculative_config=speculation) as engine:
            # How an engine's weights lie in memory is worth ten percent, so it is one that does both.
            yield self._guessed("ngram", model, "repeats", engine, engine, size.rounds)
            yield self._guessed("rejected", model, "drawn", engine, engine, size.rounds)

    def _mtp(self) -> Iterator[Row]:
        """Measure the prediction head of an embedded model, on what it was trained for."""
        size = self.size
        speculation = {"method": "mtp", "num_speculative_tokens": size.mtp}
        with (
            self._truekv(size.embedded, 2048, speculative_config=speculation) as guessing,
            self._truekv(size.embedded, 2048) as plain,
        ):
            # A round takes half a second, in which another job of the machine is a large part.
            yield self._guessed("mtp", size.embedded, "tasks", guessing, plain, 4 * size.rounds)

    def _guessed(self, what: str, model: str, text: str, guessing: Worker, plain: Worker, rounds: int) -> Row:
        size = self.size
        found, without = by_turns(
            [(guessing, True), (plain, False)],
            lambda turn: turn[0].answers(text, size.heard, size.spoken, guesses=turn[1]),
            rounds,
            lambda answer: answer["seconds"],
        )
        if found["tokens"] != without["tokens"]:
            raise Refused(f"{what} on {model}: tokens with guesses differ from those without; speed means nothing then")
        drafted, accepted = found["drafted"], found["accepted"]
        detail = {
            "drafted": sum(drafted),
            "accepted": sum(accepted),
            "acceptance": [
                round(good / made, 4) if made else 0.0 for made, good in zip(drafted, accepted, strict=True)
            ],
            "tokens": len(found["tokens"]),
        }
        ours, other = (len(one["tokens"]) / one["seconds"] for one in (found, without))
        return Row(what, model, 1, "tokens/s", ours, other, "no guesses", detail)


def by_turns(engines: Sequence[E], run: Callable[[E], T], rounds: int, seconds: Callable[[T], float]) -> list[T]:
    """Let engines take turns; the best round of each: other jobs on the machine only ever slow one down."""
    turns = [[run(engine) for engine in engines] for _ in range(rounds)]
    return [min(found, key=seconds) for found in zip(*turns, strict=True)]


def planned() -> Iterator[Row]:
    """Say what released models hold, from their plans: no weight is needed."""
    from truekv.core.config import Config
    from truekv.formats.choice import choose_formats
    from truekv.memory.plan import plan
    from truekv.models.weights import understand

    def of(name: str, drafts: int) -> Any:  # noqa: ANN401
        config = json.loads((ROOT / "tests" / "configs" / f"{name}.json").read_text())
        spec = understand(Config(config)).spec
        formats = choose_formats(spec, "auto", "", "bfloat16")
        return plan(spec, formats, max_model_len=4096, drafts=drafts, dtype="bfloat16")

    yield Row("memory", "Qwen3.6-27B", 1, "bytes", of("qwen3.6-27b", 0).bytes_for_prompt(10), None, "")
    drafts = 3
    logged = sum(layer.log_bytes for layer in of("qwen3-next-80b-a3b", drafts).layers)
    yield Row("log", "Qwen3-Next-80B", 1, "bytes", logged / drafts, None, "")


def line(row: Row) -> str:
    """One row as a line of the terminal's table."""
    other = "" if row.other is None else f"{row.other:.4g} {row.against}, {row.ratio:.2f}x"
    verdict = {None: "", True: "met", False: "MISSED"}[row.met]
    detail = ", ".join(f"{name} {_shown(value)}" for name, value in row.detail.items())
    measured = f"{row.what:10s} {row.model:14s} x{row.concurrent:<3d} {row.truekv:10.4g} {row.unit:9s}"
    return f"{measured} {other:28s} {verdict:6s} {detail}"


def _shown(value: Any) -> str:  # noqa: ANN401 (JSON)
    if isinstance(value, list):
        return "/".join(_shown(one) for one in cast("list[Any]", value))
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def main(arguments: list[str] | None = None) -> int:
    """Measure, print a table or the JSON object, and keep everything for bench.report."""
    parser = argparse.ArgumentParser(prog="python -m bench.serve_engine", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="shorter texts and fewer rounds: some 6 minutes")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    parser.add_argument("--no-peer", action="store_true", help="truekv alone")
    parser.add_argument("--models", nargs="+", choices=SHAPES, metavar="MODEL")
    parser.add_argument("--work", nargs="+", choices=WORK, metavar="WORK", help=f"some of {', '.join(WORK)}")
    parser.add_argument("--concurrent", nargs="+", type=positive, metavar="REQUESTS")
    parser.add_argument("--format", choices=tuple(FORMATS))
    parser.add_argument("--capture", choices=CAPTURES)
    parser.add_argument("--threads", type=positive, default=2)
    asked = parser.parse_args(arguments)
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # before a library with OpenMP is loaded
    versions: dict[str, str] = {}
    rows: list[Row] = []
    try:
        with Bar("measuring"):
            for row in Bench(_size(asked), asked.threads, not asked.no_peer, versions).rows():
                rows.append(row)
                if not asked.json:
                    print(line(row), flush=True)
    except (Refused, EngineFailed) as error:
        print(error, file=sys.stderr)
        return 2
    command = " ".join(["python -m bench.serve_engine", *(arguments if arguments is not None else sys.argv[1:])])
    saved = {"machine": describe(asked.threads), "versions": versions, "command": command}
    found = {**saved, "rows": [row.as_json() for row in rows]}
    FOLDER.mkdir(parents=True, exist_ok=True)
    (FOLDER / "serve_engine.json").write_text(json.dumps(found, indent=1))
    if asked.json:
        print(json.dumps(found))
    return 0


def _size(asked: argparse.Namespace) -> Size:
    size = QUICK if asked.quick else Size()
    given = {name: getattr(asked, name) for name in ("models", "work", "concurrent", "format", "capture")}
    changes: dict[str, Any] = {
        name: tuple(cast("list[Any]", value)) if isinstance(value, list) else value
        for name, value in given.items()
        if value
    }
    return replace(size, **changes)


if __name__ == "__main__":
    sys.exit(main())
