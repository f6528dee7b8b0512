"""Vocabulary and phrases of the synthetic tasks.

Every open-class word is a single token of the tokenizer shipped with the models, so the length of a text in tokens is
its number of words plus its punctuation.
"""

from typing import Final

NAMES: Final = (
    "Alice", "Bob", "Clara", "David", "Emma", "Frank", "Grace", "Henry", "Iris", "Jack", "Kate", "Leo",
    "Maria", "Noah", "Olga", "Peter", "Quinn", "Rosa", "Sam", "Tina", "Umar", "Vera", "Wanda", "Zoe",
)  # fmt: skip
CITIES: Final = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Dublin", "Vienna", "Prague", "Athens", "Lisbon", "Warsaw",
    "Tokyo", "Delhi", "Cairo", "Lima", "Boston", "Chicago", "Denver", "Toronto", "Sydney", "Nairobi", "Seoul",
    "Helsinki",
)  # fmt: skip
COLOURS: Final = ("red", "blue", "green", "yellow", "purple", "orange", "pink", "brown", "black", "white")
ADJECTIVES: Final = (
    "silver", "golden", "brave", "quiet", "clever", "gentle", "hidden", "frozen", "lucky", "noble", "proud", "rapid",
    "royal", "rusty", "secure", "shiny", "silent", "stormy", "sunken", "tiny", "velvet", "wild", "wise", "young",
)  # fmt: skip
ANIMALS: Final = (
    "platypus", "badger", "camel", "dolphin", "eagle", "falcon", "gecko", "heron", "iguana", "jaguar", "koala", "lemur",
    "marten", "otter", "panda", "rabbit", "salmon", "tiger", "turtle", "viper", "walrus", "weasel", "yak", "zebra",
)  # fmt: skip
CONDITIONS: Final = ("sunny", "cloudy", "rainy", "windy", "foggy", "snowy")
UNITS: Final = ("celsius", "fahrenheit")

SYSTEM_PROMPTS: Final = (
    "You are a helpful assistant.",
    "You are a careful assistant. Answer in short sentences.",
    "You remember what the user tells you.",
    "Answer every question in one sentence.",
)
SMALL_TALK: Final = (
    ("Hello!", "Hello! How can I help you?"),
    ("How are you?", "I am fine, thank you."),
    ("Thank you.", "You are welcome."),
    ("Good morning.", "Good morning! How can I help you?"),
    ("Tell me a joke.", "I do not know a joke."),
)
WEATHER_REQUESTS: Final = (
    "How is the weather in {city}? I want {unit}.",
    "I need {unit} for the weather in {city}.",
    "Get the weather in {city}, and use {unit}.",
    "Use {unit} and tell me what the weather in {city} is.",
)

NOUNS: Final = (
    "river", "garden", "window", "table", "road", "forest", "village", "market", "bridge", "house", "mountain", "boat",
    "train", "letter", "book", "lamp", "clock", "field", "tower", "school", "station", "island", "kitchen", "street",
    "baker", "farmer", "teacher", "sailor", "doctor", "painter", "child", "neighbour", "wind", "rain", "sun", "moon",
)  # fmt: skip
VERBS: Final = (
    "stands", "waits", "sleeps", "moves", "shines", "turns", "rests", "sings", "works", "walks", "stays", "falls",
    "grows", "opens", "leaves", "returns",
)  # fmt: skip
PLACES: Final = ("near", "behind", "under", "above", "beside", "across", "before", "after")
QUALITIES: Final = ("tall", "small", "large", "bright", "dark", "warm", "cold", "long", "narrow", "wide")
ADVERBS: Final = ("slowly", "often", "today", "again", "early", "late", "together", "alone")
FILLER_TEMPLATES: Final = (
    "The {noun} {verb} {place} the {noun}.",
    "The {quality} {noun} {verb} {adverb}.",
    "A {noun} {verb} {place} a {quality} {noun}.",
    "{adverb} the {noun} {verb} and the {noun} {verb}.",
    "There was a {quality} {noun} {place} the {noun}.",
    "We saw the {noun} {place} the {quality} {noun} {adverb}.",
)
FILLER_WORDS: Final = {"noun": NOUNS, "verb": VERBS, "place": PLACES, "quality": QUALITIES, "adverb": ADVERBS}
