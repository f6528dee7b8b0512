"""Grammars: which tokens may come next, so that an answer is what its schema, expression or list says."""

from __future__ import annotations

import functools
import json
import math
import re
from collections import OrderedDict
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final, TypeVar

from truekv.core.errors import ConstraintFailed, Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Callable

    from llguidance import LLMatcher, LLTokenizer

    from truekv.core.options import StructuredOutputs
    from truekv.engine.tokens import Tokenizer

T = TypeVar("T")
LONGEST_GRAMMAR: Final = 1 << 18
"""Bytes of a schema, an expression, a grammar or a list of choices."""
MOST_REMAINDERS: Final = 100_000
"""States that the multipleOf of a schema may need: its automaton counts remainders, about 70,000 in a second."""
# Work of a compilation and of a first step, in llguidance's units: some tenths of a second, then an error.
# What a later step may cost (some ten milliseconds) is left to the library's own limits.
_FUEL: Final = 400_000
# States of a grammar's automaton, which requests share as it grows: the library's own bound.
_STATES: Final = 250_000
_KEPT: Final = 16
"""Grammars that stay compiled; of more, those that were asked for last."""
_MOST_COPIES: Final = 256
"""Requests that share an automaton before it is built anew: it only ever grows."""
# Room for indentation; without a bound, a model may write white space until its tokens are spent.
_WHITE_SPACE: Final = r"[\x20\x0A\x0D\x09]{1,64}"
_MULTIPLE: Final = re.compile(r'"multipleOf"\s*:\s*(\d+(?:\.\d+)?(?:[eE][-+]?\d{1,4})?)')


@dataclass(slots=True)
class _Compiled:
    """A matcher that has taken no token, to be copied for each request."""

    matcher: LLMatcher
    copies: int = 0


