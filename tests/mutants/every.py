"""All mutants, those of one test together."""

from typing import Final

from mutants import device, engine, layers, memory

MUTANTS: Final = tuple(
    sorted((*memory.MUTANTS, *layers.MUTANTS, *engine.MUTANTS, *device.MUTANTS), key=lambda mutant: mutant.test_name)
)
