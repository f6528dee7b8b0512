"""Qwen3.5 and 3.6, dense and mixture: the text half of the multimodal checkpoints, or text alone."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Final

from truekv.core.errors import Refused
from truekv.models.families.qwen3_next import read_hybrid, read_mixture
from truekv.models.ffn import MlpShape
from truekv.models.reading import Sizes

if TYPE_CHECKING:
    from truekv.core.config import Config
    from truekv.core.protocols import Family
    from truekv.models.decoder import DecoderShape

WRAPPED: Final = "model.language_model."


class Qwen35:
    """Qwen3_5(Moe)ForCausalLM, and Qwen3_5(Moe)ForConditionalGeneration without its images."""

    model_types = ("qwen3_5", "qwen3_5_text", "qwen3_5_moe", "qwen3_5_moe_text")

    def read(self, config: Config) -> DecoderShape:
        """Understand a text config, or the wrapper that nests one."""
        if config.string("model_type").endswith("_text"):
            # Text saved out of a wrapper keeps the wrapper's names.
            return _read_text(config, ("model.", WRAPPED))
        return _read_wrapper(config)


def _read_wrapper(config: Config) -> DecoderShape:
    text = config.nested("text_config")
    if "tie_word_embeddings" in config:
        tied = config.boolean("tie_word_embeddings")
        if text.boolean("tie_word_embeddings", default=tied) != tied:
            raise Refused(f"{config.where}: 'tie_word_embeddings' of the model and of its text_config contradict")
        text.values["tie_word_embeddings"] = tied
    if "dtype" in config and "dtype" not in text:
        text.values["dtype"] = config.string("dtype")
    config.ignore("vision_config", *(f"{what}_token_id" for what in ("image", "video", "vision_start", "vision_end")))
    config.close()
    shape = _read_text(text, (WRAPPED,))
    return dataclasses.replace(shape, ignored=(*shape.ignored, r"model\.visual\..*"))


def _read_text(config: Config, prefixes: tuple[str, ...]) -> DecoderShape:
    sizes = Sizes.read(config)
    if "num_experts" in config:
        # These routers always normalise, and every layer has experts.
        config.only("norm_topk_prob", True)  # noqa: FBT003 (a neutral value, not a switch)
        config.only("mlp_only_layers", [])
        config.ignore("intermediate_size")
        mixture = read_mixture(config, sizes.hidden, normalised=True)
        return read_hybrid(config, "qwen3_5_moe", sizes, [mixture] * sizes.layers, packed=False, prefixes=prefixes)
    mlp = MlpShape(sizes.hidden, config.integer("intermediate_size"))
    return read_hybrid(config, "qwen3_5", sizes, [mlp] * sizes.layers, packed=False, prefixes=prefixes)


FAMILY: Final[Family] = Qwen35()
