"""Packed documents and documents that started before their rows: grouped heads, unequal widths, windows."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate

import torch
from torch import Tensor

from cases import Case
from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention import packed_attention

SCALE = 0.31


def inputs(tokens: int, keys: int, heads: int, groups: int, width: int, value_width: int) -> dict[str, Tensor]:
    """q: [T, H, d], k: [S, G, d], v: [S, G, v], their heads outermost in memory."""
    shapes = {"q": (heads, tokens, width), "k": (groups, keys, width), "v": (groups, keys, value_width)}
    return {name: torch.randn(shape, dtype=torch.float64).transpose(0, 1) for name, shape in shapes.items()}


def packed(
    lengths: tuple[int, ...],
    row_length: int,
    heads: int = 4,
    groups: int = 2,
    width: int = 16,
    value_width: int = 16,
    window: int = 0,
) -> Case:
    """Documents of `lengths` tokens in rows of `row_length`."""
    drawn = inputs(sum(lengths), sum(lengths), heads, groups, width, value_width)
    options = {"documents": Packed(lengths, row_length), "scale": SCALE, "window": window}
    return Case("windowed" if window else "packed", call, drawn, options, channels=width)


def continued(rows: tuple[tuple[int, ...], ...], history: tuple[int, ...], window: int = 0) -> Case:
    """Rows of documents of so many tokens, the first of each with a history."""
    lengths = tuple(n for row in rows for n in row)
    documents = Packed(lengths, sum(rows[0]))
    options = {"documents": documents, "history": history, "scale": SCALE, "window": window}
    drawn = inputs(sum(lengths), sum(lengths) + sum(history), 4, 2, 16, 16)
    return Case("windowed" if window else "packed", call, drawn, options, channels=16)


@dataclass(frozen=True)
class Packed:
    """Documents on any device."""

    lengths: tuple[int, ...]
    row_length: int
    device: str = "cpu"

    def to(self, device: str) -> Packed:
        """As a tensor moves."""
        return replace(self, device=device)


def call(documents: Packed, **arguments):
    """The operator over documents on the device of the inputs."""
    borders = [0, *accumulate(documents.lengths)]
    return packed_attention(documents=Documents.packed(borders, documents.row_length, documents.device), **arguments)


CASES = [
    partial(packed, (1, 2), 3, heads=3, groups=1),
    partial(packed, (5, 1, 7), 13),
    partial(packed, (4, 4, 4), 4, heads=2, groups=2),
    partial(packed, (6, 2, 1, 7), 8, heads=3, groups=3, width=7, value_width=11),
    partial(packed, (40, 1, 55, 33, 63), 96, width=24, value_width=8),
    partial(packed, (33, 1, 62), 96, heads=3, groups=1, width=5, value_width=5),
    partial(packed, (200, 1, 55, 129, 127), 256, groups=4, width=192, value_width=128),
    partial(packed, (9, 1, 7), 17, window=2),
    partial(packed, (8, 8), 8, window=5, heads=3, groups=1, width=7),
    partial(packed, (40, 1, 55, 33, 63), 96, window=16),
    partial(packed, (200, 1, 55, 129, 127), 256, width=64, value_width=64, window=50),
    partial(continued, ((9,),), (4,)),
    partial(continued, ((72, 1, 55), (128,)), (128, 1)),
    partial(continued, ((72, 1, 55), (128,)), (49, 1), window=50),
    partial(continued, ((2, 6), (8,), (1, 1, 6)), (3, 0, 1)),
    partial(continued, ((2, 6), (8,), (1, 1, 6)), (2, 0, 1), window=3),
]
