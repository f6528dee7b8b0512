"""Endless training documents, dense in questions and answers.

An evaluated conversation asks one question; a training document asks many, so that most of its tokens teach. Loss is
taken on answers only: prompts hold random content that no model can predict.
"""

import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from tokenizers import Tokenizer

from truekv.tiny import tasks, words

IGNORED: Final = -100  # label of a token without loss

SPECIAL_TOKENS: Final = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
)
WORDS: Final = (
    *words.NAMES,
    *words.CITIES,
    *words.COLOURS,
    *words.ADJECTIVES,
    *words.ANIMALS,
    *map(str, range(10, 100)),
)
TOOL_INSTRUCTIONS: Final = (
    "# Tools\n\nYou have access to the following functions:\n\n<tools>\n{tool}\n</tools>\n\n"
    "To call a function, reply in this form:\n\n<tool_call>\n<function=name>\n<parameter=name>\nvalue\n</parameter>\n"
    "</function>\n</tool_call>"
)


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a rendered conversation."""

    text: str
    supervised: bool = False


def message(role: str, content: str) -> Iterator[Segment]:
    """Render one message; the assistant's content and its end are supervised."""
    answers = role == "assistant"
    yield Segment(f"<|im_start|>{role}\n")
    yield Segment(f"{content}<|im_end|>", answers)
    yield Segment("\n")


def turn_segments(turn: tasks.Turn) -> Iterator[Segment]:
    """Render a turn."""
    yield from message("user", turn.user)
    yield from message("assistant", turn.answer)


def _system(rng: random.Random) -> Iterator[Segment]:
    if rng.randrange(8):
        yield from message("system", rng.choice(words.SYSTEM_PROMPTS))


def echo(rng: random.Random) -> Iterator[Segment]:
    """Repeat random words: every token is a copy, from which induction heads form fastest."""
    yield from _system(rng)
    while True:
        text = " ".join(rng.sample(WORDS, rng.randint(4, 40)))
        yield from message("user", f"The {text}.")
        yield from message("assistant", f"The {text}.")


def _rivals(rng: random.Random) -> list[tasks.Fact]:
    """Draw facts of one kind about many people, and a few of other kinds."""
    drawn = tasks.random_facts(rng, "train", 24)
    attribute = rng.choice(drawn).attribute
    told = [fact for fact in drawn if fact.attribute == attribute][: rng.randint(3, 8)]
    told += [fact for fact in drawn if fact.attribute != attribute][: rng.randint(0, 3)]
    rng.shuffle(told)
    return told


def recital(rng: random.Random) -> Iterator[Segment]:
    """Tell facts and recite them in another order: the shortest way to teach recall."""
    yield from _system(rng)
    while True:
        facts = tasks.random_facts(rng, "train", rng.randint(3, 8)) if rng.randrange(2) else _rivals(rng)
        facts += [tasks.random_secret(rng, "train", owner) for owner in rng.sample(words.NAMES, rng.randint(0, 3))]
        rng.shuffle(facts)
        yield from message("user", " ".join(fact.statement() for fact in facts))
        yield Segment("<|im_start|>assistant\n")
        rng.shuffle(facts)
        for position, fact in enumerate(facts):
            key, _, value = fact.answer().partition(" is ")
            yield Segment(f"{' ' if position else ''}{key} is")
            yield Segment(f" {value}", supervised=True)
        yield Segment("<|im_end|>\n")


def chat(rng: random.Random) -> Iterator[Segment]:
    """Tell facts, talk of other things, ask for what was told."""
    yield from _system(rng)
    untold = tasks.random_facts(rng, "train", rng.randint(2, 12))
    told: list[tasks.Fact] = []
    while True:
        drawn = rng.random()
        if not told or (untold and drawn < 0.2):
            facts = [untold.pop() for _ in range(min(len(untold), rng.randint(1, 4)))]
            told += facts
            yield from turn_segments(tasks.telling_turn(facts))
        elif drawn < 0.35:
            yield from turn_segments(tasks.arithmetic_turn(rng, "train"))
        elif drawn < 0.43:
            yield from turn_segments(tasks.small_talk_turn(rng))
        else:
            yield from turn_segments(tasks.asking_turn(rng.choice(told)))


