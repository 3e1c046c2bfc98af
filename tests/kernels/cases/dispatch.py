"""Tokens there, through something that is not linear, and back: few and many experts, empty ones, dropped tokens."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from cases import Case
from torchlinearmoe.kernels.dispatch import permute, sort, spread, weighted_sum


def there_and_back(
    x: Tensor, weights: Tensor, scale: Tensor, ids: Tensor, num_experts: int, keep: Tensor | None, backend: str
) -> tuple[Tensor, ...]:
    """The sorted assignments and what becomes of x [T, D]."""
    order, inverse, counts = sort(ids, num_experts, keep, backend)
    rows = spread(x, order, inverse, backend)
    return order, inverse, counts, rows, weighted_sum(rows.tanh() * scale, weights, order, inverse, backend)


def permuted(x: Tensor, order: Tensor, backend: str) -> Tensor:
    """x[order]."""
    return permute(x, order, order.argsort(), backend)


def routed(
    kind: str,
    tokens: int,
    experts: int,
    top_k: int,
    width: int,
    busy: int = 0,
    drop: bool = False,
    strided: bool = False,
) -> Case:
    """Of `experts`, all or the first `busy` are chosen."""
    ids = torch.rand(tokens, busy or experts).argsort(-1)[:, :top_k]
    x = torch.randn(tokens, width, dtype=torch.float64)
    inputs = {
        "x": x.t().contiguous().t() if strided else x,
        "weights": torch.rand(tokens, top_k, dtype=torch.float64),
        "scale": torch.randn(tokens * top_k, 1, dtype=torch.float64),
    }
    keep = torch.rand(tokens, top_k) < 0.6 if drop else None
    return Case(kind, there_and_back, inputs, {"ids": ids, "num_experts": experts, "keep": keep}, wide=("weights",))


def shuffled(rows: int, width: int) -> Case:
    """A permutation."""
    inputs = {"x": torch.randn(rows, width, dtype=torch.float64)}
    return Case("spread", permuted, inputs, {"order": torch.randperm(rows)})


CASES = [
    partial(routed, "sort", 1, 3, 2, 5),
    partial(routed, "sort", 50, 64, 4, 8, drop=True),
    partial(routed, "spread", 17, 5, 1, 4, busy=2),
    partial(routed, "spread", 12, 8, 8, 7, strided=True),
    partial(routed, "weighted_sum", 9, 4, 2, 33, drop=True, strided=True),
    partial(routed, "weighted_sum", 0, 4, 2, 8),
    partial(shuffled, 11, 6),
    partial(shuffled, 0, 6),
]
