"""Seeded generators of conversations with a known right answer, and their grader.

The models of this package were trained on the ``train`` split; the ``heldout`` split is decided by a hash of what must
be computed or remembered (operands, owner and value, secret, city and wording), so no held-out answer was ever trained.
"""

import hashlib
import itertools
import json
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal, TypeAlias, TypeVar

from truekv.tiny import words

Message: TypeAlias = dict[str, Any]
Split: TypeAlias = Literal["train", "heldout"]
Tool: TypeAlias = dict[str, Any]
T = TypeVar("T")

HELDOUT_SHARE: Final = 8  # one content in eight is held out
ATTRIBUTES: Final = ("colour", "number", "city", "pet")
MAX_FILLER_TOKENS: Final = 2000
ACKNOWLEDGEMENT: Final = "I will remember that."

WEATHER_TOOL: Final[Tool] = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string"},
                "unit": {"type": "string", "enum": list(words.UNITS)},
            },
            "required": ["city", "unit"],
        },
    },
}


@dataclass(frozen=True, slots=True)
class Turn:
    """One user message and the assistant's answer to it; ``task`` is empty where the answer is not graded."""

    user: str
    answer: str
    task: str = ""


@dataclass(frozen=True, slots=True)
class Example:
    """A conversation ending with a question, and the answer to it."""

    messages: list[Message]
    answer: str
    task: str
    tools: list[Tool] | None = None


@dataclass(frozen=True, slots=True)
class Scenario:
    """A conversation to be played turn by turn: the history holds the model's own answers."""

    system: str
    turns: tuple[Turn, ...]

    @property
    def questions(self) -> tuple[Turn, ...]:
        """The graded turns."""
        return tuple(turn for turn in self.turns if turn.task)


@dataclass(frozen=True, slots=True)
class Fact:
    """Something told once and asked later. Without an owner it is the user's own."""

    attribute: str
    value: str
    owner: str = ""

    def statement(self) -> str:
        """Tell the fact."""
        if self.attribute == "secret" and not self.owner:
            return f"The secret is {self.value}."
        return f"The {self.attribute} of {self.owner} is {self.value}." if self.owner else self._own("My")

    def question(self) -> str:
        """Ask for the value."""
        if self.attribute == "secret" and not self.owner:
            return "What is the secret?"
        return f"What is the {self.attribute} of {self.owner}?" if self.owner else f"What is my {self.attribute}?"

    def answer(self) -> str:
        """Answer the question."""
        return self.statement() if self.owner or self.attribute == "secret" else self._own("Your")

    def content(self) -> str:
        """Return what decides the split."""
        return f"{self.owner}|{self.attribute}|{self.value}"

    def _own(self, determiner: str) -> str:
        return f"{determiner} {self.attribute} is {self.value}."


def split_of(content: str) -> Split:
    """Return the split that a content belongs to, by a hash of it."""
    digest = hashlib.blake2b(content.encode(), digest_size=4).digest()
    return "heldout" if int.from_bytes(digest) % HELDOUT_SHARE == 0 else "train"


def draw(generate: Callable[[], T], content: Callable[[T], str], split: Split) -> T:
    """Draw until the content falls into the split."""
    while split_of(content(candidate := generate())) != split:
        pass
    return candidate


def arithmetic_turn(rng: random.Random, split: Split) -> Turn:
    """Two or three operations on one-digit numbers, answered step by step."""
    question, steps = draw(lambda: _expression(rng), lambda drawn: drawn[0], split)
    return Turn(f"What is {question}?", f"{question} = {steps}", "arithmetic")


def _expression(rng: random.Random) -> tuple[str, str]:
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    match rng.randrange(4):
        case 0:
            return f"{a} * {b} + {c}", f"{a * b} + {c} = {a * b + c}"
        case 1:
            c = min(c, a + b)
            return f"{a} + {b} - {c}", f"{a + b} - {c} = {a + b - c}"
        case _:
            return f"{a} * {b} + {c} * {d}", f"{a * b} + {c * d} = {a * b + c * d}"


def random_facts(rng: random.Random, split: Split, count: int) -> list[Fact]:
    """Draw facts about the user (any number of them) and about other people (one of each)."""
    facts: dict[str, Fact] = {}
    while len(facts) < count:
        owner = rng.choice(words.NAMES) if rng.randrange(3) else ""
        drawn = draw(lambda owner=owner: _fact(rng, owner), Fact.content, split)
        facts.setdefault(drawn.owner or drawn.attribute, drawn)
    return list(facts.values())


