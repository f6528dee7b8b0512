"""Quantize and dequantize what the caches would hold, inside the models of transformers.

Only the evaluation uses this: it shows what each scheme does to the answers, independently of the engine's own code.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Final

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

FP8_MAX: Final = 448.0
Codec = Callable[[Tensor], Tensor]


def q4_0(x: Tensor) -> Tensor:
    """Four bits in blocks of 32 with one scale each, zero in the middle: the format of llama.cpp."""
    blocks = x.unflatten(-1, (-1, 32))
    extreme = blocks.gather(-1, blocks.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).half().float()
    codes = (blocks / torch.where(scale == 0, 1, scale)).round().clamp(-8, 7)
    return (codes * scale).flatten(-2)


def fp8(x: Tensor, scale: float = 1.0) -> Tensor:
    """Float8 (e4m3) with one scale for everything; what lies beyond its range is clipped."""
    return (x / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).to(x.dtype) * scale


def symmetric(x: Tensor, bits: int) -> Tensor:
    """Integers with one scale per row."""
    top = 2 ** (bits - 1) - 1
    scale = x.abs().amax(-1, keepdim=True).clamp_min(1e-12) / top
    return (x / scale).round().clamp(-top, top) * scale


def hadamard(size: int, seed: int = 0) -> Tensor:
    """Orthonormal Hadamard matrix of a power of two, its rows' signs drawn at random."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    signs = torch.randint(0, 2, (size, 1), generator=torch.Generator().manual_seed(seed)) * 2 - 1
    return signs * matrix / size**0.5


def rotated(codec: Codec) -> Codec:
    """Apply a codec in a random Hadamard basis."""

    def apply(x: Tensor) -> Tensor:
        basis = hadamard(x.shape[-1])
        return codec(x @ basis) @ basis.T

    return apply


class Equalised:
    """Centre and scale each channel as calibration found it, then apply a codec in a rotated basis."""

    def __init__(self, codec: Codec, sample: Tensor) -> None:
        """Measure the channels of a sample of shape [batch, heads, positions, features]."""
        self._codec = rotated(codec)
        self._mean = sample.mean((0, 2), keepdim=True)
        self._scale = (sample - self._mean).square().mean((0, 2), keepdim=True).sqrt().clamp_min(1e-6)

    def __call__(self, x: Tensor) -> Tensor:
        """Round trip."""
        return self._codec((x - self._mean) / self._scale) * self._scale + self._mean


CacheHook = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@contextmanager
def cache_hook(model: Any, hook: CacheHook) -> Iterator[None]:  # noqa: ANN401
    """Pass each layer's cached pair (keys and values, or latent and rotary key) through a hook."""
    if hasattr(model.config, "kv_lora_rank"):
        with _latent_hook(model, hook):
            yield
        return

    def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        return sdpa_attention_forward(module, query, *hook(module.layer_idx, key, value), *args, **kwargs)

    ALL_ATTENTION_FUNCTIONS.register("sdpa", attend)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register("sdpa", sdpa_attention_forward)


@contextmanager
def _latent_hook(model: Any, hook: CacheHook) -> Iterator[None]:  # noqa: ANN401
    layers = [layer.self_attn for layer in model.model.layers]
    for layer in layers:
        layer.expand_kv = lambda latent, key, layer=layer: type(layer).expand_kv(
            layer, *hook(layer.layer_idx, latent, key)
        )
    try:
        yield
    finally:
        for layer in layers:
            del layer.expand_kv


@torch.no_grad()
def sample_cache(model: Any, rows: Tensor) -> dict[int, tuple[Tensor, Tensor]]:  # noqa: ANN401
    """Collect what each layer would cache for rows of calibration text."""
    found: dict[int, tuple[Tensor, Tensor]] = {}

    def keep(layer: int, first: Tensor, second: Tensor) -> tuple[Tensor, Tensor]:
        found[layer] = first.clone(), second.clone()
        return first, second

    with cache_hook(model, keep):
        model(input_ids=rows)
    return found


def schemes(sample: dict[int, tuple[Tensor, Tensor]]) -> dict[str, CacheHook]:
    """Return the schemes that the evaluation compares, calibrated on a sample."""
    top = max(first.abs().max().item() for first, _ in sample.values())
    calibrated = {
        layer: tuple(Equalised(lambda x: symmetric(x, 4), part) for part in pair) for layer, pair in sample.items()
    }
    uniform: dict[str, tuple[Codec, Codec]] = {
        "plain q4_0": (q4_0, q4_0),
        "fp8, scale 1": (fp8, fp8),
        "fp8, first part's scale": (lambda x: fp8(x, top / FP8_MAX), lambda x: fp8(x, top / FP8_MAX)),
        "int8 rotated": (rotated(lambda x: symmetric(x, 8)), rotated(lambda x: symmetric(x, 8))),
        "int4 rotated": (rotated(lambda x: symmetric(x, 4)), rotated(lambda x: symmetric(x, 4))),
    }
    hooks: dict[str, CacheHook] = {
        name: (lambda _, first, second, pair=pair: (pair[0](first), pair[1](second))) for name, pair in uniform.items()
    }
    hooks["int4 centred, scaled, rotated"] = lambda layer, first, second: (
        calibrated[layer][0](first),
        calibrated[layer][1](second),
    )
    return hooks
