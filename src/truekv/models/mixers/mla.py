"""Multi-head latent attention (DeepSeek-V2, section 2.1), absorbed: every head reads one shared latent row.

Shapes: T tokens, C hidden size, H heads, N content dims of a query head, R rotary dims, V value dims
of a head, L latent rank.

The textbook form expands the latent into keys and values of every head. Here the expansion moves to
the other side of the products, so memory keeps L + R numbers per token whatever H is:

    q . (U_K c) = (U_K^T q) . c          sum_i p_i (U_V c_i) = U_V (sum_i p_i c_i)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final, cast

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.spec import Field, Live, Paged
from truekv.models.blocks import RMSNorm, Shapes, linear_shapes, norm, tile_columns
from truekv.models.rotary import read_rope, yarn_mscale

if TYPE_CHECKING:
    from truekv.core.batch import Step
    from truekv.core.config import Config
    from truekv.core.ops import HeadMatrices, Matrix, Ops
    from truekv.core.protocols import LayerMemory, PagedMemory
    from truekv.core.weights import Weights
    from truekv.models.rotary import Angles, Rope

# Neither compressed norm follows rms_norm_eps: transformers builds both with this default, and a
# config that says 1e-5 (GLM-4.7-Flash) still means 1e-6 here. Small latents show the difference.
LATENT_EPS: Final = 1e-6


@dataclass(frozen=True, slots=True)
class MlaShape:
    """Sizes of one latent attention layer, before any weight is read."""

    hidden: int
    heads: int
    query_rank: int
    """Rank of the query's low-rank map; 0: one full map, no norm (DeepSeek-V2-Lite)."""
    latent: int
    content: int
    rotary: int
    value: int
    scale: float
    """What scores are multiplied by."""
    bias: bool = False
    """Whether the maps out of and back into the residual have a bias."""

    def spec(self) -> Paged:
        """Two fields: the latent serves as key and value, the rotary key is shared by all heads."""
        # Eight bits at least: the rotary key carries all positions in few dims and is not averaged away.
        rope = Field("rope", 1, self.rotary, "key", floor_bits=8)
        return Paged((Field("latent", 1, self.latent, "both"), rope))

    def tensors(self, prefix: str) -> Shapes:
        """Tensor names under `prefix` (which ends with a dot) and their shapes."""
        head = self.content + self.rotary
        if self.query_rank:
            query = {
                **linear_shapes(f"{prefix}q_a_proj", self.query_rank, self.hidden, bias=self.bias),
                f"{prefix}q_a_layernorm.weight": (self.query_rank,),
                **linear_shapes(f"{prefix}q_b_proj", self.heads * head, self.query_rank),
            }
        else:
            query = linear_shapes(f"{prefix}q_proj", self.heads * head, self.hidden)
        return {
            **query,
            **linear_shapes(f"{prefix}kv_a_proj_with_mqa", self.latent + self.rotary, self.hidden, bias=self.bias),
            f"{prefix}kv_a_layernorm.weight": (self.latent,),
            **linear_shapes(f"{prefix}kv_b_proj", self.heads * (self.content + self.value), self.latent),
            **linear_shapes(f"{prefix}o_proj", self.hidden, self.heads * self.value, bias=self.bias),
        }

    @property
    def live(self) -> Live:
        """Queries through their rank and into the latent space, the latent row, and what is read of it."""
        columns, rotary = tile_columns(self.latent), tile_columns(self.rotary)
        queries = 2 * self.query_rank + self.heads * (2 * self.content + 2 * self.rotary + self.latent)
        rows = 2 * (self.latent + self.rotary) + self.latent
        return Live(
            queries + rows + self.heads * (2 * self.latent + 2 * self.value),
            self.heads * (columns + rotary + self.latent + 2) + 3 * self.rotary,
            merged=self.heads * (columns + 2),
            group=self.heads,
        )

    def build(self, weights: Weights, prefix: str) -> Mla:
        """Compose the layer; the latent norm's weight is folded into the up-projections here, once."""
        expand, ops = weights.take(f"{prefix}kv_b_proj.weight"), weights.ops
        # In float32 and rounded once. Memory then holds unit-RMS rows, whose scale no format has to learn.
        folded = expand.float() * weights.take(f"{prefix}kv_a_layernorm.weight").float()
        folded_HEL = folded.to(expand.dtype).view(self.heads, self.content + self.value, self.latent)
        key_HNL, value_HVL = torch.split(folded_HEL, [self.content, self.value], 1)
        queries = None
        if self.query_rank:
            queries = norm(weights, f"{prefix}q_a_layernorm", LATENT_EPS), weights.linear(f"{prefix}q_b_proj")
        first = "q_a_proj" if self.query_rank else "q_proj"
        return Mla(
            self,
            ops,
            weights.linear(f"{prefix}{first}", f"{prefix}kv_a_proj_with_mqa"),
            queries,
            (ops.head_matrices(key_HNL.transpose(1, 2)), ops.head_matrices(value_HVL)),
            weights.linear(f"{prefix}o_proj"),
        )


