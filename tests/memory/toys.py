"""Layers without a model around them: inputs are looked up by token, so any schedule compares with any other.

Shape suffixes: T tokens, F numbers of output per token, N vocabulary.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch

from truekv.core.batch import Chunk, Sequence, Step
from truekv.core.spec import Field, LayerSpec, ModelSpec, Paged, Recurrent, Slab, Stateless
from truekv.formats.choice import codecs
from truekv.kernels.table import select
from truekv.memory.arena import Arena
from truekv.memory.plan import MemoryPlan, plan

if TYPE_CHECKING:
    from truekv.core.protocols import CacheFormat

VOCABULARY = 64


def gqa(heads: int = 2, dim: int = 16, window: int | None = None) -> Paged:
    return Paged((Field("k", heads, dim, "key"), Field("v", heads, dim, "value")), window)


def mla(latent: int = 32, rope: int = 16) -> Paged:
    return Paged((Field("latent", 1, latent, "both"), Field("rope", 1, rope, "key", floor_bits=8)))


def gdn(key_heads: int = 2, value_heads: int = 4, key_dim: int = 8, value_dim: int = 12, taps: int = 4) -> Recurrent:
    channels = 2 * key_heads * key_dim + value_heads * value_dim
    return Recurrent(
        "gdn",
        (("key_heads", key_heads), ("value_heads", value_heads)),
        (Slab("state", (value_heads, key_dim, value_dim), "float32"), Slab("conv", (channels, taps - 1), "model")),
        (
            Slab("conv", (channels,), "model"),
            Slab("beta", (value_heads,), "float32"),
            Slab("decay", (value_heads,), "float32"),
        ),
    )


def mamba2(heads: int = 4, head_dim: int = 6, groups: int = 2, size: int = 8, taps: int = 4) -> Recurrent:
    channels = heads * head_dim + 2 * groups * size
    return Recurrent(
        "mamba2",
        (("heads", heads), ("groups", groups)),
        (Slab("state", (heads, head_dim, size), "float32"), Slab("conv", (channels, taps - 1), "model")),
        (Slab("conv", (channels,), "model"), Slab("dt", (heads,), "float32")),
    )


HYBRID = (gdn(), gqa(), Stateless(), mamba2(), mla(), gqa(window=20))


def model_spec(
    layers: tuple[LayerSpec, ...], draft_layers: tuple[LayerSpec, ...] = (), positions: int = 4096
) -> ModelSpec:
    return ModelSpec("toy", 16, VOCABULARY, positions, "float32", layers, draft_layers)


def formats_of(layers: tuple[LayerSpec, ...], name: str = "f32") -> tuple[tuple[CacheFormat, ...], ...]:
    """One format everywhere; fields that need more bits than it has are stored in int8."""
    known = codecs()
    return tuple(
        tuple(known[name] if known[name].code_bits >= field.floor_bits else known["int8"] for field in layer.fields)
        if isinstance(layer, Paged)
        else ()
        for layer in layers
    )


def make_arena(
    layers: tuple[LayerSpec, ...] = HYBRID,
    format_name: str = "f32",
    *,
    poison: bool = True,
    backend: str = "auto",
    interval: int | None = None,
    device: str = "cpu",
    **planned: Any,
) -> Arena:
    spec = model_spec(layers)
    formats = formats_of(layers, format_name)
    settings: dict[str, Any] = {"max_num_seqs": 3, "max_model_len": 320, "drafts": 0} | planned
    kernels = select(spec, formats, backend=backend, device=device)
    planned_memory = make_plan(layers, format_name, **settings)
    return Arena(spec, planned_memory, kernels, poison=poison, prefix_interval=interval, device=device)


def make_plan(layers: tuple[LayerSpec, ...], format_name: str = "f32", **settings: Any) -> MemoryPlan:
    return plan(model_spec(layers), formats_of(layers, format_name), **settings)


class Toy:
    """Runs every layer of a spec on inputs that depend on the token and on nothing else."""

    def __init__(self, layers: tuple[LayerSpec, ...] = HYBRID, *, query_groups: int = 2, seed: int = 0) -> None:
        self.layers = layers
        self.groups = query_groups
        make = torch.Generator().manual_seed(seed)

        def rows(*shape: int) -> torch.Tensor:
            return torch.randn(VOCABULARY, *shape, generator=make)

        self.tables: list[dict[str, torch.Tensor]] = []
        self.weights: list[dict[str, torch.Tensor]] = []
        for layer in layers:
            weights: dict[str, torch.Tensor] = {}
            table: dict[str, torch.Tensor] = {}
            if isinstance(layer, Paged):
                for field in layer.fields:
                    table[field.name] = rows(field.heads, field.dim)
                    if field.role != "value":
                        table[f"q.{field.name}"] = rows(field.heads * query_groups, field.dim)
            elif isinstance(layer, Recurrent):
                channels = layer.log[0].shape[0]
                weights["conv"] = torch.randn(channels, layer.state[1].shape[1] + 1, generator=make)
                table["conv"] = rows(channels)
                heads = layer.state[0].shape[0]
                if layer.rule == "gdn":
                    table |= {"beta": rows(heads).sigmoid(), "decay": -rows(heads).abs()}
                else:
                    table |= {"dt": rows(heads).abs()}
                    weights |= {
                        "conv_bias": torch.randn(channels, generator=make),
                        "A": -torch.rand(heads, generator=make),
                        "D": torch.randn(heads, generator=make),
                    }
            self.tables.append(table)
            self.weights.append(weights)

    def forward(self, step: Step, memory: tuple[Any, ...]) -> torch.Tensor:
        """Return [T, F]: the outputs of all layers side by side."""
        out: list[torch.Tensor] = []
        for layer, table, weights, held in zip(self.layers, self.tables, self.weights, memory, strict=True):
            new = {name: values[step.tokens] for name, values in table.items()}
            if isinstance(layer, Paged):
                rows = tuple(new[field.name] for field in layer.fields)
                queries = tuple(new[f"q.{field.name}"] for field in layer.fields if field.role != "value")
                out.append(held.attend(queries, rows, 0.3, step))
            elif isinstance(layer, Recurrent):
                out.append(held.scan(new, weights, step))
        return torch.cat([values.flatten(1) for values in out], 1)

    def run(self, arena: Arena, *chunks: Chunk) -> list[torch.Tensor]:
        """Run one step and return each chunk's outputs; the caller advances."""
        out = self.forward(arena.reserve(chunks), arena.layers)
        assert torch.isfinite(out).all()
        return list(out.split([len(chunk.tokens) for chunk in chunks]))

    def feed(self, arena: Arena, sequence: Sequence, tokens: list[int]) -> torch.Tensor:
        """Run certain tokens of one sequence and make them real."""
        (out,) = self.run(arena, Chunk(sequence, tokens))
        arena.advance(sequence, len(tokens))
        return out

    @functools.lru_cache(maxsize=4096)  # noqa: B019 (toys live as long as their test)
    def plain(self, tokens: tuple[int, ...], format_name: str = "f32") -> torch.Tensor:
        """Return the outputs of all tokens in one shot: fresh memory, no drafts, no companions, no poison."""
        arena = make_arena(self.layers, format_name, poison=False, max_num_seqs=1)
        return self.feed(arena, arena.open(), list(tokens))


def random_tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCABULARY, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def states(arena: Arena, sequence: Sequence) -> list[torch.Tensor]:
    """The recurrent state of a sequence in every layer."""
    return [slab[sequence.slot] for layer in arena._states() for slab in layer.state.values()]