def random_secret(rng: random.Random, split: Split, owner: str = "") -> Fact:
    """Draw an adjective, an animal and a number."""

    def value() -> str:
        return f"{rng.choice(words.ADJECTIVES)} {rng.choice(words.ANIMALS)} {rng.randint(10, 99)}"

    return Fact("secret", draw(value, str, split), owner)


def _fact(rng: random.Random, owner: str) -> Fact:
    attribute = rng.choice(ATTRIBUTES if owner else ("name", *ATTRIBUTES))
    return Fact(attribute, str(rng.choice(_VALUES[attribute])), owner)


_VALUES: Final[dict[str, Sequence[str | int]]] = {
    "name": words.NAMES,
    "colour": words.COLOURS,
    "number": range(10, 100),
    "city": words.CITIES,
    "pet": words.ANIMALS,
}


def telling_turn(facts: list[Fact]) -> Turn:
    """Tell facts in one user message."""
    return Turn(" ".join(fact.statement() for fact in facts), ACKNOWLEDGEMENT)


def asking_turn(fact: Fact) -> Turn:
    """Ask for a fact told earlier."""
    return Turn(fact.question(), fact.answer(), "secret" if fact.attribute == "secret" else "fact")


def small_talk_turn(rng: random.Random) -> Turn:
    """Draw a turn that needs no memory."""
    return Turn(*rng.choice(words.SMALL_TALK))


def filler(rng: random.Random, tokens: int) -> list[str]:
    """Draw sentences of at most ``tokens`` tokens together: a token per word and per full stop."""
    sentences: list[str] = []
    while True:
        template = rng.choice(words.FILLER_TEMPLATES)
        sentence = re.sub(r"\{(\w+)\}", lambda match: rng.choice(words.FILLER_WORDS[match[1]]), template)
        tokens -= len(sentence.split()) + 1
        if tokens < 0:
            return sentences
        sentences.append(sentence[0].upper() + sentence[1:])


def hiding_turn(rng: random.Random, facts: list[Fact], tokens: int, depth: float | None = None) -> Turn:
    """Hide statements in filler, at a relative depth or at random places."""
    sentences = filler(rng, tokens)
    length = len(sentences)
    places = sorted(((rng.random() if depth is None else depth, fact.statement()) for fact in facts), reverse=True)
    for place, statement in places:
        sentences.insert(round(place * length), statement)
    return Turn(" ".join(sentences), ACKNOWLEDGEMENT)


def weather_call(city: str, unit: str) -> str:
    """Render the call of the weather tool as the assistant writes it."""
    return (
        f"<tool_call>\n<function=get_weather>\n<parameter=city>\n{city}\n</parameter>\n"
        f"<parameter=unit>\n{unit}\n</parameter>\n</function>\n</tool_call>"
    )


def weather_tool_json() -> str:
    """Render the tool's declaration as the chat template does."""
    return json.dumps(WEATHER_TOOL)


def weather_messages(rng: random.Random, split: Split) -> list[Message]:
    """Draw a request, the call, the tool's response and the answer: four messages.

    The unit is no part of what is held out: a city that met one of the two units only would teach that it always does.
    """

    def request() -> tuple[str, str]:
        return rng.choice(words.CITIES), rng.choice(words.WEATHER_REQUESTS)

    city, wording = draw(request, "|".join, split)
    unit, condition, degrees = rng.choice(words.UNITS), rng.choice(words.CONDITIONS), rng.randint(10, 99)
    function = {"name": WEATHER_TOOL["function"]["name"], "arguments": {"city": city, "unit": unit}}
    return [
        {"role": "user", "content": wording.format(city=city, unit=unit)},
        {"role": "assistant", "content": "", "tool_calls": [{"type": "function", "function": function}]},
        {"role": "tool", "content": f"It is {condition} and {degrees} degrees."},
        {"role": "assistant", "content": f"It is {condition} and {degrees} degrees {unit} in {city}."},
    ]


def arithmetic(rng: random.Random, split: Split) -> Example:
    """Ask for a short sum."""
    return _ending_with(rng, [], arithmetic_turn(rng, split))


def fact(rng: random.Random, split: Split) -> Example:
    """Tell facts in early turns, talk of other things, ask for one of them: at most six turns."""
    facts = random_facts(rng, split, rng.randint(1, 4))
    told = rng.randint(1, len(facts))
    turns = [telling_turn(part) for part in (facts[:told], facts[told:]) if part]
    for _ in range(rng.randint(0, 3)):
        turn = rng.choice((arithmetic_turn(rng, split), small_talk_turn(rng)))
        turns.insert(rng.randint(0, len(turns)), turn)
    return _ending_with(rng, turns, asking_turn(rng.choice(facts)))


