"""Spans of the rows that a router made of a rank's tokens: one span for every memory and row.

A token becomes several rows of a stream sorted by memory, then by time (`mixers/mom.py`). What memory m was given of a
row is a span of its own, of any length from 0 to L, and a document hands on a state for every memory. Where documents
begin and end is the same for all memories; how many of their tokens a memory was given, each rank knows of its own.

    two rows of one document each, M = 2       row 0: memories 0 1 0      row 1: memories 1 1 0
    stream, sorted by memory                   0 0 | 0 | 1 | 1 1
    (memory, row)                              0,0  0,1  1,0  1,1         M R = 4 spans
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.spans import Spans


@dataclass(frozen=True, eq=False, kw_only=True)
class RoutedSpans(Spans):
    """Spans of M R rows; `length` bounds them."""

    routed: ClassVar[bool] = True
    token_rows_T: Tensor
    starts: Tensor
    """int64 [M R + 1]"""

    @property
    def row_T(self) -> Tensor:
        return self.token_rows_T

    @property
    def starts_R1(self) -> Tensor:
        return self.starts

    def by_row(self, x: Tensor) -> Tensor:
        slots = x.new_zeros(self.rows * self.length, *x.shape[1:]).index_copy(0, self._places_T, x)
        return slots.unflatten(0, (self.rows, self.length))

    def in_stream(self, x: Tensor) -> Tensor:
        return x.flatten(0, 1).index_select(0, self._places_T)

    @property
    def _places_T(self) -> Tensor:
        """Where each token lies in rows of L slots."""
        within = torch.arange(self.token_rows_T.shape[0], device=self.starts.device) - self.starts[self.token_rows_T]
        return self._cached("places_T", lambda: self.token_rows_T * self.length + within)


def route_spans(spans: Spans, tokens_T: Tensor, memories_T: Tensor, num_memories: int, num_documents: int) -> Spans:
    """The spans of a stream whose row t is token `tokens_T[t]` of this rank in memory `memories_T[t]`, sorted.

    Document n of this rank in memory m is number m * num_documents + n of the stream.
    """
    rows = num_memories * spans.rows
    row_T = memories_T * spans.rows + tokens_T // spans.length
    counts = torch.zeros(rows, dtype=torch.int64, device=row_T.device).scatter_add_(0, row_T, torch.ones_like(row_T))
    offsets = torch.arange(num_memories, device=row_T.device).unsqueeze(1) * num_documents
    same: dict[str, Any] = {entry.name: getattr(spans, entry.name) for entry in dataclasses.fields(spans)}
    return RoutedSpans(
        **same
        | {
            "rows": rows,
            "first_R": (offsets + spans.first_R).flatten(),
            "last_R": (offsets + spans.last_R).flatten(),
            "enters_R": spans.enters_R.repeat(num_memories),
            "through_WR": spans.through_WR.repeat(1, num_memories),
            "reaches_WR": spans.reaches_WR.repeat(1, num_memories),
            "last_count_WR": None,
            "cache": {},
        },
        token_rows_T=row_T,
        starts=F.pad(counts.cumsum(0), (1, 0)),
    )
