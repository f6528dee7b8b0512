"""Qwen3: grouped-query attention with normalised queries and keys, and a gated MLP."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from truekv.models.decoder import DecoderShape, LayerShape
from truekv.models.ffn import MlpShape
from truekv.models.mixers.gqa import GqaShape
from truekv.models.reading import Sizes, refuse_windows
from truekv.models.rotary import read_rope

if TYPE_CHECKING:
    from truekv.core.config import Config
    from truekv.core.protocols import Family


class Qwen3:
    """Qwen3ForCausalLM."""

    model_types = ("qwen3",)

    def read(self, config: Config) -> DecoderShape:
        """Understand the config of a released dense Qwen3."""
        sizes = Sizes.read(config)
        refuse_windows(config, sizes.layers)
        bias = config.boolean("attention_bias", default=False)
        attention = GqaShape(
            sizes.hidden,
            sizes.heads,
            sizes.kv_heads,
            sizes.head_dim,
            bias=bias,
            out_bias=bias,
            head_norm=True,
            eps=sizes.eps,
        )
        mlp = MlpShape(sizes.hidden, config.integer("intermediate_size"))
        rope = read_rope(config, sizes.head_dim, sizes.max_positions)
        config.close()
        return DecoderShape.of("qwen3", sizes, (LayerShape("self_attn", attention, mlp),) * sizes.layers, rope)


FAMILY: Final[Family] = Qwen3()
