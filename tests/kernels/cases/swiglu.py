"""Rows of even and odd widths, none, and strided ones."""

from __future__ import annotations

from functools import partial

import torch

from cases import Case
from torchlinearmoe.kernels.swiglu import swiglu


def gated(*shape: int, strided: bool = False) -> Case:
    """gate_up of `shape`."""
    gate_up = torch.randn(shape, dtype=torch.float64)
    return Case("swiglu", swiglu, {"gate_up": gate_up.t().contiguous().t() if strided else gate_up})


CASES = [
    partial(gated, 7, 10),
    partial(gated, 3, 5, 64),
    partial(gated, 0, 8),
    partial(gated, 9, 130, strided=True),
]
