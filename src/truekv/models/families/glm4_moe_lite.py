"""GLM-4.7-Flash: DeepSeek-V3's layers with a list of which of them mix experts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Final, cast

from truekv.core.errors import Refused
from truekv.models.families.deepseek import read_latent_decoder, read_sigmoid_routing
from truekv.models.reading import Sizes

if TYPE_CHECKING:
    from truekv.core.config import Config
    from truekv.core.protocols import Family
    from truekv.models.decoder import DecoderShape


class Glm4MoeLite:
    """Glm4MoeLiteForCausalLM."""

    model_types = ("glm4_moe_lite",)

    def read(self, config: Config) -> DecoderShape:
        """Understand the config of a released GLM-4.7-Flash."""
        sizes = Sizes.read(config)
        return read_latent_decoder(
            config,
            "glm4_moe_lite",
            sizes,
            _read_sparse(config, sizes.layers),
            read_sigmoid_routing(config),
            interleaved=config.boolean("rope_interleave", default=True),
            drafts=config.integer("num_nextn_predict_layers", 0, low=0, high=16),
        )


def _read_sparse(config: Config, layers: int) -> list[bool]:
    """Read which layers mix experts: `mlp_layer_types`, or the older count of dense first layers."""
    dense = config.integer("first_k_dense_replace", 1, low=0, high=1024)
    usual = ["sparse" if index >= dense else "dense" for index in range(layers)]
    kinds = cast("list[object]", config.get("mlp_layer_types", usual))
    named = isinstance(kinds, list) and len(kinds) == layers  # pyright: ignore[reportUnnecessaryIsInstance] (JSON)
    if not named or not {"dense", "sparse"}.issuperset(map(str, kinds)):
        raise Refused(f"{config.where}: 'mlp_layer_types' must say 'dense' or 'sparse' for each of the {layers} layers")
    return [kind == "sparse" for kind in kinds]


FAMILY: Final[Family] = Glm4MoeLite()
