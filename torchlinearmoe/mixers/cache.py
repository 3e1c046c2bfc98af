"""A cache of one entry a token, as softmax mixers keep it while decoding: [B, room, ...] a part, written in place.

Shapes: T tokens, B sequences, M tokens of the longest context.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.mixers.base import Context, State


def append_to_cache(state: State, context: Context, **new: Tensor) -> list[Tensor]:
    """Write the new tokens' parts [T, ...] into the state, and read each back as [B, M, ...], in the given order."""
    ids = context.documents.ids.long()
    for name, part in new.items():
        state[name][ids, context.positions] = part.to(state[name].dtype)
    return [state[name][:, : context.history].to(part.dtype) for name, part in new.items()]


def padded_queries(q: Tensor, context: Context) -> tuple[Tensor, Tensor]:
    """Packed queries [T, ...] as rows [B, L, ...] and their positions [B, L]; padding asks at position 0."""
    documents = context.documents
    ids, batch, longest = documents.ids.long(), len(documents.lengths), max(documents.lengths)
    rows = q.new_zeros(batch, longest, *q.shape[1:])
    positions = torch.zeros(batch, longest, dtype=torch.long, device=q.device)
    rows[ids, documents.positions] = q
    positions[ids, documents.positions] = context.positions
    return rows, positions
