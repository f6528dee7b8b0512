"""Llama and Qwen2: grouped-query attention and a gated MLP; Qwen2 has biases on q, k and v."""

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


class Llama:
    """LlamaForCausalLM and Qwen2ForCausalLM."""

    model_types = ("llama", "qwen2")

    def read(self, config: Config) -> DecoderShape:
        """Understand the config of a released Llama 2/3 or Qwen2/2.5."""
        sizes = Sizes.read(config)
        bias, out_bias, mlp_bias = True, False, False
        if config.string("model_type") == "qwen2":
            refuse_windows(config, sizes.layers)
        else:
            bias = out_bias = config.boolean("attention_bias", default=False)
            mlp_bias = config.boolean("mlp_bias", default=False)
        attention = GqaShape(
            sizes.hidden, sizes.heads, sizes.kv_heads, sizes.head_dim, bias=bias, out_bias=out_bias, eps=sizes.eps
        )
        mlp = MlpShape(sizes.hidden, config.integer("intermediate_size"), bias=mlp_bias)
        rope = read_rope(config, sizes.head_dim, sizes.max_positions)
        config.close()
        return DecoderShape.of("llama", sizes, (LayerShape("self_attn", attention, mlp),) * sizes.layers, rope)


FAMILY: Final[Family] = Llama()
