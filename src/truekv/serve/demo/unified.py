"""The peers' page arithmetic: one page size for every layer, attention rows and recurrent states alike.

Re-expressed from vLLM 0.33's planner (platforms/interface.py and core/kv_cache_planning.py): the
attention block grows until its page holds a whole recurrent state, then every layer's page must
have that size.
"""

from __future__ import annotations

from dataclasses import dataclass


class PagesDoNotUnify(Exception):
    """The start-up failure: one layer's page does not divide the common page."""


@dataclass(frozen=True, slots=True)
class UnifiedPages:
    """What one page costs when every layer must share its size."""

    block_tokens: int
    """Tokens in an attention page once it is as large as a state."""
    page_bytes: int
    """Bytes of one page of one layer."""
    group_layers: int
    """Layers that draw pages together: the pool hands out group_layers * page_bytes at once."""
    state_groups: int

    @property
    def block_bytes(self) -> int:
        """Bytes that leave the pool for one block of one group."""
        return self.group_layers * self.page_bytes

    def request_bytes(self, tokens: int, drafts: int) -> int:
        """Bytes one request holds: its attention blocks, and 1 + drafts states per recurrent group."""
        blocks = -(-tokens // self.block_tokens) + self.state_groups * (1 + drafts)
        return blocks * self.block_bytes


def unify(
    *,
    row_bytes: int,
    native_row_bytes: int,
    state_bytes: int,
    attention_layers: int,
    recurrent_layers: int,
    pad: bool,
    align: int = 16,
) -> UnifiedPages:
    """Find the common page of a hybrid, or fail as the peers' start-up does.

    `row_bytes`: one token of one attention layer in the quantized format; `native_row_bytes`: in
    bfloat16. With `pad` False the block is sized by native rows (the release that users reported):
    a compressed page then rarely divides the state's. With `pad` True it is sized by the
    compressed rows (the later fix): it always divides, and grows as the format shrinks.
    """
    sizing = row_bytes if pad else native_row_bytes
    block_tokens = align * -(-state_bytes // (align * sizing))
    common = block_tokens * sizing
    page = block_tokens * row_bytes
    if common % page:
        raise PagesDoNotUnify(
            f"attention pages of {page:,} bytes ({block_tokens} tokens) do not divide the state's page of {common:,}"
        )
    layers = min(attention_layers, recurrent_layers)
    return UnifiedPages(block_tokens, common, layers, -(-recurrent_layers // layers))
