"""Files that transformers loads."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "model.safetensors"


def save_model(model: Any, head: torch.nn.Module | None, directory: Path) -> None:  # noqa: ANN401
    """Round to bfloat16 and write configuration, generation settings and weights, the head under ``mtp.``."""
    tokenizer = json.loads((directory / "tokenizer.json").read_text())
    ids = {token["content"]: token["id"] for token in tokenizer["added_tokens"]}
    model.config.eos_token_id = model.generation_config.eos_token_id = ids["<|im_end|>"]
    model.config.pad_token_id = model.generation_config.pad_token_id = ids["<|endoftext|>"]
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(directory)
    if head is not None:
        tensors = {f"mtp.{name}": tensor.detach().bfloat16() for name, tensor in head.state_dict().items()}
        write_tensors(directory, load_file(directory / WEIGHTS) | tensors)


def write_tensors(directory: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Replace a model's weights."""
    contiguous = {name: tensor.contiguous() for name, tensor in sorted(tensors.items())}
    save_file(contiguous, directory / WEIGHTS, metadata={"format": "pt"})