class Grammars:
    """Compiles constraints for one engine; the tokenizer is prepared when the first one is asked for.

    Copies of a matcher have places of their own, but one automaton, which each of them makes larger. So a copy that
    meets its bound goes on with a matcher of its own: no request fails for what others asked.
    """

    def __init__(self, tokenizer: Tokenizer | None, vocab_size: int, ends: frozenset[int]) -> None:
        """`vocab_size`: the model's, which may exceed the tokenizer's; `ends`: the ids that end an answer."""
        self._tokenizer = tokenizer
        self._vocab_size = vocab_size
        self._ends = sorted(token for token in ends if token < vocab_size)
        self._library: LLTokenizer | None = None
        self._kept: OrderedDict[tuple[str, str], _Compiled] = OrderedDict()
        self.compiled = 0
        """How many were compiled so far."""

    def compile(self, wanted: StructuredOutputs) -> Constraint:
        """Return the constraint of one request; Refused where it is invalid, too large or matches no text."""
        library = self._prepare()
        asked = _grammar(wanted)
        found = self._kept.get(asked)
        if found is None or found.copies == _MOST_COPIES:
            found = self._kept[asked] = _Compiled(self._matcher(*asked))
        self._kept.move_to_end(asked)
        if len(self._kept) > _KEPT:
            self._kept.popitem(last=False)
        found.copies += 1
        hidden = [] if self._ends else library.eos_tokens
        return Constraint(found.matcher.deep_copy(), hidden, functools.partial(self._alone, asked))

    def _alone(self, asked: tuple[str, str]) -> LLMatcher:
        """Compile a grammar for one request whose shared automaton has become too large, and forget that."""
        self._kept.pop(asked, None)
        return self._matcher(*asked)

    def _matcher(self, kind: str, grammar: str) -> LLMatcher:
        from llguidance import LLMatcher, LLParserLimits

        library = self._prepare()
        self.compiled += 1
        limits = LLParserLimits(initial_lexer_fuel=_FUEL, max_lexer_states=_STATES, verbose_errors=False)
        matcher = LLMatcher(library, grammar, log_level=0, limits=limits)
        if matcher.is_error():
            raise Refused(f"structured_outputs: the {kind} cannot be compiled: {_reason(matcher)}")
        # The first step is tried here: a grammar without any text, or beyond the limits, is no request at all.
        first = matcher.compute_bitmask()
        if matcher.is_error() and "NoExtension" not in matcher.get_error():
            raise Refused(f"structured_outputs: the {kind} cannot be compiled: {_reason(matcher)}")
        ends = sum(first[token // 8] >> token % 8 & 1 for token in library.eos_tokens)
        if matcher.is_stopped() or int.from_bytes(first).bit_count() == ends:
            raise Refused(f"structured_outputs: the {kind} matches no text, so no answer could follow it")
        return matcher

    def _prepare(self) -> LLTokenizer:
        """Build the library's view of the vocabulary once: a second for 150,000 tokens."""
        if self._tokenizer is None:
            raise Refused("structured_outputs need a tokenizer, and this checkpoint has no tokenizer.json")
        if self._library is None:
            from llguidance import LLTokenizer

            size = max(self._vocab_size, self._tokenizer.size)
            try:
                self._library = LLTokenizer(self._tokenizer.to_json(), n_vocab=size, eos_token=self._ends or None)
            except ValueError as error:
                raise Refused(
                    f"structured_outputs cannot be used with this checkpoint's tokenizer: {_one_line(str(error))}"
                ) from error
        return self._library


class Constraint:
    """Where one answer stands in its grammar. A constrained answer ends where the grammar does."""

    def __init__(self, matcher: LLMatcher, hidden: list[int], alone: Callable[[], LLMatcher]) -> None:
        """`hidden`: ids that are never admitted (the library's end token, where the checkpoint has none).

        `alone` makes a matcher that shares nothing with others.
        """
        self._matcher = matcher
        self._hidden = hidden
        self._alone: Callable[[], LLMatcher] | None = alone
        self._taken: list[int] = []

    @property
    def finished(self) -> bool:
        """Whether nothing may follow but the end."""
        return self._matcher.is_stopped()

    def admits(self, tokens: list[int]) -> int:
        """Return how many of these tokens may follow, one after the other; the place in the grammar stays."""
        return self._ask(lambda matcher: matcher.validate_tokens(tokens))

    def mask(self, logits_V: torch.Tensor) -> torch.Tensor:
        """Return logits with -inf for what may not come next; ConstraintFailed where nothing may."""
        import numpy as np

        bits = np.frombuffer(self._ask(lambda matcher: matcher.compute_bitmask()), dtype=np.uint8)
        if self._matcher.is_error():
            raise _failed(self._matcher)
        # The count cuts or fills with zeros: ids beyond the tokenizer's are never admitted.
        allowed_V = torch.from_numpy(np.unpackbits(bits, count=len(logits_V), bitorder="little")).view(torch.bool)
        allowed_V[self._hidden] = False
        if not bool(allowed_V.any()):
            raise ConstraintFailed("structured_outputs: no token of this model may follow in the grammar")
        return torch.where(allowed_V, logits_V, -math.inf)

    def advance(self, token: int) -> None:
        """Take a token of the answer."""
        if not self._ask(lambda matcher: matcher.consume_token(token)):
            raise _failed(self._matcher)
        self._taken.append(token)

    def _ask(self, question: Callable[[LLMatcher], T]) -> T:
        """Ask the matcher, and once more one that others have not made larger if this one fails."""
        answer = question(self._matcher)
        if self._alone is not None and self._matcher.is_error():
            fresh, self._alone = self._alone(), None
            if fresh.consume_tokens(self._taken):
                self._matcher = fresh
                return question(fresh)
        return answer


def _grammar(wanted: StructuredOutputs) -> tuple[str, str]:
    """Return what was asked for, by name, and its grammar as llguidance reads it."""
    from llguidance import LLMatcher

    if wanted.json is not None:
        text = _bounded("json schema", _schema(wanted.json))
        try:
            grammar = LLMatcher.grammar_from_json_schema(text, defaults={"whitespace_pattern": _WHITE_SPACE})
        except ValueError as error:
            raise Refused(f"structured_outputs: the json schema cannot be compiled: {_one_line(str(error))}") from error
        return "json schema", grammar
    if wanted.grammar is not None:
        return "grammar", LLMatcher.grammar_from_lark(_bounded("grammar", wanted.grammar))
    if wanted.choice is not None:
        # One expression instead of one lexeme for each: thousands of choices stay cheap.
        text = _bounded("choice", "|".join(map(re.escape, wanted.choice)))
        return "choice", LLMatcher.grammar_from_regex(text)
    assert wanted.regex is not None
    return "regex", LLMatcher.grammar_from_regex(_bounded("regex", wanted.regex))


def _schema(schema: Any) -> str:  # noqa: ANN401 (any JSON)
    """Return a schema as canonical JSON text."""
    try:
        value = json.loads(schema) if isinstance(schema, str) else schema
        text = json.dumps(value)
    except (ValueError, TypeError, RecursionError) as error:
        raise Refused(f"structured_outputs: the json schema is not valid JSON: {_one_line(str(error))}") from error
    if not isinstance(value, dict):
        raise Refused(f"structured_outputs: the json schema is {_one_line(text)}, but must be a JSON object")
    return text


def _bounded(kind: str, text: str) -> str:
    """Refuse what llguidance's own limits let grow: long texts, and multipleOf with many remainders."""
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise Refused(f"structured_outputs: the {kind} is not valid Unicode: {error.reason}") from error
    if size > LONGEST_GRAMMAR:
        raise Refused(f"structured_outputs: the {kind} has {size} bytes, but at most {LONGEST_GRAMMAR} are compiled")
    if _remainders(text) > MOST_REMAINDERS:
        raise Refused(
            f"structured_outputs: the multipleOf of the {kind} need more than {MOST_REMAINDERS} states, which take "
            "too long to build; use smaller or fewer ones"
        )
    return text


def _remainders(text: str) -> float:
    """Return how many states the multipleOf in a text may need, all together."""
    unescaped = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), text)
    steps = [step for number in _MULTIPLE.findall(unescaped) if (step := Decimal(number))]
    if not all(Decimal("1e-9") <= step <= MOST_REMAINDERS for step in steps):
        return math.inf
    # Those that meet in one number count to their common multiple, at the finest of their decimal places.
    places = max((-int(step.normalize().as_tuple().exponent) for step in steps), default=0)
    return len(steps) * math.lcm(*(int(step.scaleb(places)) for step in steps))


def _failed(matcher: LLMatcher) -> ConstraintFailed:
    return ConstraintFailed(f"structured_outputs: the answer cannot be continued in the grammar: {_reason(matcher)}")


def _reason(matcher: LLMatcher) -> str:
    return _one_line(matcher.get_error().replace("<non-verbose/>", ""))


def _one_line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else text[:200] + " ..."
