"""A stream cut into chunks of 64 tokens, each segment beginning a chunk of its own, so that no chunk needs a mask.

    borders  0 70 70 134     chunks   0..64 64..70 | 70..134 | nothing ...        T = 134, N = 3
    first    0 2 2 3                  segment 0      segment 2

There are as many places for chunks as a stream of T tokens in N segments can have at most, T / 64 + N; those left over
hold no tokens. So no shape depends on where the borders lie, and nothing waits for the device.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.segments import Segments

CHUNK = 64


@dataclass(frozen=True)
class ChunkTable:
    """M places for chunks of N segments, in the order of the tokens."""

    start_M: Tensor
    """int32: the first token of each chunk."""
    end_M: Tensor
    """int32: one past its last token."""
    segment_M: Tensor
    """int32: the segment that it is of."""
    first_N1: Tensor
    """int32 [N + 1]: the first chunk of each segment, and how many chunks there are."""


def table_of(segments: Segments) -> ChunkTable:
    """The table of a stream, made once a stream."""
    return segments.view("table", _table)


def _table(segments: Segments) -> ChunkTable:
    borders = segments.borders
    places = segments.tokens // CHUNK + segments.count
    chunks_N = (borders.diff() + CHUNK - 1) // CHUNK
    first_N1 = F.pad(chunks_N.cumsum(0), (1, 0)).to(torch.int32)
    place_M = torch.arange(places, dtype=torch.int32, device=borders.device)
    segment_M = (torch.searchsorted(first_N1, place_M, right=True) - 1).clamp(max=segments.count - 1)
    start_M = borders[segment_M] + (place_M - first_N1[segment_M]) * CHUNK
    end_M = torch.minimum(start_M + CHUNK, borders[segment_M + 1])
    unused_M = place_M >= first_N1[-1]
    start_M, end_M = (torch.where(unused_M, borders[-1], x).to(torch.int32) for x in (start_M, end_M))
    return ChunkTable(start_M, end_M, segment_M.to(torch.int32), first_N1)
