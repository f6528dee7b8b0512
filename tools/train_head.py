"""Train the prediction head of a finished hybrid further; its trunk stays as it is, to the last bit.

Run ``PYTHONPATH=src python tools/train_head.py src/truekv/tiny/hybrid --minutes 14``, then measure its frames again.
"""

import argparse
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file
from tiny_training.documents import Batches
from tiny_training.export import WEIGHTS, write_tensors
from tiny_training.mtp import PredictionHead, train_head
from tokenizers import Tokenizer


def main() -> None:
    """Read, train, write the head's tensors alone."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--fresh", action="store_true", help="start from the trunk's last layer, not from the head")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    trunk = transformers.AutoModelForCausalLM.from_pretrained(args.directory, dtype=torch.float32)
    tensors = load_file(args.directory / WEIGHTS)
    head = None
    if not args.fresh:
        head = PredictionHead(trunk.config)
        head.load_state_dict({name.removeprefix("mtp."): x for name, x in tensors.items() if name.startswith("mtp.")})
    batches = Batches(Tokenizer.from_file(str(args.directory / "tokenizer.json")), args.seed)
    head = train_head(trunk, batches, args.minutes, head=head)
    trained = {f"mtp.{name}": tensor.detach().bfloat16() for name, tensor in head.state_dict().items()}
    write_tensors(args.directory, tensors | trained)


if __name__ == "__main__":
    main()
