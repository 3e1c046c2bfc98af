"""Packed rows cut over the ranks of a context-parallel group: which documents pass from rank to rank.

Every rank takes one contiguous span of each row, and one flat stream of its spans of all rows. Three ranks, one row:

    row            a a a a | a a a a | a b b c          a, b, c: tokens of three documents
    rank           0         1         2
    enters         .         a         a                the span begins inside a document
    through        .         x         .                ... and ends inside the same one
    last count     4         4         1                tokens of the document that the span ends with

What the ranks hand on belongs to the document that a span ends with, and what a rank takes in goes to the document its
span begins with. All of it is known on every rank's host, since each knows the borders of the whole rows.

Letters: W ranks, R rows, L tokens of a span, T = R L tokens of this rank, N documents in this rank's stream.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, ClassVar, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class Exchange:
    """How ranks exchange what passes between their spans."""

    states: torch.dtype | None = None
    """The type in which states travel; None for the one that they have, float32."""
    attention: str = "auto"
    """Softmax attention's way: `gather`, `heads`, or `auto` for heads where the key-value heads divide and no window
    makes the gather small."""


@dataclass(frozen=True, eq=False)
class Spans:
    """This rank's spans and their neighbours."""

    group: dist.ProcessGroup
    rank: int
    size: int
    """W."""
    rows: int
    length: int
    """L."""
    exchange: Exchange
    whole_borders: tuple[int, ...]
    """Where documents start in the stream of whole rows."""
    borders: tuple[int, ...]
    """Where documents start in this rank's stream, 0 .. T: the pieces of documents that its spans hold."""
    history: tuple[int, ...]
    """Tokens of the document that each row's span begins with, on earlier ranks."""
    earliest: int
    """The first rank from which any document reaches into this one's spans; `rank` where none does."""
    positions: Tensor
    """int64 [T]: the place of each token in its document, counted from the document's very first token."""
    crossed: bool
    """Some document goes on from one rank to the next."""
    passed: bool
    """Some document passes through all of a rank's span, from the rank before to the one after."""
    first_R: Tensor
    """int64: the document, among this rank's N, that each row's span begins with."""
    last_R: Tensor
    """int64: the document that it ends with."""
    enters_R: Tensor
    """bool: the span begins inside a document."""
    through_WR: Tensor
    """bool: the span of that rank begins and ends inside the same document."""
    reaches_WR: Tensor
    """bool: the document that the span of that rank ends with is the one that this rank's begins with."""
    last_count_WR: Tensor | None
    """int64: tokens of the document that the span of that rank ends with; None where a rank knows only its own."""
    routed: ClassVar[bool] = False
    """Spans of any length, which only the device knows."""
    cache: dict[str, Any] = field(default_factory=dict)
    """What layers have in common, made when the first one asks."""

    def by_heads(self, kv_heads: int, window: int = 0) -> bool:
        """Whether softmax attention with so many key-value heads on this rank trades spans for heads."""
        if self.exchange.attention != "auto":
            return self.exchange.attention == "heads"
        return kv_heads % self.size == 0 and not self.one_rank_back(window)

    def one_rank_back(self, window: int) -> bool:
        """A window of so many tokens, 0 for none, that reaches no further than the rank before."""
        return 0 < window <= self.length + 1

    def in_first(self, ids: Tensor) -> Tensor:
        """bool [T]: tokens of the document that their row's span begins with; ids: [T]."""
        return self._cached("in_first", lambda: ids == self.first_R.to(ids.dtype)[self.row_T])

    def in_last(self, ids: Tensor) -> Tensor:
        """bool [T]: tokens of the document that their row's span ends with."""
        return self._cached("in_last", lambda: ids == self.last_R.to(ids.dtype)[self.row_T])

    @property
    def row_T(self) -> Tensor:
        """int64 [T]: the row of each token."""
        return self._cached(
            "row_T", lambda: torch.arange(self.positions.shape[0], device=self.positions.device) // self.length
        )

    @property
    def starts_R1(self) -> Tensor:
        """int64 [R + 1]: where the spans of the rows start in the stream, and its end."""
        device = self.positions.device
        return self._cached("starts_R1", lambda: torch.arange(self.rows + 1, device=device) * self.length)

    def row_lengths(self) -> list[tuple[int, ...]]:
        """Of each row, the tokens of the pieces of documents in its span."""
        edges = [bisect_left(self.borders, row * self.length) for row in range(self.rows + 1)]
        pieces = [end - start for start, end in pairwise(self.borders)]
        return [tuple(pieces[start:end]) for start, end in pairwise(edges)]

    def by_row(self, x: Tensor) -> Tensor:
        """[T, ...] -> [R, L, ...], zeros after a span that is shorter."""
        return x.unflatten(0, (self.rows, self.length))

    def in_stream(self, x: Tensor) -> Tensor:
        """The inverse of `by_row`."""
        return x.flatten(0, 1)

    def _cached(self, key: str, make: Callable[[], T]) -> T:
        if key not in self.cache:
            self.cache[key] = make()
        return self.cache[key]


