"""torch's scaled_dot_product_attention with block-diagonal masks by rows: any device, any type."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.attention.rows import QueryRows, by_rows
from torchlinearmoe.kernels.operator import Backend


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    grouped = k.shape[1] != q.shape[1]

    def of_rows(q: Tensor, k: Tensor, v: Tensor, ids: Tensor, key_ids: Tensor) -> Tensor:
        if rows.plain_rows and not window:
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale, enable_gqa=grouped)
        mask = _mask(ids, key_ids, window)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=grouped)

    return by_rows(of_rows, q, k, v, rows)


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
