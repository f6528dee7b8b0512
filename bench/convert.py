"""The bench's checkpoints as GGUF files, written by the converter that llama.cpp brings along."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING, Final

from bench.checkpoints import checkpoint
from bench.machine import FOLDER
from truekv.core.errors import Refused
from truekv.serve.progress import Bar

if TYPE_CHECKING:
    from pathlib import Path

SOURCES: Final = FOLDER / "llama.cpp"
"""What `make bench-peer` unpacks: the sources of llama-cpp-python, with llama.cpp's in vendor/."""
# The converter knows tokenizers by a hash of what they make of one text, and looks for a SentencePiece model first,
# which takes a package. Ours is nobody's, and is never used.
_DRIVER: Final = """
import sys
sys.path.insert(0, sys.argv.pop(1))
import convert_hf_to_gguf as converter
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "qwen2"
from conversion.qwen import Qwen2Model
Qwen2Model.set_vocab = TextModel._set_vocab_gpt2
converter.main()
"""
_FLAGS: Final = {"hybrid": ("--no-nextn",)}  # no layers that predict several tokens


def gguf(name: str) -> Path:
    """Return a shape's checkpoint as a bf16 GGUF file, converted on the first call."""
    source = checkpoint(name)
    path = FOLDER / "checkpoints" / f"{name}.gguf"
    if path.is_file() and path.stat().st_mtime >= (source / "config.json").stat().st_mtime:
        return path
    unfinished = path.with_suffix(".unfinished")
    command = [sys.executable, "-c", _DRIVER, str(SOURCES / "vendor" / "llama.cpp"), str(source), *_FLAGS.get(name, ())]
    with Bar(f"converting {name} for llama.cpp"):
        done = subprocess.run(  # noqa: S603 (our own command)
            [*command, "--outtype", "bf16", "--outfile", str(unfinished)], capture_output=True, text=True, check=False
        )
    if done.returncode:
        raise Refused(f"llama.cpp's converter could not read {source}: {done.stderr.strip().splitlines()[-1]}")
    unfinished.rename(path)
    return path
