"""Windowed attention against softmax(q k^T) v over each token's window, packed and over a cache."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels import attention
from torchlinearmoe.kernels.attention import cached_attention, choose_backend, continued_attention, packed_attention

SCALE = 0.31


def _naive(q: Tensor, k: Tensor, v: Tensor, window: int) -> Tensor:
    """One document, a token and a head at a time."""
    groups = q.shape[1] // k.shape[1]
    rows = []
    for t in range(q.shape[0]):
        seen = slice(max(0, t + 1 - window), t + 1)
        rows.append(
            torch.stack(
                [
                    torch.softmax(SCALE * (k[seen, h // groups] @ q[t, h]), 0) @ v[seen, h // groups]
                    for h in range(q.shape[1])
                ]
            )
        )
    return torch.stack(rows)


def _inputs(tokens: int, heads: int, groups: int, width: int = 6) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, groups, width), (tokens, groups, width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def _packed(qkv: list[Tensor], documents: Documents, window: int, backend: str = "sdpa") -> Tensor:
    return packed_attention(
        *qkv,
        ids=documents.ids,
        cu_seqlens=documents.cu_seqlens,
        longest=documents.max_length,
        row_length=documents.row_length,
        scale=SCALE,
        backend=backend,
        window=window,
    )


LAYOUTS = [((1,), 1), ((9, 1, 7), 17), ((8, 8), 8), ((3, 1, 4, 2, 2, 8), 4 + 4 + 2 + 2 + 8)]


@pytest.mark.parametrize(("lengths", "row"), LAYOUTS, ids=str)
@pytest.mark.parametrize("window", [1, 2, 5, 8, 100])
@pytest.mark.parametrize(("heads", "groups"), [(2, 2), (4, 2)])
def test_a_packed_token_sees_its_window_of_its_document(lengths, row, window: int, heads: int, groups: int):
    documents = Documents.packed([0, *accumulate(lengths)], row)
    qkv = [x.requires_grad_() for x in _inputs(sum(lengths), heads, groups)]
    parts = zip(*(x.split(lengths) for x in qkv), strict=True)
    weights = torch.randn(qkv[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = _packed(qkv, documents, window)
    expected = torch.cat([_naive(q, k, v, window) for q, k, v in parts])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    for mine, theirs in zip(*(torch.autograd.grad((o * weights).sum(), qkv) for o in (actual, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


def test_a_cache_in_any_order_is_read_by_positions():
    window, tokens, new = 4, 9, 3
    q, k, v = _inputs(tokens, 4, 2)
    expected = _naive(q, k, v, window)[-new:]
    order = torch.randperm(tokens, generator=torch.Generator().manual_seed(2))
    # Two entries hold nothing, and what lies in them must not be seen.
    garbage = torch.full((2, *k.shape[1:]), 1e3, dtype=torch.float64)
    keys, values = (torch.cat([x[order], garbage])[None] for x in (k, v))
    positions = torch.cat([order, torch.tensor([-1, -3])])[None]
    queries = torch.arange(tokens - new, tokens)[None]
    actual = cached_attention(q[None, -new:], keys, values, queries, SCALE, key_positions=positions, window=window)
    torch.testing.assert_close(actual[0], expected, rtol=1e-10, atol=1e-12)


def test_a_torch_without_windows_in_varlen_takes_flex(monkeypatch):
    cuda, half = torch.device("cuda"), torch.bfloat16
    monkeypatch.setattr(attention, "_varlen_knows_windows", lambda: True)
    assert choose_backend("auto", cuda, half, windowed=True) == "varlen"
    monkeypatch.setattr(attention, "_varlen_knows_windows", lambda: False)
    assert choose_backend("auto", cuda, half, windowed=True) == "flex"
    assert choose_backend("auto", cuda, half) == choose_backend("varlen", cuda, half) == "varlen"
    assert choose_backend("auto", cuda, torch.float32, windowed=True) == "sdpa"
    with pytest.raises(ValueError, match="^model.attention_backend = 'varlen': this torch has it without windows"):
        choose_backend("varlen", cuda, half, windowed=True)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flex", "sdpa"])
@pytest.mark.parametrize("window", [1, 50, 128])
def test_gpu_backends_see_the_same_window(backend: str, window: int):
    lengths, row = (200, 1, 55, 129, 127), 256
    documents = Documents.packed([0, *accumulate(lengths)], row, "cuda")
    exact = [x.requires_grad_() for x in _inputs(sum(lengths), 4, 2, width=64)]
    qkv = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    weights = torch.randn(qkv[0].shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    actual = _packed(qkv, documents, window, backend)
    reference = _packed(exact, Documents.packed([0, *accumulate(lengths)], row), window)
    assert (actual.cpu().double() - reference).norm() < 1e-2 * reference.norm()
    mine = torch.autograd.grad((actual * weights.to(actual)).sum(), qkv)
    theirs = torch.autograd.grad((reference * weights).sum(), exact)
    # A window of one token has no gradient by queries and keys: there the values' is the measure.
    sizes = [theirs[2 if window == 1 else i].norm() for i in range(3)]
    for a, b, size in zip(mine, theirs, sizes):
        assert (a.cpu().double() - b).norm() < 2e-2 * size


def _continued(qkv: list[Tensor], lengths: tuple[int, ...], row: int, skip: int, window: int, backend: str) -> Tensor:
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
    borders.append(q.shape[0])
    ids = torch.cat([documents.ids[part] for part in queries]).to(q.device)
    return continued_attention(
        q, k, v, ids=ids, borders=borders, history=history, scale=SCALE, backend=backend, window=window
    )


@pytest.mark.parametrize(("lengths", "row"), [((9,), 9), ((6, 2, 1, 7, 1, 1), 9), ((3, 2, 4, 8, 1), 9)], ids=str)
@pytest.mark.parametrize("skip", [1, 4, 8])
@pytest.mark.parametrize("window", [0, 1, 3])
def test_attention_continues_a_document_as_if_it_had_not_been_cut(lengths, row, skip: int, window: int):
    documents = Documents.packed([0, *accumulate(lengths)], row)
    qkv = [x.requires_grad_() for x in _inputs(sum(lengths), 4, 2)]
    actual = _continued(qkv, lengths, row, skip, window, "sdpa")
    expected = _packed(qkv, documents, window).unflatten(0, (-1, row))[:, skip:].flatten(0, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    weights = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    for mine, theirs in zip(*(torch.autograd.grad((o * weights).sum(), qkv) for o in (actual, expected))):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["auto", "flex", "sdpa"])
@pytest.mark.parametrize("window", [0, 50])
def test_gpu_backends_continue_documents(backend: str, window: int):
    lengths, row, skip = (200, 1, 55, 129, 127), 256, 128
    exact = [x.requires_grad_() for x in _inputs(sum(lengths), 4, 2, width=64)]
    qkv = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    actual = _continued(qkv, lengths, row, skip, window, backend)
    reference = _continued(exact, lengths, row, skip, window, "sdpa")
    assert (actual.cpu().double() - reference).norm() < 1e-2 * reference.norm()
    weights = torch.randn(reference.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mine = torch.autograd.grad((actual * weights.to(actual)).sum(), qkv)
    for a, b in zip(mine, torch.autograd.grad((reference * weights).sum(), exact)):
        assert (a.cpu().double() - b).norm() < 2e-2 * b.norm()
