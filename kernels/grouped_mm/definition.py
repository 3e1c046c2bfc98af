"""The grouped product, group after group.

R rows, M inner width, N outer width, E groups.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend


def grouped_mm(x_RM: Tensor, w_EMN: Tensor, offsets_E: Tensor) -> Tensor:
    """Row r of group e is x[r] @ w[e]; rows of no group are zeros."""
    borders = [0, *offsets_E.tolist()]
    parts = [x_RM[start:end] @ w_MN for (start, end), w_MN in zip(pairwise(borders), w_EMN, strict=True)]
    return torch.cat([*parts, x_RM.new_zeros(x_RM.shape[0] - borders[-1], w_EMN.shape[-1])])


BACKEND = Backend("reference", grouped_mm, kinds=("grouped_mm",))
