"""Rows in pages: write a step's rows, then attend to everything stored. The same op serves GQA and MLA.

Legend: B rows of the batch, T new tokens, Q longest chunk, W pages in the table, P tokens a page,
H query heads, K kv heads, G = H / K query heads per kv head, M = G * Q rounded up to TILE,
S keys of one block, D dim of a key row, V dim of a value row.

Every result depends on nothing but its own row: keys are taken in blocks that start at fixed
positions, so the sums run in one order whatever the chunking, the companions or the table's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.core.lazy import torch

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Paged

# A matrix product of very few rows takes another path through the BLAS, with other rounding; with
# the query rows padded to a multiple of this, one token alone and the same token in a chunk agree.
TILE = 16
BLOCK = 128
"""Keys per step of the softmax; fixed, because it fixes the order of every sum."""


def refusal(layer: Paged, formats: Seq[CacheFormat]) -> str | None:
    """Return why a layer cannot run here, or None: any head dim that its codecs can hold runs."""
    for item, chosen in zip(layer.fields, formats, strict=True):
        try:
            chosen.planes(item.dim)
        except Refused as reason:
            return f"attend has no rows of {item.dim} for the field '{item.name}' in {chosen.name}: {reason}"
    heads = {item.heads for item in layer.fields}
    values = [item for item in layer.fields if item.role in {"value", "both"}]
    if len(heads) != 1 or len(values) != 1:
        names = ", ".join(f"{item.name}: {item.role}, {item.heads} heads" for item in layer.fields)
        return f"attend needs fields of one head count with exactly one value field, not ({names}); use transformers"
    return None


def store(stored: Stored, rows_THD: torch.Tensor, step: Step) -> None:
    """Encode [T, K, D] and write row t to line `step.line[t]` of page `step.page[t]`."""
    encoded = stored.format.encode(rows_THD.float())
    start = 0
    for plane in planes(stored):
        width = plane.shape[-1]
        plane[step.page, :, step.line] = encoded[..., start : start + width]
        start += width


def planes(stored: Stored) -> list[torch.Tensor]:
    """Return the field's planes as uint8 views [pages, K, P, bytes of a row in the plane] of its page tensor."""
    data, tokens = stored.data, stored.page_tokens
    start = data.storage_offset() + stored.start
    views: list[torch.Tensor] = []
    for width in stored.format.planes(stored.field.dim):
        size = (data.shape[0], stored.field.heads, tokens, width)
        views.append(data.as_strided(size, (data.stride(0), stored.head_bytes, width, 1), start))
        start += tokens * width
    return views


def attend(
    queries: tuple[torch.Tensor, ...], fields: tuple[Stored, ...], scale: float, window: int | None, step: Step
) -> torch.Tensor:
    """Causal attention of the step's queries over stored rows, in float32.

    `queries`: [T, H, D] for each field of role "key" or "both", in the order of `fields`; their
    scores add up. A query at position p sees the keys at positions p - window + 1 ... p. Returns
    [T, H, V] in the dtype of the queries.
    """
    scored = [item for item in fields if item.field.role in {"key", "both"}]
    value = next(item for item in fields if item.field.role in {"value", "both"})
    heads = value.field.heads
    batch, longest = step.gather.shape
    group = queries[0].shape[1] // heads
    q_BKMD = [_by_kv_head(query, heads, step) for query in queries]
    query_position = step.position[:, None] + torch.arange(longest, device=step.position.device)
    position_BM1 = _padded(query_position.repeat(1, group), dim=1)[..., None]
    end_B11 = (step.position + step.count)[:, None, None]

    size = (batch, heads, q_BKMD[0].shape[2])
    highest_BKM = torch.full(size, -torch.inf, device=step.position.device)
    total_BKM = torch.zeros_like(highest_BKM)
    mean_BKMV = torch.zeros(*size, value.field.dim, device=step.position.device)
    for start, pages_BW in _blocks(step.pages, value.page_tokens):
        rows = {item.field.name: _read(item, pages_BW) for item in fields}
        key_position = start + torch.arange(rows[value.field.name].shape[2], device=step.position.device)
        seen_BMS = key_position <= position_BM1
        if window is not None:
            seen_BMS &= key_position > position_BM1 - window
        written_B1S = key_position < end_B11
        score_BKMS = torch.zeros((), device=step.position.device)
        for q, item in zip(q_BKMD, scored, strict=True):
            score_BKMS = score_BKMS + q @ rows[item.field.name].transpose(-1, -2)
        # Lines that nobody wrote may hold anything, NaN included: replaced, not multiplied by zero.
        score_BKMS = (score_BKMS * scale).masked_fill(~(seen_BMS & written_B1S)[:, None], -torch.inf)
        v_BKSV = rows[value.field.name].masked_fill(~written_B1S[..., None], 0.0)

        raised_BKM = torch.maximum(highest_BKM, score_BKMS.amax(-1))
        # While a query has seen no key its maximum is -inf, and inf - inf is not a number.
        finite_BKM = raised_BKM.masked_fill(raised_BKM == -torch.inf, 0.0)
        weight_BKMS = torch.exp(score_BKMS - finite_BKM[..., None])
        shrink_BKM = torch.exp(highest_BKM - finite_BKM)
        total_BKM = total_BKM * shrink_BKM + weight_BKMS.sum(-1)
        mean_BKMV = mean_BKMV * shrink_BKM[..., None] + weight_BKMS @ v_BKSV
        highest_BKM = raised_BKM
    out_BKMV = (mean_BKMV / total_BKM[..., None])[:, :, : group * longest]
    out_BQKGV = out_BKMV.reshape(batch, heads, group, longest, value.field.dim).permute(0, 3, 1, 2, 4)
    return out_BQKGV[step.owner, step.offset].flatten(1, 2).to(queries[0].dtype)


def _by_kv_head(q_THD: torch.Tensor, heads: int, step: Step) -> torch.Tensor:
    """Return [B, K, M, D]: the queries of one kv head as the rows of one matrix."""
    q_BQHD = q_THD.float()[step.gather]
    q_BQKGD = q_BQHD.reshape(*q_BQHD.shape[:2], heads, -1, q_BQHD.shape[-1])
    return _padded(q_BQKGD.permute(0, 2, 3, 1, 4).flatten(2, 3), dim=2)


def _padded(x: torch.Tensor, dim: int) -> torch.Tensor:
    missing = -x.shape[dim] % TILE
    shape = list(x.shape)
    shape[dim] = missing
    return torch.cat([x, x.new_zeros(shape)], dim)


def _blocks(pages_BW: torch.Tensor, page_tokens: int) -> list[tuple[int, torch.Tensor]]:
    """Cut a page table into (first position, pages [B, BLOCK / P]); the last block repeats its last page."""
    per_block = BLOCK // page_tokens
    width = pages_BW.shape[1]
    missing = -width % per_block
    padded = torch.cat([pages_BW, pages_BW[:, -1:].expand(-1, missing)], 1)
    return [(start * page_tokens, padded[:, start : start + per_block]) for start in range(0, width, per_block)]


def _read(stored: Stored, pages_BW: torch.Tensor) -> torch.Tensor:
    """Decode the rows of some pages to float32 [B, K, S, D]."""
    data = [plane[pages_BW].transpose(1, 2).flatten(2, 3) for plane in planes(stored)]
    return stored.format.decode(torch.cat(data, -1), stored.field.dim)
