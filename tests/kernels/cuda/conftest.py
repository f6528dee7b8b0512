"""What Triton's interpreter needs, which frames queries and merges spans here too."""

from kernels.triton.conftest import _infinities_are_numbers

__all__ = ["_infinities_are_numbers"]