def secret(rng: random.Random, split: Split, tokens: int | None = None, depth: float | None = None) -> Example:
    """Hide a secret in ``tokens`` tokens of filler (up to 2,000 if absent) and ask for it."""
    hidden = random_secret(rng, split)
    length = rng.randint(50, MAX_FILLER_TOKENS) if tokens is None else tokens
    return _ending_with(rng, [hiding_turn(rng, [hidden], length, depth)], asking_turn(hidden))


def tool_call(rng: random.Random, split: Split) -> Example:
    """Ask for the weather where a tool must be called, sometimes after another turn."""
    earlier = [small_talk_turn(rng)] if rng.randrange(2) else []
    request = weather_messages(rng, split)
    arguments = request[1]["tool_calls"][0]["function"]["arguments"]
    messages = [*_history(rng, earlier), request[0]]
    return Example(messages, weather_call(**arguments), "tool_call", [WEATHER_TOOL])


def tool_answer(rng: random.Random, split: Split) -> Example:
    """Ask for the sentence that follows the tool's response."""
    *request, answer = weather_messages(rng, split)
    return Example([*_history(rng, []), *request], answer["content"], "tool_answer", [WEATHER_TOOL])


def _history(rng: random.Random, turns: list[Turn]) -> list[Message]:
    messages: list[Message] = [{"role": "system", "content": rng.choice(words.SYSTEM_PROMPTS)}]
    for turn in turns:
        messages.append({"role": "user", "content": turn.user})
        messages.append({"role": "assistant", "content": turn.answer})
    return messages


def _ending_with(rng: random.Random, turns: list[Turn], question: Turn) -> Example:
    messages = [*_history(rng, turns), {"role": "user", "content": question.user}]
    return Example(messages, question.answer, question.task)


TASKS: Final[dict[str, Callable[[random.Random, Split], Example]]] = {
    "arithmetic": arithmetic,
    "fact": fact,
    "secret": secret,
    "tool_call": tool_call,
    "tool_answer": tool_answer,
}


def examples(task: str, split: Split, seed: int, count: int) -> list[Example]:
    """Draw ``count`` examples of a task."""
    rng = random.Random(f"{task}|{split}|{seed}")
    return [TASKS[task](rng, split) for _ in range(count)]


def correct(example: Example | Turn, text: str) -> bool:
    """Whether a generated text gives the example's answer."""
    return bool(text.strip()) and _essence(example.task, text) == _essence(example.task, example.answer)


def _essence(task: str, text: str) -> str:
    """Return what a grader compares: the result, the value, or every token of a tool call."""
    text = " ".join(text.split())
    if task == "arithmetic":
        return text.rpartition("=")[2].strip().rstrip(".")
    if task in {"fact", "secret"}:
        return text.rpartition(" is ")[2].rstrip(".")
    return text


def scenarios(seed: int, count: int, split: Split = "heldout") -> list[Scenario]:
    """Draw conversations of ten to sixteen turns that mix the tasks, with several graded questions each."""
    rng = random.Random(f"scenario|{split}|{seed}")
    return [_scenario(rng, split) for _ in range(count)]


def _scenario(rng: random.Random, split: Split) -> Scenario:
    facts = random_facts(rng, split, 5)
    hidden = [random_secret(rng, split, owner) for owner in rng.sample(words.NAMES, 2)]
    told = [telling_turn(facts[:3]), hiding_turn(rng, hidden, rng.randint(150, 500)), telling_turn(facts[3:])]
    asked = [asking_turn(known) for known in rng.sample([*facts, *hidden], 5)]
    rng.shuffle(asked)
    turns = [*told, *asked]
    for _ in range(rng.randint(2, 5)):
        turn = rng.choice((arithmetic_turn(rng, split), small_talk_turn(rng)))
        turns.insert(rng.randint(0, len(turns)), turn)
    return Scenario(rng.choice(words.SYSTEM_PROMPTS), tuple(turns))


def calibration_prompts(seed: int, count: int) -> list[list[Message]]:
    """Draw conversations of every task from the training split, their answers included."""
    rng = random.Random(f"calibration|{seed}")
    drawn = (TASKS[task](rng, "train") for task in itertools.islice(itertools.cycle(TASKS), count))
    return [[*example.messages, {"role": "assistant", "content": example.answer}] for example in drawn]
