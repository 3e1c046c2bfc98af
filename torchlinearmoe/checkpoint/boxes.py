"""Tensors put together from boxes of other tensors.

A `Copy` says that a box of a target is a box of a source. A list of them describes a whole tensor, and any box of it
can be read without reading the rest: a rank reads what its shard touches, a conversion one expert at a time.

    experts.gate_up [E, D, 2F]     expert 1's gate_proj [F, D] is the transpose of the box [1:2, :, :F]
    k_proj of 4 heads from 2       rows of head 3 are the source's rows of head 1
    convs.q.weight [C, W]          the first C rows of the source's conv1d.weight [3 C, 1, W]
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Index = tuple[int, ...]
"""A start or a shape, one number a dim."""
Read = Callable[[str, Index, Index], Tensor]
"""`read(name, start, shape)`: a box of a source tensor."""
Axes = tuple[int | None, ...]
"""For each dim of a source the dim of the target that it is, None for a dim of one; the target's other dims are of
one."""
EXPERT: Axes = (2, 1)
"""A matrix of which a stack of experts holds the transpose, [1, in, out]."""


@dataclass(frozen=True)
class Copy:
    """The box of a target at `start`, of `shape`, is the box of the tensor `source` at `source_start`."""

    source: str
    start: Index
    shape: Index
    source_start: Index
    axes: Axes | None = None
    """Where the dims are not the same ones in the same order."""

    @property
    def source_shape(self) -> Index:
        """Shape of the box in the source."""
        return self._in_source(self.shape, 1)

    @property
    def source_stop(self) -> Index:
        """Where the box in the source ends."""
        return tuple(a + n for a, n in zip(self.source_start, self.source_shape, strict=True))

    def part(self, start: Index, shape: Index) -> Copy | None:
        """What of it lies in the box of the target at `start`, of `shape`; None for nothing."""
        low = tuple(map(max, self.start, start))
        high = tuple(min(a + n, b + m) for a, n, b, m in zip(self.start, self.shape, start, shape, strict=True))
        size = tuple(h - l for l, h in zip(low, high))
        if any(n <= 0 for n in size):
            return None
        inside = self._in_source(tuple(l - a for l, a in zip(low, self.start)), 0)
        source_start = tuple(a + b for a, b in zip(self.source_start, inside, strict=True))
        return Copy(self.source, low, size, source_start, self.axes)

    def to_target(self, values: Tensor) -> Tensor:
        """The box of the source as the target has it."""
        if self.axes is None:
            return values
        named = [axis for axis in self.axes if axis is not None]
        bare = values.reshape([self.shape[axis] for axis in named])
        return bare.permute(sorted(range(len(named)), key=named.__getitem__)).reshape(self.shape)

    def to_source(self, box: Tensor) -> Tensor:
        """The inverse: the box of the target as the source has it."""
        if self.axes is None:
            return box
        named = [axis for axis in self.axes if axis is not None]
        rest = [axis for axis in range(box.dim()) if axis not in named]
        return box.permute(*rest, *named).reshape(self.source_shape)

    def _in_source(self, index: Index, absent: int) -> Index:
        """An index of the target's dims by the source's, `absent` in its dims of one."""
        if self.axes is None:
            return index
        return tuple(absent if axis is None else index[axis] for axis in self.axes)


def read_box(copies: Sequence[Copy], start: Index, shape: Index, dtype: torch.dtype, read: Read) -> Tensor:
    """The box at `start`, of `shape`, of the tensor that `copies` describe; every element must be covered."""
    box = torch.empty(shape, dtype=dtype)
    covered = 0
    for part in filter(None, (copy.part(start, shape) for copy in copies)):
        values = read(part.source, part.source_start, part.source_shape)
        box[slices(tuple(p - s for p, s in zip(part.start, start)), part.shape)] = part.to_target(values)
        covered += values.numel()
    assert covered == box.numel(), "the copies leave a hole"
    return box


def whole(source: str, shape: Sequence[int]) -> Copy:
    """The whole of a tensor of the same shape."""
    zeros = (0,) * len(shape)
    return Copy(source, zeros, tuple(shape), zeros)


def cut(start: Index, shape: Index, limit: int) -> list[tuple[Index, Index]]:
    """A box in pieces along dim 0, (start, shape) each, of at most `limit` elements or one index."""
    step = max(limit // max(math.prod(shape[1:]), 1), 1)
    if not shape or shape[0] <= step:
        return [(start, shape)]
    (first, *rest), (length, *others) = start, shape
    return [((first + low, *rest), (min(step, length - low), *others)) for low in range(0, length, step)]


def extents(copies: Iterable[Copy]) -> dict[str, Index]:
    """Shape of every source of which `copies` are all boxes, by name."""
    shapes: dict[str, Index] = {}
    for copy in copies:
        known = shapes.get(copy.source, copy.source_stop)
        shapes[copy.source] = tuple(map(max, known, copy.source_stop))
    return shapes


def slices(start: Index, shape: Index) -> tuple[slice, ...]:
    """The box as an index."""
    return tuple(slice(s, s + n) for s, n in zip(start, shape))