class Mla:
    """One latent attention layer."""

    def __init__(
        self,
        shape: MlaShape,
        ops: Ops,
        inputs: Matrix,
        queries: tuple[RMSNorm, Matrix] | None,
        up: tuple[HeadMatrices, HeadMatrices],
        out: Matrix,
    ) -> None:
        """Take the map from C to the query's heads and L + R side by side.

        Or to the query's rank in their place, which `queries` norms and maps to heads. `up` is U_K^T, N -> L, and U_V,
        L -> V, the norm folded in.
        """
        self.shape = shape
        self.ops = ops
        self.inputs = inputs
        self.queries = queries
        self.key, self.value = up
        self.out = out

    def __call__(self, x_TC: torch.Tensor, memory: LayerMemory, step: Step, angles: Angles | None) -> torch.Tensor:
        """Map [T, C] to [T, C], storing one latent and one rotary row per token."""
        assert angles is not None, "latent attention always has rotary positions"
        shape = self.shape
        head = shape.content + shape.rotary
        widths = [shape.query_rank or shape.heads * head, shape.latent, shape.rotary]
        query_TE, latent_TL, key_TR = torch.split_with_sizes(self.inputs(x_TC), widths, -1)
        if self.queries is not None:
            norm, expand = self.queries
            query_TE = expand(norm(query_TE))
        query_THD = query_TE.view(len(x_TC), shape.heads, head)
        content_THN, rotary_THR = torch.split_with_sizes(query_THD, [shape.content, shape.rotary], -1)
        latent_T1L = self.ops.rms_norm(latent_TL, None, LATENT_EPS)[:, None]
        rotary_THR, key_T1R = angles.rotate(rotary_THR, key_TR[:, None])
        read_THL = cast("PagedMemory", memory).attend(
            (self.key(content_THN), rotary_THR), (latent_T1L, key_T1R), shape.scale, step
        )
        return self.out(self.value(read_THL.to(x_TC.dtype)).flatten(1))


def read_mla(config: Config, hidden: int, max_positions: int, *, interleaved: bool) -> tuple[MlaShape, Rope]:
    """Read the fields that DeepSeek's and GLM's configs share; `interleaved` says how rotary planes lie."""
    heads = config.integer("num_attention_heads")
    content, rotary = config.integer("qk_nope_head_dim"), config.integer("qk_rope_head_dim")
    rope = read_rope(config, rotary, max_positions, interleaved=interleaved)
    if rope.dim != rotary:
        raise Refused(
            f"{config.where}: partial_rotary_factor turns {rope.dim} of {rotary} rotary dimensions, "
            "but latent attention is implemented with all of them turned"
        )
    # There is no kv head but the latent row; configs keep these fields for tools that expect them.
    config.only("num_key_value_heads", heads)
    config.only("qk_head_dim", content + rotary)
    config.ignore("num_key_value_heads", "qk_head_dim", "head_dim")
    scale = (content + rotary) ** -0.5
    if rope.rope_type != "default" and rope.mscale_all_dim:
        # DeepSeek scales scores by the square of this mscale, besides YaRN's temperature in cos and sin.
        scale *= yarn_mscale(rope.factor, rope.mscale_all_dim) ** 2
    shape = MlaShape(
        hidden=hidden,
        heads=heads,
        query_rank=config.integer("q_lora_rank", 0),
        latent=config.integer("kv_lora_rank"),
        content=content,
        rotary=rotary,
        value=config.integer("v_head_dim"),
        scale=scale,
        bias=config.boolean("attention_bias", default=False),
    )
    return shape, rope
