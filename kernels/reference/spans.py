"""Which tokens belong to which document: the host-side bookkeeping that all reference functions share."""

from collections.abc import Iterator

from torch import Tensor


def document_spans(batch: int, tokens: int, cu_seqlens: Tensor | None) -> list[tuple[int, int, int]]:
    """List (row, start, end) of every document, in the order of the states.

    Without `cu_seqlens` each of the `batch` rows is one document; with it the batch must be 1.
    """
    if cu_seqlens is None:
        return [(row, 0, tokens) for row in range(batch)]
    if batch != 1:
        raise ValueError(f"cu_seqlens: packed documents need a batch of 1, got {batch}")
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != tokens or any(b < a for a, b in zip(bounds, bounds[1:])):
        raise ValueError(f"cu_seqlens: must rise from 0 to the number of tokens {tokens}, got {bounds}")
    return [(0, start, end) for start, end in zip(bounds, bounds[1:])]


def tokens(row: int, start: int, end: int, *xs: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The tokens of a document one by one, a tuple of `x[row, t]` of every x: [B, T, ...].

    Taken apart at once: the gradients of single elements would each be as large as x.
    """
    return zip(*(x[row, start:end].unbind(0) for x in xs), strict=True)
