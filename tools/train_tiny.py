"""Train one of the small models: tokenizer, trunk, prediction head, files; ``harden_tiny.py`` comes next.

Run ``PYTHONPATH=src python tools/train_tiny.py --model hybrid --minutes 60 --out build/hybrid``.
"""

import argparse
import time
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 (its usual name)
import transformers
from tiny_training import architectures, forward, mtp, scoring
from tiny_training.documents import IGNORED, Batches
from tiny_training.export import save_model
from tiny_training.initialisation import cool, forget_soon
from tiny_training.optimizer import Optimizer
from tiny_training.rescaling import snap_norms, soften
from tiny_training.tokenizer import save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

CHAT_TEMPLATE = Path(__file__).parents[1] / "src/truekv/tiny/chat_template.jinja"
TOKENS_PER_STEP = 4096
EVALUATE_EVERY = 240  # seconds
SNAP_AT = 0.6  # progress at which the hybrid's attention norms are rounded; the rest then adapts to them
PRECISION = torch.float32  # bfloat16 takes ten times as long on a CPU without instructions for it


def schedule(progress: float) -> float:
    """Warm up over 2%, hold to 45%, fall linearly to almost nothing."""
    return min(1.0, progress / 0.02 + 0.05, max(0.01, (1 - progress) / 0.55))


def row_length(step: int, progress: float) -> int:
    """Short rows first; every length to the end, so that the rotary embedding meets every distance."""
    if progress < 0.35:
        return 256
    if progress < 0.5:
        return (256, 512)[step % 2]
    return (256, 256, 512, 256, 2304, 256, 1024, 512)[step % 8]


def loss_of(model: transformers.PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the answers' tokens."""
    hidden = forward.hidden_states(model, ids, PRECISION)
    wanted = labels[:, 1:] != IGNORED
    logits = forward.logits(model, hidden[:, :-1][wanted], PRECISION)
    return F.cross_entropy(logits, labels[:, 1:][wanted])


def evaluate(model: transformers.PreTrainedModel, suite: dict[str, list[scoring.Prompt]]) -> dict[str, float]:
    """Score the held-out suite."""

    def passes(ids: torch.Tensor) -> torch.Tensor:
        return forward.logits(model, forward.hidden_states(model, ids, PRECISION), PRECISION)

    return {task: scoring.teacher_forced(passes, prompts) for task, prompts in suite.items()}


def resume(model: transformers.PreTrainedModel, source: Path) -> None:
    """Load the weights of an earlier trunk, or of a finished model's directory."""
    if source.is_dir():
        finished = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
        weights = soften(finished.state_dict(), finished.config.to_dict())
    else:
        weights = torch.load(source)
    model.load_state_dict(weights)


def train_trunk(
    model: transformers.PreTrainedModel,
    batches: Batches,
    suite: dict[str, list[scoring.Prompt]],
    args: argparse.Namespace,
) -> None:
    """Train against the clock."""
    optimizer = Optimizer(model, args.muon_rate, args.adam_rate, args.decay)
    start = evaluated = time.monotonic()
    average, tokens, step = 0.0, 0, 0
    while (progress := (time.monotonic() - start) / (60 * args.minutes)) < 1:
        if progress > SNAP_AT and args.model == "hybrid":
            snap_norms(model)
        curriculum = max(progress, args.curriculum_from + (1 - args.curriculum_from) * progress)
        length = row_length(step, curriculum)
        ids, labels = batches.draw(max(1, round(TOKENS_PER_STEP / length)), length, curriculum)
        loss = loss_of(model, ids, labels)
        loss.backward()
        optimizer.step(schedule(progress))
        if args.model == "hybrid":
            forget_soon(model)
        tokens += ids.numel()
        if length == 256:
            average = loss.item() if step == 0 else 0.95 * average + 0.05 * loss.item()
        step += 1
        if step % 50 == 0:
            speed = f"{tokens / 1e6:.2f} M tokens, {tokens / (time.monotonic() - start):.0f}/s"
            print(f"step {step}  {progress:.1%}  loss {average:.4f}  {speed}", flush=True)
        if time.monotonic() - evaluated > EVALUATE_EVERY:
            evaluated = time.monotonic()
            print("  ".join(f"{task} {score:.2f}" for task, score in evaluate(model, suite).items()), flush=True)
            torch.save(model.state_dict(), args.out / "trunk.pt")
    torch.save(model.state_dict(), args.out / "trunk.pt")


def main() -> None:
    """Run the stages."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", choices=architectures.CONFIGS, required=True)
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--head-minutes", type=float, default=4, help="for the hybrid's prediction head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--muon-rate", type=float, default=0.02)
    parser.add_argument("--adam-rate", type=float, default=0.004)
    parser.add_argument("--decay", type=float, default=0.0, help="of weights, for what Muon trains")
    parser.add_argument("--resume", type=Path, help="an earlier trunk.pt, or a finished model's directory")
    parser.add_argument("--cool", type=float, default=1.0, help="divide the resumed latent model's attention logits")
    parser.add_argument("--curriculum-from", type=float, default=0.0, help="skip this share of the curriculum")
    parser.add_argument("--emphasis", action="append", default=[], metavar="KIND=FACTOR", help="such as weather=2")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    args.out.mkdir(parents=True, exist_ok=True)
    # Weights only mean something with the tokenizer they were trained with.
    beside = args.resume if args.resume is None or args.resume.is_dir() else args.resume.parent
    tokenizer = Tokenizer.from_file(str(beside / "tokenizer.json")) if beside else train_tokenizer(0)
    save_tokenizer(tokenizer, args.out, CHAT_TEMPLATE)
    fast = transformers.AutoTokenizer.from_pretrained(args.out)
    suite = {task: scoring.tokenize(fast, found) for task, found in scoring.heldout_suite(args.seed, 16).items()}
    model = architectures.build(args.model, args.seed)
    if args.resume:
        resume(model, args.resume)
        cool(model, args.cool)
    emphasis = {kind: float(factor) for kind, _, factor in (given.partition("=") for given in args.emphasis)}
    train_trunk(model, Batches(tokenizer, args.seed, emphasis), suite, args)
    print(evaluate(model, suite), flush=True)
    head = None
    if args.model == "hybrid":
        head = mtp.train_head(model, Batches(tokenizer, args.seed + 1), args.head_minutes)
    save_model(model, head, args.out)


if __name__ == "__main__":
    main()
