"""Step by step in plain PyTorch and the backends of the steps: a stable sort, rows by index, two products, a sum.

R = T * k rows sorted by expert, D model width, F expert width, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchlinearmoe.kernels import experts as operator
from torchlinearmoe.kernels.dispatch import sort, spread, weighted_sum
from torchlinearmoe.kernels.grouped_mm import grouped_mm
from torchlinearmoe.kernels.operator import Backend


def experts(
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    keep_Tk: Tensor | None,
    products: str,
) -> Tensor:
    """As `routed_experts`."""
    order_R, inverse_Tk, counts_E = sort(ids_Tk, down_EFD.shape[0], keep_Tk)
    x_RD = spread(x_TD, order_R, inverse_Tk)
    y_RD = expert_rows(x_RD, counts_E, gate_up_EDF, down_EFD, keep_Tk is not None, products)
    return weighted_sum(y_RD, weights_Tk, order_R, inverse_Tk)


def expert_rows(
    x_RD: Tensor, counts_E: Tensor, gate_up_EDF: Tensor, down_EFD: Tensor, padded: bool, products: str
) -> Tensor:
    """y[r] = expert of row r (x[r]): [R, D] -> [R, D].

    counts_E: integer [E], rows of each expert. With `padded` there may be more rows than they sum to: whatever the
    surplus rows at the end hold, they give zeros and receive zero gradients.
    """
    offsets_E = counts_E.cumsum(0).to(torch.int32)
    if not padded:
        hidden_RF = operator.activate(grouped_mm(x_RD, gate_up_EDF, offsets_E, products), down_EFD.shape[1])
        return grouped_mm(hidden_RF, down_EFD, offsets_E, products)
    # torch.where on both sides: forward it keeps unspecified memory out of y, backward out of the gradient of x.
    # In between the surplus rows may hold anything: no product sums over them.
    real_R1 = (torch.arange(x_RD.shape[0], device=x_RD.device) < offsets_E[-1]).unsqueeze(1)
    x_RD = torch.where(real_R1, x_RD, 0)
    hidden_RF = operator.activate(grouped_mm(x_RD, gate_up_EDF, offsets_E, products), down_EFD.shape[1])
    return torch.where(real_R1, grouped_mm(hidden_RF, down_EFD, offsets_E, products), 0)


BACKEND = Backend("torch", experts, kinds=("experts", "relu2"), order=0, fused=True)
