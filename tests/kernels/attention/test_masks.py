"""What documents see, without anything as large as queries times keys: FlexAttention's blocks and SDPA's pieces."""

from __future__ import annotations

from itertools import accumulate

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import create_block_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from torchlinearmoe.documents import Documents
from torchlinearmoe.kernels.attention import packed_attention, sdpa
from torchlinearmoe.kernels.attention.flex import block_mask

LONG = 131_072


def ids_of(rows: list[list[int]]) -> Tensor:
    """int32 [R, L] of rows of documents of so many tokens."""
    starts = accumulate((len(row) for row in rows), initial=0)
    pairs = [(torch.arange(first, first + len(row)), torch.tensor(row)) for first, row in zip(starts, rows)]
    return torch.stack([documents.repeat_interleave(lengths) for documents, lengths in pairs]).int()


def seen(count: Tensor, indices: Tensor) -> list[list[set[int]]]:
    """By row and block of queries, the blocks of keys."""
    return [
        [set(blocks[:number].tolist()) for number, blocks in zip(numbers, table)]
        for numbers, table in zip(count[:, 0].tolist(), indices[:, 0])
    ]


@pytest.mark.parametrize("window", [0, 1, 7, 128, 200, 300])
@pytest.mark.parametrize(
    ("rows", "earlier"),
    [
        ([[256]], 0),
        ([[1]], 0),
        ([[700]], 0),
        ([[128, 128, 256], [1, 510, 1]], 0),
        ([[300, 1, 83, 200, 56], [640 - 129, 129]], 0),
        ([[90, 500]], 77),
        ([[128, 300]], 128),
        ([[5]], 1000),
    ],
)
def test_blocks_are_those_of_the_whole_mask(rows: list[list[int]], earlier: int, window: int):
    ids = ids_of(rows)
    key_ids = torch.cat([ids[:, :1].expand(-1, earlier), ids], 1)
    found = block_mask(ids, key_ids, window)
    wanted = create_block_mask(found.mask_mod, len(rows), None, ids.shape[1], key_ids.shape[1], device="cpu")
    assert found.shape == wanted.shape
    for of in ("kv_num_blocks kv_indices", "full_kv_num_blocks full_kv_indices", "q_num_blocks q_indices"):
        assert seen(*(getattr(found, name) for name in of.split())) == seen(
            *(getattr(wanted, name) for name in of.split())
        ), of


class Largest(TorchDispatchMode):
    """Numbers of the largest tensor that anything inside makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(result) if isinstance(x, Tensor)]
        self.numbers = max([self.numbers, *sizes])
        return result


def test_a_block_mask_of_131072_tokens_holds_no_mask_of_pairs():
    ids = ids_of([[LONG // 2, 100, LONG // 2 - 100]])
    with Largest() as largest:
        mask = block_mask(ids, ids, 0)
    assert largest.numbers <= 2 * (LONG // 128) ** 2
    assert mask.sparsity() > 70


def masks_of(monkeypatch, documents: Documents, history: tuple[int, ...], window: int) -> list[tuple[int, ...]]:
    """The shapes of the masks that SDPA is given on the meta device."""
    shapes: list[tuple[int, ...]] = []
    attention = F.scaled_dot_product_attention

    def watched(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
        if attn_mask is not None:
            shapes.append(tuple(attn_mask.shape))
        assert q.shape[2] == k.shape[2] or not options.get("is_causal")
        return attention(q, k, v, attn_mask, **options)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    tokens = documents.ids.shape[0]
    q, k, v = (torch.empty(n, 1, 8, device="meta") for n in (tokens, tokens + sum(history), tokens + sum(history)))
    monkeypatch.setattr(torch, "arange", lambda *bounds, device=None: arange(*bounds, device="meta"))
    out = packed_attention(q, k, v, documents, scale=1.0, window=window, history=history, backend="sdpa")
    assert out.shape == q.shape
    return shapes


arange = torch.arange


@pytest.mark.parametrize(("lengths", "history", "window"), [
    ((LONG,), (), 0),
    ((LONG // 2, 100, LONG // 2 - 100), (), 0),
    ((5000, 3192), (), 4000),
    ((LONG - 10, 10), (), 128),
    ((4096, 4096), (LONG,), 0),
    ((8000, 192), (2000,), 300),
])  # fmt: skip
def test_no_mask_of_sdpa_has_more_than_4096_times_4096_pairs(lengths, history, window, monkeypatch):
    documents = Documents.packed([0, *accumulate(lengths)])
    shapes = masks_of(monkeypatch, documents, history, window)
    assert all(shape[-2] * shape[-1] <= 4096**2 for shape in shapes)
    assert bool(shapes) == bool(history or window)


@pytest.mark.parametrize("window", [0, 1, 5, 9, 40])
@pytest.mark.parametrize(("rows", "history"), [((40, 1, 23), ()), ((17, 3, 44), (9,)), ((64,), (31,)), ((2,) * 32, ())])
def test_documents_in_pieces_are_those_of_the_definition(rows, history, window: int, monkeypatch):
    monkeypatch.setattr(sdpa, "MASKED", 6)
    documents, keys = Documents.packed([0, *accumulate(rows)]), sum(rows) + sum(history)
    qkv = [torch.randn(n, heads, 6, dtype=torch.float64) for n, heads in ((sum(rows), 4), (keys, 2), (keys, 2))]
    q, k, v = (x.requires_grad_() for x in qkv)
    gradient, results = torch.randn(sum(rows), 4, 6, dtype=torch.float64), []
    for backend in ("sdpa", "reference"):
        o = packed_attention(q, k, v, documents, scale=0.3, window=window, history=history, backend=backend)
        results.append([o.detach(), *torch.autograd.grad(o, (q, k, v), gradient)])
    torch.testing.assert_close(*results, rtol=1e-10, atol=1e-12)
