"""Tensors put together from boxes of other tensors.

A `Copy` says that a box of a target is a box of a source. A list of them describes a whole tensor, and any box of it
can be read without reading the rest: a rank reads what its shard touches, a conversion one expert at a time.

    experts.gate_up [E, D, 2F]     expert 1's gate_proj [F, D] is the transpose of the box [1:2, :, :F]
    k_proj of 4 heads from 2       rows of head 3 are the source's rows of head 1
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[int, ...]
"""A start or a shape, one number a dim."""
Read = Callable[[str, Index, Index], Tensor]
"""`read(name, start, shape)`: a box of a source tensor."""


@dataclass(frozen=True)
class Copy:
    """The box of a target at `start`, of `shape`, is the box of the tensor `source` at `source_start`."""

    source: str
    start: Index
    shape: Index
    source_start: Index
    expert: bool = False
    """The source is a matrix and the box [1, in, out] of a stack of experts holds its transpose."""

    @property
    def source_shape(self) -> Index:
        """Shape of the box in the source."""
        return self.shape[:0:-1] if self.expert else self.shape

    def part(self, start: Index, shape: Index) -> Copy | None:
        """What of it lies in the box of the target at `start`, of `shape`; None for nothing."""
        low = tuple(map(max, self.start, start))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, start, shape, strict=True))
        size = tuple(h - l for l, h in zip(low, high))
        if any(n <= 0 for n in size):
            return None
        inside = tuple(l - a for l, a in zip(low, self.start))
        if self.expert:
            inside = inside[:0:-1]
        return Copy(self.source, low, size, tuple(a + b for a, b in zip(self.source_start, inside)), self.expert)


def read_box(copies: Sequence[Copy], start: Index, shape: Index, dtype: torch.dtype, read: Read) -> Tensor:
    """The box at `start`, of `shape`, of the tensor that `copies` describe; every element must be covered."""
    box = torch.empty(shape, dtype=dtype)
    covered = 0
    for part in filter(None, (copy.part(start, shape) for copy in copies)):
        values = read(part.source, part.source_start, part.source_shape)
        if part.expert:
            values = values.t().unsqueeze(0)
        box[slices(tuple(p - s for p, s in zip(part.start, start)), part.shape)] = values
        covered += values.numel()
    assert covered == box.numel(), "the copies leave a hole"
    return box


def whole(source: str, shape: Sequence[int]) -> Copy:
    """The whole of a tensor of the same shape."""
    zeros = (0,) * len(shape)
    return Copy(source, zeros, tuple(shape), zeros)


def slices(start: Index, shape: Index) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(s, s + n) for s, n in zip(start, shape))
