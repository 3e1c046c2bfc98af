"""torch's scaled_dot_product_attention with a mask by positions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from torchlinearmoe.kernels.operator import Backend


def attend(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    query_positions: Tensor,
    key_positions: Tensor | None,
    scale: float,
    window: int,
) -> Tensor:
    """As `cached_attention`."""
    queries = query_positions[:, None, :, None]
    if key_positions is None:
        keys = torch.arange(k_cache.shape[1], device=q.device)
        mask = keys <= queries
    else:
        keys = key_positions[:, None, None, :]
        mask = (keys <= queries) & (keys >= 0)
    if window:
        mask = mask & (keys > queries - window)
    q, k, v = (x.transpose(1, 2) for x in (q, k_cache, v_cache))
    groups = k.shape[1] != q.shape[1]
    # cuDNN makes a new plan for every cache length, on the host, which costs more than the attention.
    with sdpa_kernel([SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale, enable_gqa=groups)
    return out.transpose(1, 2)


BACKEND = Backend("sdpa", attend, kinds=("cached_attention",), order=0)