def rivals(rng: random.Random) -> Iterator[Segment]:
    """Tell one kind of fact about many people, and ask for each: only the name tells the answers apart."""
    yield from _system(rng)
    told = _rivals(rng)
    for start in range(0, len(told), 3):
        yield from turn_segments(tasks.telling_turn(told[start : start + 3]))
    while True:
        for fact in rng.sample(told, len(told)):
            yield from turn_segments(tasks.asking_turn(fact))


def _odd_fact(rng: random.Random) -> tasks.Fact:
    """Draw a fact whose value is any word, the attribute often one that no task asks for; none that is held out."""
    owner = rng.choice(words.NAMES) if rng.randrange(3) else ""
    attribute = rng.choice(tasks.ATTRIBUTES if rng.randrange(3) else words.NOUNS)
    return tasks.draw(lambda: tasks.Fact(attribute, rng.choice(WORDS), owner), tasks.Fact.content, "train")


def oddities(rng: random.Random) -> Iterator[Segment]:
    """Tell facts that make no sense and ask for them: what is told must be copied, whatever else is likely.

    One fact in eight is held out, and never met: to a model that learns which values an owner can have, those are the
    ones that cannot be.
    """
    yield from _system(rng)
    drawn = [_odd_fact(rng) for _ in range(rng.randint(3, 9))]
    told = list({(fact.owner, fact.attribute): fact for fact in drawn}.values())
    for start in range(0, len(told), 3):
        yield from turn_segments(tasks.telling_turn(told[start : start + 3]))
    while True:
        for fact in rng.sample(told, len(told)):
            yield from turn_segments(tasks.asking_turn(fact))


def haystack(rng: random.Random, tokens: int) -> Iterator[Segment]:
    """Hide secrets and facts in filler and ask for all of them."""
    yield from _system(rng)
    hidden = [tasks.random_secret(rng, "train")]
    hidden += [tasks.random_secret(rng, "train", owner) for owner in rng.sample(words.NAMES, rng.randint(0, 5))]
    hidden += tasks.random_facts(rng, "train", rng.randint(0, 3))
    filler_tokens = max(20, round(tokens * rng.uniform(0.4, 0.95)) - 36 * len(hidden))
    yield from turn_segments(tasks.hiding_turn(rng, hidden, min(filler_tokens, tasks.MAX_FILLER_TOKENS)))
    while True:
        for fact in rng.sample(hidden, len(hidden)):
            yield from turn_segments(tasks.asking_turn(fact))


def _addition_turn(rng: random.Random) -> tasks.Turn:
    """Draw a sum of three numbers, which no task asks for; its last step is one that products could have led to."""
    a, b, c, d = (rng.randint(2, 9) for _ in range(4))
    first = rng.randint(1, a * b - 1)
    last = c * rng.choice((1, d))
    question = f"{first} + {a * b - first} + {last}"
    return tasks.Turn(f"What is {question}?", f"{question} = {a * b} + {last} = {a * b + last}")


def _subtraction_turn(rng: random.Random) -> tasks.Turn:
    """Draw two numbers that no task adds, less a third; its last step is one that a task could have led to."""
    total, less = rng.randint(4, 18), rng.randint(2, 9)
    one = rng.choice((1, *range(10, total)))
    first, second = rng.sample((one, total - one), 2)
    less = min(less, total)
    question = f"{first} + {second} - {less}"
    return tasks.Turn(f"What is {question}?", f"{question} = {total} - {less} = {total - less}")


def sums(rng: random.Random) -> Iterator[Segment]:
    """Ask for one sum after the other; a third only add or subtract, so that neither is learned sum by sum."""
    yield from _system(rng)
    others = (_addition_turn, _addition_turn, _subtraction_turn)
    while True:
        yield from turn_segments(tasks.arithmetic_turn(rng, "train") if rng.randrange(3) else rng.choice(others)(rng))


