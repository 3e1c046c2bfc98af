"""One matrix product a group of rows: what lies under every expert layer, forward and backward.

    rows     x_RM        [a a a b d d]          offsets_E = [3, 4, 4, 6]: where each group ends
    weights  w_EMN       A B C D                group c is empty
    out      y_RN        [aA aA aA bB dD dD]

R rows, M inner width, N outer width, E groups.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("grouped_mm", ("grouped_mm",), key="moe.backend")


def call(inner: int, outer: int, device: str, dtype: torch.dtype) -> Call:
    """What the choice of a backend rests on; inner, outer: M and N."""
    return Call("grouped_mm", device, dtype, math.gcd(inner, outer))


def grouped_mm(x_RM: Tensor, w_EMN: Tensor, offsets_E: Tensor, backend: str = "auto") -> Tensor:
    """y[r] = x[r] @ w[group of r].

    x_RM: [R, M], rows sorted by group; w_EMN: [E, M, N] of the same dtype, any strides; offsets_E: int32 [E],
    cumulative group sizes. Returns [R, N].

    Rows past `offsets_E[-1]` belong to no group: their outputs and their gradients are unspecified memory; whoever
    hands in such rows masks them (see `Experts`). They never reach a weight gradient.
    """
    facts = call(w_EMN.shape[1], w_EMN.shape[2], x_RM.device.type, x_RM.dtype)
    return choose(OPERATOR, backend, facts).run(x_RM, w_EMN, offsets_E)


def budget(rows: int, inner: int, outer: int, groups: int, itemsize: int = 2) -> Budget:
    """Of `rows` rows in numbers of `itemsize` bytes; every group's weight is read once."""
    x, w, y = rows * inner * itemsize, groups * inner * outer * itemsize, rows * outer * itemsize
    return Budget(2.0 * rows * inner * outer, x + w + y, backward_bytes=2 * (x + w + y), saved_bytes=x)
