"""What all definitions share: a stream taken apart into its documents and tokens.

A definition computes an operator token by token in plain PyTorch, for any dtype. Nothing in one is fast and nothing is
clever: every other backend is tested against it, and a reader who wants to know what an operator computes reads it
first. Definitions also serve as the backend "reference".
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate

from torch import Tensor

from torchlinearmoe.segments import Segments


def documents_of(segments: Segments) -> list[tuple[int, int]]:
    """(first token, one past the last) of every segment, in the order of the states."""
    ends = list(accumulate(segments.host_lengths()))
    return list(zip([0, *ends[:-1]], ends, strict=True))


def tokens_of(start: int, end: int, *xs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tokens of a document one by one, a tuple of `x[t]` of every x: [T, ...].

    Taken apart at once: the gradients of single elements would each be as large as x.
    """
    return zip(*(x[start:end].unbind(0) for x in xs), strict=True)
