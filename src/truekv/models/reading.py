"""What the configs of all families say in the same words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, cast

from truekv.core.errors import Refused

if TYPE_CHECKING:
    from truekv.core.config import Config

DType = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """The sizes that every decoder has."""

    hidden: int
    vocabulary: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_positions: int
    eps: float
    tied: bool
    dtype: DType

    @classmethod
    def read(cls, config: Config) -> Sizes:
        """Read them; the activation must be SiLU. Raises Refused."""
        config.only("hidden_act", "silu")
        hidden, heads = config.integer("hidden_size"), config.integer("num_attention_heads", high=4096)
        kv_heads = config.integer("num_key_value_heads", heads, high=4096)
        if heads % kv_heads:
            raise Refused(f"{config.where}: {heads} query heads cannot share {kv_heads} key/value heads evenly")
        eps = config.number("rms_norm_eps", 1e-6)
        if not 0.0 < eps < 1.0:
            raise Refused(f"{config.where}: 'rms_norm_eps' is {eps!r}, but must be between 0 and 1")
        return cls(
            hidden=hidden,
            vocabulary=config.integer("vocab_size"),
            layers=config.integer("num_hidden_layers", high=1024),
            heads=heads,
            kv_heads=kv_heads,
            head_dim=config.integer("head_dim", max(1, hidden // heads), high=4096),
            max_positions=config.integer("max_position_embeddings", high=1 << 30),
            eps=eps,
            tied=config.boolean("tie_word_embeddings", default=False),
            dtype=read_dtype(config),
        )


def read_dtype(config: Config) -> DType:
    """Read the dtype that weights are stored and computed in; bfloat16, as released, where none is named."""
    name = config.string("dtype", config.string("torch_dtype", "bfloat16"))
    if name not in ("float32", "bfloat16", "float16"):
        raise Refused(f"{config.where}: dtype is {name!r}, but must be 'float32', 'bfloat16' or 'float16'")
    return name


def layer_kinds(config: Config, count: int, default: list[str], *allowed: str) -> tuple[str, ...]:
    """Read `layer_types`: one allowed kind per layer, `default` where the config has none."""
    kinds = cast("list[object]", config.get("layer_types", default))
    if not isinstance(kinds, list) or len(kinds) != count:  # pyright: ignore[reportUnnecessaryIsInstance]
        raise Refused(f"{config.where}: 'layer_types' must list one kind for each of the {count} layers")
    for index, kind in enumerate(kinds):
        if kind not in allowed:
            expected = " or ".join(repr(item) for item in allowed)
            raise Refused(f"{config.where}: 'layer_types'[{index}] is {kind!r}, but only {expected} is implemented")
    return tuple(cast("list[str]", kinds))


def refuse_windows(config: Config, layers: int) -> None:
    """Read the sliding-window fields of the Qwen configs, which must be switched off."""
    config.only("use_sliding_window", False)  # noqa: FBT003 (a neutral value, not a switch)
    config.ignore("sliding_window", "max_window_layers")  # without effect while use_sliding_window is false
    layer_kinds(config, layers, ["full_attention"] * layers, "full_attention")
