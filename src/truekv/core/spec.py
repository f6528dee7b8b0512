"""What a checkpoint is, and what each of its layers has to remember."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Field:
    """One thing a paged layer remembers per token: `heads` rows of `dim` numbers.

    A field of role "key" is scored against a query, a "value" field is averaged by the
    attention weights, and "both" does both (the MLA latent).
    """

    name: str
    heads: int
    dim: int
    role: Literal["key", "value", "both"]
    floor_bits: int = 0
    """No format with fewer code bits may store it (8 for the MLA rotary key)."""


@dataclass(frozen=True, slots=True)
class Paged:
    """A layer that appends one row per token and field, and reads all of them.

    GQA has fields (k: key, v: value); MLA has fields (latent: both, rope: key).
    """

    fields: tuple[Field, ...]
    window: int | None = None


@dataclass(frozen=True, slots=True)
class Slab:
    """A named tensor of fixed shape inside a state slot or a replay-log entry."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["float32", "model"]


@dataclass(frozen=True, slots=True)
class Recurrent:
    """A layer that overwrites one state per sequence, and can replay the tokens of its log.

    `rule` names the scan kernel (kernels/reference/<rule>.py); `sizes` are its dimensions.
    `log` holds what the rule needs of one token to fold it into the state later.
    """

    rule: str
    sizes: tuple[tuple[str, int], ...]
    state: tuple[Slab, ...]
    log: tuple[Slab, ...]

    def size(self, name: str) -> int:
        """Return one dimension of the rule by name."""
        return dict(self.sizes)[name]


@dataclass(frozen=True, slots=True)
class Stateless:
    """A layer that remembers nothing (an MLP or MoE block that stands alone)."""


LayerSpec = Paged | Recurrent | Stateless


@dataclass(frozen=True, slots=True)
class Live:
    """Most numbers that one token has on a device at once while half a layer computes, beside its residuals.

    An upper bound for kernels that fuse what comes after a product; the specification's in torch make more.
    """

    model: int
    """In the compute dtype."""
    single: int
    """In float32."""
    places: bool = False
    """Whether accepted drafts that are replayed have them too."""
    merged: int = 0
    """Attention: in float32, for every span of keys that is summed apart."""
    group: int = 1
    """Attention: query heads that share a kv head."""


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """All that the rest of the house may know of a checkpoint."""

    family: str
    hidden_size: int
    vocab_size: int
    max_positions: int
    dtype: Literal["float32", "bfloat16", "float16"]
    layers: tuple[LayerSpec, ...]
    draft_layers: tuple[LayerSpec, ...] = ()
    """Layers of the multi-token-prediction head, with rows of their own in the same plan."""
    kv_format: str | None = None
    """The KV format that the checkpoint itself declares, if any."""

    @property
    def hybrid(self) -> bool:
        """Whether some layers are recurrent and others paged."""
        return len({type(layer) for layer in self.layers} - {Stateless}) > 1
