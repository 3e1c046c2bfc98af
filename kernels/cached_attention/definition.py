"""The definition: a query at a time, over the keys that it sees."""

from __future__ import annotations

import torch
from torch import Tensor

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
    (batch, tokens, heads, _), times = q.shape, q.shape[2] // k_cache.shape[2]
    out = [[[q.new_empty(0)] * heads for _ in range(tokens)] for _ in range(batch)]
    for b in range(batch):
        held = range(k_cache.shape[1]) if key_positions is None else key_positions[b].tolist()
        for t in range(tokens):
            own = int(query_positions[b, t])
            seen = [s for s, p in enumerate(held) if 0 <= p <= own and (not window or p > own - window)]
            for h in range(heads):
                scores = scale * k_cache[b, seen, h // times] @ q[b, t, h]
                out[b][t][h] = scores.softmax(0) @ v_cache[b, seen, h // times]
    return torch.stack([torch.stack([torch.stack(row) for row in rows]) for rows in out])


BACKEND = Backend("reference", attend, kinds=("cached_attention",))
