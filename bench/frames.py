"""Frames of the random checkpoints, for formats that need them: `calibrate` on prompts of random tokens."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Final

from bench.checkpoints import checkpoint
from bench.machine import FOLDER

if TYPE_CHECKING:
    from pathlib import Path

PROMPTS: Final = 24
TOKENS: Final = 128


def frames(name: str) -> Path:
    """Return the file of a shape's frames, measured on the first call."""
    from truekv.formats.frame import save_frames
    from truekv.models.weights import Checkpoint
    from truekv.serve.progress import Bar
    from truekv.trust.calibrate import calibrate

    source = checkpoint(name)
    path = FOLDER / "checkpoints" / f"{name}.frames.safetensors"
    if path.is_file() and path.stat().st_mtime >= (source / "config.json").stat().st_mtime:
        return path
    opened = Checkpoint.open(str(source))
    vocabulary = opened.architecture.spec.vocab_size
    drawn = random.Random(0)  # noqa: S311 (a seeded prompt, not a secret)
    prompts = [[drawn.randrange(vocabulary) for _ in range(TOKENS)] for _ in range(PROMPTS)]
    with Bar(f"measuring frames of {name}") as bar:
        calibration = calibrate(
            opened.load("bfloat16"),
            prompts,
            dtype="bfloat16",
            source=name,
            weights=opened.digest,
            decode=1,
            progress=bar.update,
        )
    save_frames(path, calibration.frames, calibration.frames.provenance)
    return path
