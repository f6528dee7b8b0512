"""Released shapes of latent-attention models and Mamba-2 hybrids are understood, and without torch."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from truekv.core.config import Config
from truekv.core.errors import Refused
from truekv.core.spec import Paged, Recurrent, Stateless
from truekv.models.weights import understand

CONFIGS = Path(__file__).parents[1] / "configs"
# billions of parameters; layers with rows, with a state, with neither; bytes per token of rows at
# two bytes a number; numbers of recurrent state per sequence. The last two from research on the
# released models, counted there by hand.
RELEASED = {
    "deepseek-v2-lite": (15.706, (27, 0, 0), 27 * (512 + 64) * 2, 0),
    "glm-4.7-flash": (29.943, (47, 0, 0), 47 * (512 + 64) * 2, 0),
    "nemotron-3-nano-30b-a3b": (31.578, (6, 23, 23), 6 * 2 * 2 * 128 * 2, 23 * (64 * 64 * 128 + 3 * (64 * 64 + 2048))),
    "granite-4.0-h-tiny": (6.939, (4, 36, 0), 4 * 2 * 4 * 128 * 2, 36 * (48 * 64 * 128 + 3 * (48 * 64 + 256))),
}


def _values(name: str) -> dict[str, Any]:
    return json.loads((CONFIGS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", RELEASED)
def test_released_shapes_have_the_sizes_they_are_known_for(name: str) -> None:
    billions, kinds, row_bytes, state_numbers = RELEASED[name]
    architecture = understand(Config(_values(name)))
    parameters = sum(math.prod(shape) for shape in architecture.tensors.values())
    assert parameters / 1e9 == pytest.approx(billions, abs=1e-3)
    layers = architecture.spec.layers
    paged = [layer for layer in layers if isinstance(layer, Paged)]
    recurrent = [layer for layer in layers if isinstance(layer, Recurrent)]
    assert (len(paged), len(recurrent), sum(isinstance(layer, Stateless) for layer in layers)) == kinds
    assert sum(2 * field.heads * field.dim for layer in paged for field in layer.fields) == row_bytes
    assert sum(math.prod(slab.shape) for layer in recurrent for slab in layer.state) == state_numbers


def test_kimi_linear_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"model_type 'kimi_linear' is not implemented; truekv runs deepseek_v2, "):
        understand(Config(_values("kimi-linear-48b-a3b")))


def test_understanding_a_config_needs_no_torch() -> None:
    program = (
        "import json, sys; from truekv.core.config import Config; from truekv.models.weights import understand\n"
        "for path in sys.argv[1:]: assert understand(Config(json.load(open(path)))).tensors\n"
        "assert 'torch' not in sys.modules"
    )
    paths = [str(CONFIGS / f"{name}.json") for name in RELEASED]
    subprocess.run([sys.executable, "-c", program, *paths], check=True)
