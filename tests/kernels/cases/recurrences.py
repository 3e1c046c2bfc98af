"""What the cases of recurrences share: streams of documents, awkward ones among them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.segments import Segments

AWKWARD = (1, 63, 64, 65, 130, 0, 5, 7, 3, 0)
"""Borders on, before and after a chunk border, several documents in a chunk, documents without tokens."""
STREAMS: tuple[tuple[tuple[int, ...], str], ...] = (
    (AWKWARD, ""),
    (AWKWARD, "in out"),
    ((200,), "in"),
    ((1, 2, 17), "out"),
    ((128, 128), ""),
)
"""Lengths of documents, and whether states go in or out."""


def normal(*shape: int) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, dtype=torch.float64)


def strided(*shape: int) -> Tensor:
    """The same, not contiguous: a slice of something wider, its first two of three dims swapped in memory."""
    if len(shape) == 2:
        return normal(shape[0], shape[1] + 3)[:, 1:-2]
    wide = torch.randn(shape[1], shape[0], *shape[2:-1], shape[-1] + 3, dtype=torch.float64)
    return wide.transpose(0, 1)[..., 1:-2]


def gates(*shape: int) -> Tensor:
    """Log decays, mostly mild."""
    return F.logsigmoid(normal(*shape) + 2)


def stream(lengths: tuple[int, ...], states: str) -> dict[str, Any]:
    """The options of a call over a stream."""
    return {"segments": Segments.of_lengths(lengths), "want_final": "out" in states}
