"""The definition: a document and a head at a time, all scores at once."""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels.attention.rows import QueryRows
from torchlinearmoe.kernels.operator import Backend


def attend(q: Tensor, k: Tensor, v: Tensor, rows: QueryRows, scale: float, window: int) -> Tensor:
    """As `packed_attention`; k and v have the keys of `rows`."""
    pieces, seen = (borders.diff().tolist() for borders in rows.borders)
    documents = zip(q.split(pieces), k.split(seen), v.split(seen))
    return torch.cat([_document(*document, scale, window) for document in documents])


def _document(q: Tensor, k: Tensor, v: Tensor, scale: float, window: int) -> Tensor:
    """q: [t, H, d], the last queries of a document with keys k: [s, G, d] and values v: [s, G, v]."""
    times = q.shape[1] // k.shape[1]
    query = torch.arange(k.shape[0] - q.shape[0], k.shape[0], device=q.device)[:, None]
    key = torch.arange(k.shape[0], device=q.device)
    sees = (key <= query) & (key > query - (window or k.shape[0]))
    heads = []
    for h in range(q.shape[1]):
        scores = scale * q[:, h] @ k[:, h // times].T
        heads.append(scores.masked_fill(~sees, -torch.inf).softmax(-1) @ v[:, h // times])
    return torch.stack(heads, 1)


BACKEND = Backend("reference", attend, kinds=("packed", "windowed"))
