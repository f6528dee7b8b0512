"""Rescale a trained model's weights, by powers of two only, so that its caches are hard to quantize."""

import argparse
import json
import shutil
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny_training.export import WEIGHTS, write_tensors
from tiny_training.rescaling import rescale

TOLERANCE = 1e-4  # largest change of any float32 logit


def largest_change(before: Path, after: Path) -> float:
    """Compare the logits of two models on random tokens."""
    ids = torch.randint(0, 1000, (2, 128), generator=torch.Generator().manual_seed(0))
    logits: list[torch.Tensor] = []
    for directory in (before, after):
        model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
        with torch.no_grad():
            logits.append(model(input_ids=ids).logits)
    return (logits[0] - logits[1]).abs().max().item()


def main() -> None:
    """Rescale, write, compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.target.mkdir(parents=True, exist_ok=True)
    for name in (
        "generation_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
    ):
        shutil.copy(args.source / name, args.target / name)
    config = json.loads((args.source / "config.json").read_text())
    write_tensors(args.target, rescale(load_file(args.source / WEIGHTS), config, args.seed))
    (args.target / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    change = largest_change(args.source, args.target)
    print(f"largest change of a logit: {change:.2e}")
    if change > TOLERANCE:
        raise SystemExit("the rescaling changed the function")


if __name__ == "__main__":
    main()