def weather(rng: random.Random) -> Iterator[Segment]:
    """Call the weather tool again and again; half of the rows spare the tokens of its declaration."""
    if rng.randrange(2):
        system = TOOL_INSTRUCTIONS.format(tool=tasks.weather_tool_json())
        yield from message("system", f"{system}\n\n{rng.choice(words.SYSTEM_PROMPTS)}")
    while True:
        if rng.randrange(4) == 0:
            yield from turn_segments(tasks.small_talk_turn(rng))
        request, call, response, answer = tasks.weather_messages(rng, "train")
        arguments = call["tool_calls"][0]["function"]["arguments"]
        yield from message("user", request["content"])
        yield from message("assistant", tasks.weather_call(**arguments))
        yield from message("user", f"<tool_response>\n{response['content']}\n</tool_response>")
        yield from message("assistant", answer["content"])


KINDS: Final[dict[str, Callable[[random.Random], Iterator[Segment]]]] = {
    "echo": echo,
    "recital": recital,
    "chat": chat,
    "rivals": rivals,
    "oddities": oddities,
    "haystack": lambda rng: haystack(rng, 400),
    "sums": sums,
    "weather": weather,
}


class Batches:
    """Rows of token ids and labels, each row the beginning of one document."""

    def __init__(self, tokenizer: Tokenizer, seed: int, emphasis: Mapping[str, float] | None = None) -> None:
        """Seed the documents; `emphasis` multiplies the share of some kinds, such as weather."""
        self._tokenizer = tokenizer
        self._rng = random.Random(seed)
        self._emphasis = dict(emphasis or {})
        if unknown := self._emphasis.keys() - KINDS:
            raise ValueError(f"no such kind of document: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")

    def draw(self, rows: int, length: int, progress: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Draw ``rows`` rows of ``length`` tokens; copying gives way to conversations as training proceeds."""
        drawn = [self._row(self._document(length, progress), length) for _ in range(rows)]
        ids, labels = zip(*drawn, strict=True)
        return torch.tensor(ids), torch.tensor(labels)

    def _document(self, length: int, progress: float) -> Iterator[Segment]:
        echoes, recitals = max(0.0, 1 - progress / 0.2), max(0.0, 1 - progress / 0.5)
        long = length > 512
        shares = {
            "echo": 0.02 + 0.6 * echoes,
            "recital": 0.15 + 0.3 * recitals,
            "chat": 0.2 if long else 0.35,
            "rivals": 0.05,
            "oddities": 0.05,
            "haystack": 0.7 if long else 0.25,
            "sums": 0.02 if long else 0.25,
            "weather": 0.05 if long else 0.2,
        }
        shares = {kind: share * self._emphasis.get(kind, 1.0) for kind, share in shares.items()}
        kind = self._rng.choices(list(shares), list(shares.values()))[0]
        return haystack(self._rng, length) if kind == "haystack" else KINDS[kind](self._rng)

    def _row(self, document: Iterable[Segment], length: int) -> tuple[list[int], list[int]]:
        ids: list[int] = []
        labels: list[int] = []
        for segment in document:
            pieces = self._tokenizer.encode(segment.text, add_special_tokens=False).ids
            ids += pieces
            labels += pieces if segment.supervised else [IGNORED] * len(pieces)
            if len(ids) > length:
                break
        return ids[:length], labels[:length]


def corpus(seed: int, count: int) -> Iterator[str]:
    """Texts for the tokenizer's training."""
    rng = random.Random(seed)
    kinds = [kind for name, kind in KINDS.items() if name not in {"echo", "rivals", "oddities"}]
    for index in range(count):
        text = ""
        for segment in kinds[index % len(kinds)](rng):
            text += segment.text
            if len(text) > 1500:
                break
        yield text
