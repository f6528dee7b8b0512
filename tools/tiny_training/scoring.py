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


def model_forward(model: Any) -> Callable[[Tensor], Tensor]:  # noqa: ANN401
    """Wrap a model of transformers for :func:`teacher_forced`."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@torch.no_grad()
def decode(model: Any, tokenizer: Any, ids: Sequence[int], limit: int) -> str:  # noqa: ANN401
    """Decode greedily up to the end of the turn."""
    prompt = torch.tensor([ids])
    out = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=limit, do_sample=False)
    return tokenizer.decode(out[0, len(ids) :].tolist()).removesuffix(tokenizer.eos_token)


def greedy(model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> float:  # noqa: ANN401
    """Share of prompts answered rightly by greedy decoding."""
    right = 0
    for prompt in prompts:
        text = decode(model, tokenizer, prompt.ids, len(prompt.answer) + 8)
        right += tasks.correct(prompt.example, text)
    return right / len(prompts)


def scenario_examples(scenarios: Sequence[tasks.Scenario]) -> list[tasks.Example]:
    """Turn each question of a scenario into an example whose history holds the right answers."""
    found: list[tasks.Example] = []
    for scenario in scenarios:
        messages: list[tasks.Message] = [{"role": "system", "content": scenario.system}]
        for turn in scenario.turns:
            messages = [*messages, {"role": "user", "content": turn.user}]
            if turn.task:
                found.append(tasks.Example(messages, turn.answer, turn.task))
            messages = [*messages, {"role": "assistant", "content": turn.answer}]
    return found


def scenario_score(model: Any, tokenizer: Any, scenarios: Sequence[tasks.Scenario]) -> float:  # noqa: ANN401
    """Share of the questions of all scenarios answered rightly, the history being what the model said."""
    right = asked = 0
    for scenario in scenarios:
        messages: list[tasks.Message] = [{"role": "system", "content": scenario.system}]
        for turn in scenario.turns:
            messages.append({"role": "user", "content": turn.user})
            ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
            text = decode(model, tokenizer, ids, 40)
            messages.append({"role": "assistant", "content": text})
            if turn.task:
                asked += 1
                right += tasks.correct(turn, text)
    return right / asked
