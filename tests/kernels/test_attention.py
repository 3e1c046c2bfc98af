"""Packed and cached attention against softmax(q k^T) v of each document by itself."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
from torch import Tensor

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention import cached_attention, choose_backend, packed_attention

SCALE = 0.31


def _naive(q: Tensor, k: Tensor, v: Tensor, offset: int = 0) -> Tensor:
    """One document: q [T, H, d] at positions offset, offset + 1, ... over k, v [S, G, d]."""
    groups = q.shape[1] // k.shape[1]
    out = q.new_zeros(*q.shape[:2], v.shape[-1])
    for h in range(q.shape[1]):
        for t in range(q.shape[0]):
            seen = slice(0, offset + t + 1)
            scores = SCALE * (k[seen, h // groups] @ q[t, h])
            out[t, h] = torch.softmax(scores, 0) @ v[seen, h // groups]
    return out


def _inputs(
    tokens: int, heads: int, groups: int, width: int = 6, value_width: int | None = None, **kind
) -> list[Tensor]:
    generator = torch.Generator().manual_seed(tokens)
    shapes = [(tokens, heads, width), (tokens, groups, width), (tokens, groups, value_width or width)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(**kind) for shape in shapes]


def _packed(qkv: list[Tensor], documents: Documents, backend: str = "sdpa") -> Tensor:
    return packed_attention(
        *qkv,
        ids=documents.ids,
        cu_seqlens=documents.cu_seqlens,
        longest=documents.max_length,
        row_length=documents.row_length,
        scale=SCALE,
        backend=backend,
    )


LAYOUTS = [((1,), 1), ((5, 1, 7), 13), ((4, 4, 4), 4), ((3, 1, 4, 2, 2), 4), ((6, 2, 1, 7), 8), ((1, 1, 1), 3)]
"""(lengths of the documents, tokens of a row)"""


@pytest.mark.parametrize(("lengths", "row"), LAYOUTS, ids=str)
@pytest.mark.parametrize(("heads", "groups", "values"), [(2, 2, 6), (4, 2, 6), (3, 1, 6), (2, 2, 4), (4, 2, 9)])
def test_packed_documents_equal_each_alone(lengths: tuple[int, ...], row: int, heads: int, groups: int, values: int):
    documents = Documents.packed([0, *accumulate(lengths)], row)
    qkv = [x.requires_grad_() for x in _inputs(sum(lengths), heads, groups, value_width=values)]
    actual = _packed(qkv, documents)
    weights = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    expected = torch.cat([_naive(*part) for part in zip(*(x.split(lengths) for x in qkv))])
    torch.testing.assert_close(actual, expected, rtol=1e-10, atol=1e-12)
    grads = [torch.autograd.grad((o * weights).sum(), qkv) for o in (actual, expected)]
    for mine, theirs in zip(*grads):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize(("heads", "groups", "values"), [(2, 2, 6), (4, 2, 6), (3, 1, 6), (3, 1, 4)])
def test_cached_attention_sees_each_sequence_up_to_the_querys_position(heads: int, groups: int, values: int):
    starts, new, room = (0, 3, 5), 2, 9
    caches, queries, expected = [], [], []
    for n, start in enumerate(starts):
        q, k, v = (x[: start + new] for x in _inputs(20 + n, heads, groups, value_width=values))
        expected.append(_naive(q[start:], k, v, start))
        queries.append(q[start:])
        # What lies behind a sequence's own tokens is garbage and must not be seen.
        caches.append([torch.cat([x, torch.full((room - start - new, *x.shape[1:]), 1e3).double()]) for x in (k, v)])
    positions = torch.tensor(starts)[:, None] + torch.arange(new)
    k_cache, v_cache = (torch.stack([cache[i] for cache in caches]) for i in (0, 1))
    actual = cached_attention(torch.stack(queries), k_cache, v_cache, positions, SCALE)
    torch.testing.assert_close(actual, torch.stack(expected), rtol=1e-10, atol=1e-12)


def test_a_backend_that_cannot_run_here_is_refused_by_name():
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert choose_backend("auto", cpu, torch.bfloat16) == "sdpa"
    assert choose_backend("auto", cuda, torch.bfloat16) == "varlen"
    assert choose_backend("auto", cuda, torch.float32) == "sdpa"
    assert choose_backend("flex", cuda, torch.float32) == "flex"
    for backend, device, dtype in [
        ("varlen", cpu, torch.bfloat16),
        ("varlen", cuda, torch.float32),
        ("flex", cpu, torch.float32),
        ("flash", cuda, torch.bfloat16),
    ]:
        with pytest.raises(ValueError, match=f"^model.attention_backend = '{backend}': "):
            choose_backend(backend, device, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("backend", ["varlen", "flex", "sdpa"])
@pytest.mark.parametrize(("heads", "groups", "width", "values"), [(4, 4, 64, 64), (4, 2, 64, 64), (4, 4, 192, 128)])
def test_gpu_backends_equal_each_document_alone(backend: str, heads: int, groups: int, width: int, values: int):
    lengths, row = (200, 1, 55, 129, 127), 256
    documents = Documents.packed([0, *accumulate(lengths)], row, "cuda")
    exact = [x.requires_grad_() for x in _inputs(sum(lengths), heads, groups, width, values)]
    qkv = [x.detach().to("cuda", torch.bfloat16).requires_grad_() for x in exact]
    actual = _packed(qkv, documents, backend)
    weights = torch.randn(actual.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    reference = torch.cat(
        [_packed(list(p), Documents.batch(1, p[0].shape[0])) for p in zip(*(x.split(lengths) for x in exact))]
    )
    assert (actual.cpu().double() - reference).norm() < 1e-2 * reference.norm()
    mine = torch.autograd.grad((actual * weights.to(actual)).sum(), qkv)
    theirs = torch.autograd.grad((reference * weights).sum(), exact)
    for a, b in zip(mine, theirs):
        assert (a.cpu().double() - b).norm() < 2e-2 * b.norm()
