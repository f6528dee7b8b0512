"""Rows in pages: write a step's rows, then attend to everything stored. The same op serves GQA and MLA.

Legend: B rows of the batch, T new tokens, Q longest chunk, W pages in the table, P tokens a page,
H query heads, K kv heads, G = H / K query heads per kv head, M = G * Q rounded up to TILE,
L blocks read at once, S keys of one block, D dim of a key row, V dim of a value row.

Every result depends on nothing but its own row: keys are taken in blocks that start at fixed
positions, so the sums run in one order whatever the chunking, the companions or the table's width.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from truekv.core.errors import Refused
from truekv.core.lazy import torch
from truekv.core.recording import is_recording

if TYPE_CHECKING:
    from collections.abc import Sequence as Seq

    from truekv.core.batch import Step
    from truekv.core.protocols import CacheFormat, Stored
    from truekv.core.spec import Paged

# A matrix product of very few rows takes another path through the BLAS, with other rounding; with
# the query rows padded to a multiple of this, one token alone and the same token in a chunk agree.
TILE = 16
BLOCK = 128
"""Keys of one softmax block; fixed, because it fixes the order of every sum."""
# Scores held at once, to bound what long contexts and long chunks materialise (16 MiB).
_SCORES = 1 << 22


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


def more_scored_than_two(layer: Paged, backend: str) -> str | None:
    """Return why a backend that scores up to two fields, a latent first, cannot run a layer, or None."""
    scored = [item.role for item in layer.fields if item.role != "value"]
    if len(scored) > 2 or "both" in scored[1:]:
        return (
            f"the {backend} attend scores one or two fields, a latent first, not {len(scored)}; "
            "use the reference backend"
        )
    return None


def store(fields: tuple[Stored, ...], rows: tuple[torch.Tensor, ...], step: Step) -> None:
    """Take each field's rows [T, K, D] into its frame, encode them and write row t to line `step.line[t]` of its page.

    A row that is not finite raises Corrupted, or is stored as NaN where the step is being recorded. Tokens of line -1
    belong to nobody: their rows go to the last line of a page that nobody reads.
    """
    for stored, rows_TKD in zip(fields, rows, strict=True):
        _store(stored, rows_TKD, step)


def _store(stored: Stored, rows_THD: torch.Tensor, step: Step) -> None:
    framed = stored.frame.rows(rows_THD)
    if is_recording():
        broken = ~torch.isfinite(framed).all(-1, keepdim=True)
        # All bits set are NaN in every format, as number or as scale.
        encoded = stored.format.encode(framed.masked_fill(broken, 0.0)).masked_fill(broken, 0xFF)
    else:
        encoded = stored.format.encode(framed)
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
    """Causal attention of the step's queries over stored rows, in float32; frames are the kernel's affair.

    `queries`: [T, H, D] for each field of role "key" or "both", in the order of `fields`; their
    scores add up. A query at position p sees the keys at positions p - window + 1 ... p. Returns
    [T, H, V] in the dtype of the queries.
    """
    scored = [item for item in fields if item.field.role in {"key", "both"}]
    value = next(item for item in fields if item.field.role in {"value", "both"})
    heads, device = value.field.heads, step.position.device
    batch, longest = step.gather.shape
    group = queries[0].shape[1] // heads
    framed = [item.frame.query(query) for query, item in zip(queries, scored, strict=True)]
    q_BK1MD = [_by_kv_head(query, heads, step)[:, :, None] for query in framed]
    query_position = step.position[:, None] + torch.arange(longest, device=device)
    position_B1M1 = _padded(query_position.repeat(1, group), dim=1)[:, None, :, None]
    end_B111 = (step.position + step.count)[:, None, None, None]

    size = (batch, heads, q_BK1MD[0].shape[3])
    highest_BKM = torch.full(size, -torch.inf, device=device)
    total_BKM = torch.zeros(size, device=device)
    mean_BKMV = torch.zeros(*size, value.field.dim, device=device)
    blocks = max(1, _SCORES // (highest_BKM.numel() * BLOCK))
    for start, pages_BP in _spans(step.pages, blocks, value.page_tokens):
        rows = {item.field.name: _read(item, pages_BP) for item in fields}
        count = pages_BP.shape[1] * value.page_tokens // BLOCK
        key_position_L1S = start + torch.arange(count * BLOCK, device=device).view(count, 1, BLOCK)
        seen_BLMS = key_position_L1S <= position_B1M1
        if window is not None:
            seen_BLMS &= key_position_L1S > position_B1M1 - window
        written_BL1S = key_position_L1S < end_B111
        score_BKLMS = torch.zeros((), device=device)
        for q, item in zip(q_BK1MD, scored, strict=True):
            score_BKLMS = score_BKLMS + q @ rows[item.field.name].transpose(-1, -2)
        # Lines that nobody wrote may hold anything, NaN included: replaced, not multiplied by zero.
        score_BKLMS = (score_BKLMS * scale).masked_fill(~(seen_BLMS & written_BL1S)[:, None], -torch.inf)
        v_BKLSV = rows[value.field.name].masked_fill(~written_BL1S.transpose(2, 3)[:, None], 0.0)

        top_BKLM = score_BKLMS.amax(-1)
        weight_BKLMS = torch.exp(score_BKLMS - _finite(top_BKLM)[..., None])
        sum_BKLM = weight_BKLMS.sum(-1)
        weighted_BKLMV = weight_BKLMS @ v_BKLSV
        # One block after the other, so that the order does not depend on how many are read at once.
        for top, part, weighted in zip(top_BKLM.unbind(2), sum_BKLM.unbind(2), weighted_BKLMV.unbind(2), strict=True):
            raised_BKM = torch.maximum(highest_BKM, top)
            old, new = torch.exp(highest_BKM - _finite(raised_BKM)), torch.exp(top - _finite(raised_BKM))
            total_BKM = total_BKM * old + part * new
            mean_BKMV = mean_BKMV * old[..., None] + weighted * new[..., None]
            highest_BKM = raised_BKM
    # A row without tokens sees nothing, and weighs nothing.
    total_BKM = total_BKM.masked_fill(total_BKM == 0, 1.0)
    out_BKMV = (mean_BKMV / total_BKM[..., None])[:, :, : group * longest]
    out_BQKGV = out_BKMV.reshape(batch, heads, group, longest, value.field.dim).permute(0, 3, 1, 2, 4)
    out_THV = out_BQKGV[step.owner, step.offset].flatten(1, 2)
    return value.frame.output(out_THV).to(queries[0].dtype)


def _finite(top: torch.Tensor) -> torch.Tensor:
    """Replace the maximum of no keys, -inf, by 0: inf - inf is not a number."""
    return top.masked_fill(top == -torch.inf, 0.0)


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


def _spans(pages_BW: torch.Tensor, blocks: int, page_tokens: int) -> list[tuple[int, torch.Tensor]]:
    """Cut a page table into (first position, pages of up to so many blocks); the last block repeats its last page."""
    per_block = BLOCK // page_tokens
    width = pages_BW.shape[1]
    padded = torch.cat([pages_BW, pages_BW[:, -1:].expand(-1, -width % per_block)], 1)
    step = blocks * per_block
    return [(start * page_tokens, padded[:, start : start + step]) for start in range(0, width, step)]


def _read(stored: Stored, pages_BP: torch.Tensor) -> torch.Tensor:
    """Decode the rows of some pages to float32 [B, K, L, S, D]."""
    data = torch.cat([plane[pages_BP].transpose(1, 2).flatten(2, 3) for plane in planes(stored)], -1)
    blocks = data.view(*data.shape[:2], -1, BLOCK, data.shape[-1])
    return stored.format.decode(blocks, stored.field.dim)
