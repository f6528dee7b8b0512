"""Held-out accuracy, by one forward pass per batch or by greedy decoding."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from truekv.tiny import tasks


@dataclass(frozen=True, slots=True)
class Prompt:
    """A tokenized example."""

    example: tasks.Example
    ids: list[int]
    answer: list[int]


def tokenize(tokenizer: Any, examples: Sequence[tasks.Example]) -> list[Prompt]:  # noqa: ANN401
    """Render examples through the chat template; the answer ends with the end of the turn."""
    prompts: list[Prompt] = []
    for example in examples:
        text = tokenizer.apply_chat_template(
            example.messages, tools=example.tools, tokenize=False, add_generation_prompt=True
        )
        answer = tokenizer.encode(example.answer + tokenizer.eos_token, add_special_tokens=False)
        prompts.append(Prompt(example, tokenizer.encode(text, add_special_tokens=False), answer))
    return prompts


def heldout_suite(seed: int, count: int) -> dict[str, list[tasks.Example]]:
    """Draw held-out examples of every task, and of the longest haystacks."""
    suite = {task: tasks.examples(task, "heldout", seed, count) for task in tasks.TASKS if task != "secret"}
    rng = tasks.random.Random(f"haystack|{seed}")
    for length in (250, 1000, tasks.MAX_FILLER_TOKENS):
        size = count if length < 1000 else max(1, count // 2)
        suite[f"secret {length}"] = [tasks.secret(rng, "heldout", length) for _ in range(size)]
    return suite


@torch.no_grad()
def teacher_forced(forward: Callable[[Tensor], Tensor], prompts: Sequence[Prompt], batch_tokens: int = 16384) -> float:
    """Share of prompts whose every answer token is the most likely one, which is to be right under greedy decoding."""
    right = 0
    ordered = sorted(prompts, key=lambda prompt: len(prompt.ids) + len(prompt.answer))
    rows = max(1, batch_tokens // (len(ordered[-1].ids) + len(ordered[-1].answer)))
    for start in range(0, len(ordered), rows):
        batch = ordered[start : start + rows]
        length = max(len(prompt.ids) + len(prompt.answer) for prompt in batch)
        ids = torch.zeros(len(batch), length, dtype=torch.long)  # what follows a row's end cannot change its logits
        for row, prompt in zip(ids, batch, strict=True):
            tokens = prompt.ids + prompt.answer
            row[: len(tokens)] = torch.tensor(tokens)
        best = forward(ids).argmax(-1)
        for row, prompt in zip(best, batch, strict=True):
            first = len(prompt.ids) - 1
            right += row[first : first + len(prompt.answer)].tolist() == prompt.answer
    return right / len(prompts)
