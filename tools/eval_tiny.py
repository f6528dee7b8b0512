"""Held-out accuracy of the shipped models, by greedy decoding, and under fake cache quantizers.

Run ``PYTHONPATH=src python tools/eval_tiny.py src/truekv/tiny/hybrid --count 200``.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from tiny_training import scoring
from tiny_training.fake_quantization import cache_hook, sample_cache, schemes

from truekv.tiny import tasks

CALIBRATION_PROMPTS = 16
SCENARIOS = 20


def load(directory: Path) -> tuple[Any, Any]:
    """Load a model in float32, and its tokenizer."""
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(directory)


def heldout(model: Any, tokenizer: Any, args: argparse.Namespace) -> dict[str, float]:  # noqa: ANN401
    """Score the held-out suite and the scenarios."""
    examples = scoring.heldout_suite(args.seed, args.count)
    scenarios = tasks.scenarios(args.seed, SCENARIOS)
    if args.forced:
        examples["scenarios"] = scoring.scenario_examples(scenarios)
    chosen = args.tasks or examples
    suite = {task: scoring.tokenize(tokenizer, found) for task, found in examples.items() if task in chosen}
    if args.forced:
        return {task: scoring.teacher_forced(scoring.model_forward(model), found) for task, found in suite.items()}
    scores = {task: scoring.greedy(model, tokenizer, found) for task, found in suite.items()}
    if "scenarios" in (args.tasks or ["scenarios"]):
        scores["scenarios"] = scoring.scenario_score(model, tokenizer, scenarios)
    return scores


def under_quantizers(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    score: Callable[[], dict[str, float]],
) -> dict[str, dict[str, float]]:
    """Score under each scheme that the cache might be stored in."""
    prompts = tasks.calibration_prompts(0, CALIBRATION_PROMPTS)
    rows = [tokenizer.apply_chat_template(prompt, return_dict=False) for prompt in prompts]
    length = min(map(len, rows))
    sample = sample_cache(model, torch.tensor([row[-length:] for row in rows]))
    results = {"none": score()}
    for name, hook in schemes(sample).items():
        with cache_hook(model, hook):
            results[name] = score()
    return results


def main() -> None:
    """Evaluate and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("--tasks", nargs="*", help="only these columns of the table")
    parser.add_argument("--count", type=int, default=200, help="examples of each task")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--forced", action="store_true", help="one forward pass per batch instead of decoding")
    parser.add_argument("--quantizers", action="store_true", help="compare cache formats, by forced scoring")
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    args.forced |= args.quantizers
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args.model)

    def score() -> dict[str, float]:
        return heldout(model, tokenizer, args)

    results = under_quantizers(model, tokenizer, score) if args.quantizers else {"none": score()}
    if args.json:
        print(json.dumps(results, indent=2))
        return
    columns = list(results["none"])
    print(f"{'cache':32}" + "".join(f"{column:>13}" for column in columns))
    for name, scores in results.items():
        print(f"{name:32}" + "".join(f"{scores[column]:>13.1%}" for column in columns))


if __name__ == "__main__":
    main()