def cut_spans(
    cu_seqlens: Sequence[int],
    row_length: int,
    group: dist.ProcessGroup,
    device: torch.device | str = "cpu",
    exchange: Exchange | None = None,
) -> Spans:
    """This rank's spans of rows of `row_length` tokens whose documents start at `cu_seqlens`, 0 .. all tokens.

    Raises ValueError where the ranks do not divide the rows.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    borders, rows, length = list(cu_seqlens), cu_seqlens[-1] // row_length, row_length // size
    if row_length % size:
        raise ValueError(f"rows of {row_length} tokens: {size} context-parallel ranks must divide them")
    starts = set(borders)
    begin = [[row * row_length + w * length for row in range(rows)] for w in range(size)]
    # The start of the document of a span's first token, and of its last one.
    first = [[borders[bisect_right(borders, b) - 1] for b in line] for line in begin]
    last = [[borders[bisect_left(borders, b + length) - 1] for b in line] for line in begin]
    enters = [[b not in starts for b in line] for line in begin]
    through = [[e and x < b for e, x, b in zip(*lines)] for lines in zip(enters, last, begin)]
    counts = [[b + length - max(x, b) for x, b in zip(*lines)] for lines in zip(last, begin)]
    reaches = [
        [w < rank and enters[rank][row] and last[w][row] == first[rank][row] for row in range(rows)]
        for w in range(size)
    ]
    local, offsets, first_documents, last_documents = [], [], [], []
    for row, b in enumerate(begin[rank]):
        first_documents.append(len(local))
        inside = borders[bisect_right(borders, b) : bisect_left(borders, b + length)]
        pieces = [row * length + x - b for x in (b, *inside)]
        local += pieces
        offsets += [pieces[0] - (b - first[rank][row]), *pieces[1:]]
        last_documents.append(len(local) - 1)
    local.append(rows * length)
    parts = [[*local], offsets, first_documents, last_documents, enters[rank], sum(through, []), sum(reaches, [])]
    parts.append(sum(counts, []))
    host = torch.tensor([int(x) for part in parts for x in part])
    if torch.device(device).type == "cuda":
        host = host.pin_memory()
    on_device = host.to(device, non_blocking=True).split([len(part) for part in parts])
    pieces_N1, offset_N, first_R, last_R, enters_R, through_WR, reaches_WR, counts_WR = on_device
    of_token = torch.repeat_interleave(offset_N, pieces_N1.diff(), output_size=local[-1])
    reaching = [w for w in range(size) if any(reaches[w])]
    return Spans(
        group=group,
        rank=rank,
        size=size,
        rows=rows,
        length=length,
        exchange=exchange or Exchange(),
        whole_borders=tuple(borders),
        borders=tuple(local),
        history=tuple(b - x for x, b in zip(first[rank], begin[rank])),
        earliest=min(reaching, default=rank),
        positions=torch.arange(local[-1], device=device) - of_token,
        crossed=any(map(any, enters)),
        passed=any(t and e for lines in zip(through, enters[1:]) for t, e in zip(*lines)),
        first_R=first_R,
        last_R=last_R,
        enters_R=enters_R.bool(),
        through_WR=through_WR.bool().view(size, rows),
        reaches_WR=reaches_WR.bool().view(size, rows),
        last_count_WR=counts_WR.view(size, rows),
    )
