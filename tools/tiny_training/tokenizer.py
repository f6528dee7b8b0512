"""The byte-level BPE shared by the three models."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Final

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tiny_training.documents import SPECIAL_TOKENS, corpus

VOCABULARY_SIZE: Final = 1024
MERGED_SIZE: Final = 860  # the rest is left to whole words that merging alone did not reach
CORPUS_SIZE: Final = 3000

# Qwen's pattern, except that a space joins the digit after it: a number of n digits is n tokens.
PRETOKENIZE: Final = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+| ?\p{N}"
    r"| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(seed: int) -> Tokenizer:
    """Train on generated text; every word of the tasks becomes one token, all else falls back to bytes."""
    special = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
    texts = [piece for text in corpus(seed, CORPUS_SIZE) for piece in special.split(text) if piece]
    split = pre_tokenizers.Split(Regex(PRETOKENIZE), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=MERGED_SIZE, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    counts = Counter(word for text in texts for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text))
    return _with_whole_words(tokenizer, [word for word, _ in counts.most_common()])


def _with_whole_words(tokenizer: Tokenizer, frequent: list[str]) -> Tokenizer:
    """Add frequent words to the vocabulary; ``ignore_merges`` finds them before any merge is tried."""
    spec = json.loads(tokenizer.to_str())
    vocabulary: dict[str, int] = spec["model"]["vocab"]
    for word in frequent:
        if len(vocabulary) == VOCABULARY_SIZE - len(SPECIAL_TOKENS):
            break
        vocabulary.setdefault(word, len(vocabulary))
    spec["model"]["ignore_merges"] = True
    complete = Tokenizer.from_str(json.dumps(spec))
    complete.decoder = decoders.ByteLevel()
    complete.add_special_tokens(list(SPECIAL_TOKENS[:3]))
    complete.add_tokens(list(SPECIAL_TOKENS[3:]))  # visible in decoded text: callers parse them
    return complete


def save_tokenizer(tokenizer: Tokenizer, directory: Path, chat_template: Path) -> None:
    """Write what ``AutoTokenizer`` reads."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
    (directory / "chat_template.jinja").write_text(chat_template.read_text())
