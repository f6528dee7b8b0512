"""The table of `make mutants`: every bug, what it breaks, the test that notices it, and whether it does."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

import torch
from exact.stage import Stage
from mutants.every import MUTANTS
from mutants.mutant import noticed


def main() -> int:
    torch.set_num_threads(1)
    sound: set[tuple[object, ...]] = set()
    survived = left_out = 0
    names = max(len(mutant.name) for mutant in MUTANTS)
    tests = max(len(mutant.test_name) for mutant in MUTANTS)
    print(f"{'mutant':{names}}  {'killed by':{tests}}  killed  what it breaks")
    with tempfile.TemporaryDirectory() as directory:
        stage = Stage(Path(directory))
        for mutant in MUTANTS:
            if mutant.missing:
                left_out += 1
                print(f"{mutant.name:{names}}  {mutant.test_name:{tests}}  no run  {mutant.missing}")
                continue
            if mutant.case not in sound:
                error = mutant.without().run(stage)
                if error is not None:
                    print(f"{mutant.test_name} fails without any mutant: {error}")
                    return 1
                sound.add(mutant.case)
            killed = noticed(mutant.run(stage))
            survived += not killed
            answer = "yes" if killed else "NO"
            print(f"{mutant.name:{names}}  {mutant.test_name:{tests}}  {answer:6}  {mutant.breaks}", flush=True)
    ran = len(MUTANTS) - left_out
    print(f"{ran - survived} of {ran} mutants are killed" + (f", {left_out} cannot run here" if left_out else ""))
    return 1 if survived else 0


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
