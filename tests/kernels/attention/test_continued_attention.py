"""Rows whose first documents started before them, against the documents in one piece."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention import packed_attention

SCALE = 0.31


def _inputs(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    return [torch.randn(tokens, heads, 6, generator=generator, dtype=torch.float64) for heads in (4, 2, 2)]


def _continued(qkv: list[Tensor], lengths: tuple[int, ...], row: int, skip: int, window: int) -> Tensor:
    """The last row - skip tokens of every row, seeing before them what their first document and the window reach."""
    documents = Documents.packed([0, *accumulate(lengths)], row)
    history, borders, queries, keys = [], [], [], []
    for start in range(0, sum(lengths), row):
        first, end = start + skip, start + row
        before = int(documents.positions[first])
        history.append(min(before, window - 1) if window else before)
        inside = [b for b in accumulate(lengths) if first < b < end]
        borders += [len(queries) * (row - skip) + b - first for b in (first, *inside)]
        queries.append(slice(first, end))
        keys.append(slice(first - history[-1], end))
    q = torch.cat([qkv[0][part] for part in queries])
    k, v = (torch.cat([x[part] for part in keys]) for x in qkv[1:])
    pieces = Documents.packed([*borders, q.shape[0]], row - skip)
    return packed_attention(q, k, v, pieces, history=tuple(history), scale=SCALE, window=window)


@pytest.mark.parametrize(("lengths", "row"), [((9,), 9), ((6, 2, 1, 7, 1, 1), 9), ((3, 2, 4, 8, 1), 9)], ids=str)
@pytest.mark.parametrize("skip", [1, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_continues_a_document_as_if_it_had_not_been_cut(lengths, row, skip: int, window: int):
    documents = Documents.packed([0, *accumulate(lengths)], row)
    qkv = [x.requires_grad_() for x in _inputs(sum(lengths))]
    actual = _continued(qkv, lengths, row, skip, window)
    q, k, v = qkv
    expected = packed_attention(q, k, v, documents, scale=SCALE, window=window)
    expected = expected.unflatten(0, (-1, row))[:, skip:].flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(*(torch.autograd.grad((o * weights).sum(), qkv) for o in (actual, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)
