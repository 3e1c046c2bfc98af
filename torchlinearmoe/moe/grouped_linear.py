"""A linear layer for each group of rows, all of them in one product.

The weight is [N, E, M], outputs first: what holds for an `nn.Linear`'s weight [N, M] holds for it too. Heads are blocks
of dim 0, which tensor parallelism and FSDP cut, however few the groups are; initial values that go by output row are
the same for every group.

R rows, M inputs, N outputs, E groups.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.initialize import initializers_of, set_initializers
from torchlinearmoe.kernels.grouped_mm import grouped_mm
from torchlinearmoe.module import Module

_ALIGNMENT = 16
"""Bytes that the fused kernel wants a row to be a multiple of."""


class GroupedLinear(Module):
    """y[r] = W_e x[r] + b_e for the group e of row r: as many layers like `layer`, initial values included."""

    def __init__(self, layer: nn.Linear, groups: int) -> None:
        super().__init__()
        shape = (layer.out_features, groups)
        self.weight = nn.Parameter(torch.empty(*shape, layer.in_features))
        self.bias = None if layer.bias is None else nn.Parameter(torch.empty(shape))
        set_initializers(self, **initializers_of(layer))

    def forward(self, x_RM: Tensor, counts_E: Tensor) -> Tensor:
        """x_RM: [R, M], rows sorted by group; counts_E: integer [E], rows of each group, R in all. Returns [R, N]."""
        weight_NEM = self.weight
        outputs = weight_NEM.shape[0]
        # Narrow layers (one output a head) are widened with zeros to where the fused kernel runs.
        padding = -outputs % (_ALIGNMENT // x_RM.dtype.itemsize)
        wide_NEM = F.pad(weight_NEM, (0, 0, 0, 0, 0, padding)) if padding else weight_NEM
        offsets_E = counts_E.cumsum(0).to(torch.int32)
        y_RN = grouped_mm(x_RM, wide_NEM.permute(1, 2, 0), offsets_E)[:, :outputs]
        if self.bias is None:
            return y_RN
        rows_R = torch.arange(x_RM.shape[0], device=x_RM.device, dtype=torch.int32)
        groups_R1 = torch.searchsorted(offsets_E, rows_R, right=True).unsqueeze(1)
        groups_E = torch.arange(counts_E.shape[0], device=x_RM.device)
        # A product, so that the bias's gradient is summed in a fixed order.
        return y_RN + (groups_R1 == groups_E).to(y_RN.dtype) @ self.bias.t()
