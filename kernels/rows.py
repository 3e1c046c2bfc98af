"""Segments as other people's kernels want them: on the host, without empty ones, or as rows of a batch.

Ours read ids, borders or tables on the device, whatever their number. Theirs read borders on the host too; where only
the device knows them that waits, once for all layers that share the segments. Segments of one length become plain rows,
which need no borders at all.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from torchlinearmoe.segments import Segments


@dataclass(frozen=True)
class Rows:
    """The segments that have tokens: their number is N'."""

    lengths: tuple[int, ...]
    """Tokens of each."""
    borders: Tensor
    """int64 [N' + 1] on the device."""
    borders_host: Tensor
    kept: Tensor | None
    """int64 [N']: their places among all N segments; None when all have tokens."""
    count: int
    """N."""

    @property
    def even(self) -> bool:
        """All have one length."""
        return len(set(self.lengths)) == 1

    def split(self, x: Tensor) -> Tensor:
        """[T, ...] to [N', L, ...], L the longest, zeros after the shorter ones."""
        if self.even:
            return x.unflatten(0, (len(self.lengths), self.lengths[0]))
        return torch.nn.utils.rnn.pad_sequence(list(x.split(list(self.lengths))), batch_first=True)

    def join(self, x: Tensor) -> Tensor:
        """The inverse of `split`."""
        if self.even:
            return x.flatten(0, 1)
        return torch.cat([row[:length] for row, length in zip(x, self.lengths)])

    def select(self, state: Tensor) -> Tensor:
        """States of all segments, [N, ...], to those of the segments with tokens."""
        return state if self.kept is None else state.index_select(0, self.kept)

    def restore(self, final: Tensor, initial: Tensor | None) -> Tensor:
        """The inverse of `select`: a segment without tokens ends with the state it started with."""
        if self.kept is None:
            return final
        before = final.new_zeros(self.count, *final.shape[1:]) if initial is None else initial.to(final.dtype)
        return before.index_copy(0, self.kept, final)


def rows_of(segments: Segments) -> Rows:
    """The rows of a stream, made once a stream."""
    return segments.view("rows", _rows)


def _rows(segments: Segments) -> Rows:
    lengths, device = segments.host_lengths(), segments.ids.device
    filled = tuple(length for length in lengths if length)
    host = F.pad(torch.tensor(filled, dtype=torch.int64, device="cpu").cumsum(0), (1, 0))
    kept = None
    if len(filled) < len(lengths):
        kept = torch.tensor([n for n, length in enumerate(lengths) if length], dtype=torch.int64, device=device)
    return Rows(filled, host.to(device), host, kept, len(lengths))
