"""Even, ragged and empty groups; weights of any stride; widths that the fused kernel takes and that it does not."""

from __future__ import annotations

import math
from functools import partial

import torch

from cases import Case
from torchlinearmoe.kernels.grouped_mm import grouped_mm


def product(counts: tuple[int, ...], inner: int = 16, outer: int = 24, transposed: bool = False) -> Case:
    """`counts` rows a group; transposed: rows and weights outermost last in memory."""
    x = torch.randn(sum(counts), inner, dtype=torch.float64)
    w = torch.randn(len(counts), inner, outer, dtype=torch.float64)
    if transposed:
        x, w = x.t().contiguous().t(), w.transpose(1, 2).contiguous().transpose(1, 2)
    offsets = torch.tensor(counts).cumsum(0).to(torch.int32)
    inputs = {"x_RM": x, "w_EMN": w}
    return Case("grouped_mm", grouped_mm, inputs, {"offsets_E": offsets}, channels=math.gcd(inner, outer))


CASES = [
    partial(product, (4, 4, 4, 4)),
    partial(product, (3, 1, 5, 2), transposed=True),
    partial(product, (0, 7, 0, 6, 0)),
    partial(product, (0, 9, 0), inner=5, outer=3),
    partial(product, (0, 0, 1), inner=7, outer=8, transposed=True),
    partial(product, (0, 0, 0)),
    partial(product, (130, 1, 77), inner=64, outer=40),
]
