"""torch's scaled_dot_product_attention: any device, any type.

Short rows at once, under masks by rows; of long ones a document after the other, whose queries come in pieces where the
document goes on from earlier keys or has a window. No mask is of more than 4096 x 4096 pairs a row.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.rows import QueryRows, by_rows
from torchlinearmoe.kernels.operator import Backend

MASKED = 4096
"""Queries and keys of the largest mask, MASKED of each or as many pairs."""


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    grouped = k.shape[1] != q.shape[1]

    def of_rows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, key_ids: Tensor) -> Tensor:
        if rows.plain_rows and not window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        mask = _mask(ids, key_ids, window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)

    keys = rows.row_length + max(rows.history)
    if (rows.plain_rows and not window) or rows.row_length * keys <= MASKED**2:
        return by_rows(of_rows, q, k, v, rows)
    queries, keys = rows.lengths
    documents = zip(q.split(queries), k.split(keys), v.split(keys))
    return torch.cat([piece for document in documents for piece in _pieces(*document, scale, window)])


def _pieces(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Iterator[Tensor]:
    """The output of a document, [t, H, v] a piece; q: [t, H, d], the last queries of k: [s, G, d] and v: [s, G, v]."""
    grouped, (count, keys) = k.shape[1] != q.shape[1], (q.shape[0], k.shape[0])
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    window = window or keys
    if count == keys <= window:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        yield out.squeeze(0).transpose(0, 1)
        return
    # A piece of n queries sees n - 1 keys more than its first one, which sees `reach` at most.
    reach = min(window, keys)
    step = max(1, min(MASKED // 2, MASKED**2 // (2 * reach)))
    for start in range(0, count, step):
        stop = min(start + step, count)
        first, last = max(0, keys - count + start + 1 - window), keys - count + stop
        query = torch.arange(keys - count + start, last, device=q.device)[:, None]
        key = torch.arange(first, last, device=q.device)
        mask = (key <= query) & (key > query - window)
        asked, keyed, valued = q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last]
        out = F.scaled_dot_product_attention(asked, keyed, valued, attn_mask=mask, scale=scale, enable_gqa=grouped)
        yield out.squeeze(0).transpose(0, 1)


def _mask(ids: Tensor, key_ids: Tensor, window: int) -> Tensor:
    """bool [R, 1, L, M]: key s is in query t's document, not after it and in its window; the last L keys are theirs.

    ids: [R, L]; key_ids: [R, M].
    """
    earlier = key_ids.shape[1] - ids.shape[1]
    causal = torch.ones(ids.shape[1], key_ids.shape[1], dtype=torch.bool, device=ids.device).tril(earlier)
    if window:
        causal = causal.triu(earlier + 1 - window)
    return ((ids[:, :, None] == key_ids[:, None, :]) & causal)[:, None]


BACKEND = Backend(
    "sdpa",
    attend,
    kinds=("packed", "windowed"),
    order=0,
    kept=(
        "aten::_scaled_dot_product_flash_attention",
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_efficient_attention",
        "aten::_scaled_dot_product_cudnn_attention",
    ),
)
