"""Conversations to calibrate on when the user names none: varied, several turns each, with a system prompt.

What a scale must have seen is the spread of a real conversation: roles and their markers, prose and
code, numbers and tables, other scripts, short answers and long documents.
"""

from __future__ import annotations

import random
from typing import Any, Final

from truekv.tiny.tasks import calibration_prompts

Message = dict[str, Any]

_SYSTEM: Final = (
    "You are a helpful assistant.",
    "You are a careful assistant. Think before you answer, and say so when you do not know.",
    "You are a senior engineer who reviews code. Be brief and precise.",
    "Answer in the language of the question. Use at most three sentences unless asked for more.",
    "You are a patient teacher. Explain with small examples.",
)
_DOCUMENTS: Final = (
    (
        "The harbour was built in 1874, when the railway reached the coast. For thirty years it shipped timber and "
        "slate; then the river mouth silted up, and only fishing boats with a shallow keel could still reach the "
        "quay. The town dredged the channel twice, in 1911 and in 1936, and gave up both times after a winter of "
        "storms had undone the work. Today the old warehouses hold a museum, two workshops and a school of "
        "boatbuilding."
    ),
    (
        "Minutes, 14 March. Present: Ines, Tomasz, Wei, Adaeze. 1. The release moves from Tuesday to Thursday, "
        "because the migration needs a second rehearsal. 2. Wei reports that p99 latency fell from 410 ms to 265 "
        "ms after the index was rebuilt. 3. Adaeze asks for an owner of the on-call handbook; Tomasz takes it "
        "until June. 4. Next meeting: 28 March, 10:30, room B.204."
    ),
    (
        "A sourdough starter is flour and water in which wild yeast and lactic bacteria live together. Feed it "
        "once a day: keep 50 g, add 50 g of flour and 50 g of water, stir, and leave the lid loose. After feeding "
        "it should double in four to eight hours at 24 degrees. Colder kitchens need longer; a starter that smells "
        "of acetone is hungry."
    ),
    (
        "| region | units | price | revenue |\n|---|---|---|---|\n| north | 1,204 | 18.50 | 22,274.00 |\n| east | "
        "987 | 19.25 | 18,999.75 |\n| south | 2,310 | 17.90 | 41,349.00 |\n| west | 640 | 21.00 | 13,440.00 |"
    ),
    (
        '{"id": 48213, "status": "shipped", "items": [{"sku": "KB-204", "quantity": 2, "price": 39.9}, {"sku": '
        '"MS-77", "quantity": 1, "price": 24.5}], "address": {"city": "Gdańsk", "postcode": "80-831"}, "express": '
        "false}"
    ),
    (
        "def merge(left, right):\n    result = []\n    while left and right:\n        source = left if left[0] <= "
        "right[0] else right\n        result.append(source.pop(0))\n    return result + left + right\n\n\ndef "
        "sort(items):\n    if len(items) < 2:\n        return items\n    middle = len(items) // 2\n    return "
        "merge(sort(items[:middle]), sort(items[middle:]))"
    ),
    (
        "SELECT c.name, COUNT(o.id) AS orders, SUM(o.total) AS spent\nFROM customers AS c\nLEFT JOIN orders AS o "
        "ON o.customer_id = c.id AND o.created >= '2024-01-01'\nGROUP BY c.name\nHAVING COUNT(o.id) > 3\nORDER BY "
        "spent DESC\nLIMIT 20;"
    ),
)
_ABOUT: Final = (
    ("What is this about? One sentence.", "It describes one thing in some detail, with its numbers and its history."),
    ("Which numbers does it contain? List them.", "I will list them in the order in which they appear."),
    ("Rewrite it so that a child understands it.", "Here is a simpler version, with short words and short sentences."),
    ("Is there anything in it that looks wrong?", "Nothing contradicts itself, but some details would need a source."),
)
_EXCHANGES: Final = (
    ("What is 37 * 43?", "37 * 43 = 37 * 40 + 37 * 3 = 1480 + 111 = 1591."),
    (
        "Why is the sky blue?",
        "Air scatters short wavelengths more than long ones, so blue light reaches us all around.",
    ),
    ("Write a haiku about rain.", "Rain on the tin roof,\nthe cat counts every drop twice,\nthe garden drinks on."),
    ("How do I undo the last git commit?", "Use `git reset --soft HEAD~1`: the commit goes, its changes stay staged."),
    ("Wie spät ist es, wenn es in Tokio 9 Uhr ist?", "In Berlin ist es dann 1 Uhr nachts, im Sommer 2 Uhr."),
    ("¿Cuál es la capital de Bolivia?", "La capital constitucional es Sucre; el gobierno tiene su sede en La Paz."),
    ("請用一句話解釋什麼是緩存。", "緩存是把常用的數據放在離使用者更近的地方。"),
    ("Объясни, что такое рекурсия.", "Рекурсия — это когда функция вызывает саму себя на меньшей задаче."),
    ("ما هي عاصمة المغرب؟", "عاصمة المغرب هي الرباط."),
    ("Give me three names for a grey cat.", "1. Ash\n2. Pebble\n3. Smoke"),
    ("My name is Alexander and I live in Porto.", "Nice to meet you, Alexander. How is Porto today?"),
    ("Convert 68 degrees Fahrenheit to Celsius.", "(68 - 32) * 5 / 9 = 20, so it is 20 degrees Celsius."),
    ("What does HTTP 429 mean?", "Too many requests: slow down, and wait as long as the Retry-After header says."),
    ("Solve x^2 - 5x + 6 = 0.", "It factors as (x - 2)(x - 3) = 0, so x = 2 or x = 3."),
    ("Fix the grammar: 'He don't knows nothing.'", "He doesn't know anything."),
    ("Write a Python one-liner that sums the squares of 1 to n.", "`sum(i * i for i in range(1, n + 1))`"),
    ("Summarise Hamlet in two sentences.", "A prince learns that his uncle killed his father. He hesitates; all die."),
    ("What should I check on a used bicycle?", "The frame for cracks, the wheels for play, the chain for wear."),
    ("Who wrote 'The Master and Margarita'?", "Mikhail Bulgakov, between 1928 and 1940."),
    ("Explain a hash table.", "It stores a value at a place computed from its key, so finding it takes constant time."),
    ("Thanks!", "You are welcome."),
    ("Hello", "Hello! How can I help you?"),
)


def conversations(seed: int, count: int) -> list[list[Message]]:
    """Return `count` conversations, each ending with a user message that is still to be answered."""
    rng = random.Random(f"calibrate|{seed}")  # noqa: S311 (a reproducible choice, not a secret)
    general = [_general(rng) for _ in range(count - count // 2)]
    tasks = [messages[:-1] for messages in calibration_prompts(seed, count // 2)]
    mixed = [*general, *tasks]
    rng.shuffle(mixed)
    return mixed


def _general(rng: random.Random) -> list[Message]:
    turns = rng.sample(_EXCHANGES, rng.randint(2, 5))
    if rng.randrange(2):
        question, answer = rng.choice(_ABOUT)
        place = rng.randrange(len(turns))
        turns.insert(place, (f"{rng.choice(_DOCUMENTS)}\n\n{question}", answer))
    messages: list[Message] = [{"role": "system", "content": rng.choice(_SYSTEM)}]
    for user, assistant in turns:
        messages += [{"role": "user", "content": user}, {"role": "assistant", "content": assistant}]
    return messages[:-1]
