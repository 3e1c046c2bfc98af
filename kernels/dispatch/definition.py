"""The definition: assignments sorted on the host, rows read by index, gradients as they come."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend


def sort(ids_Tk: Tensor, num_experts: int, keep_Tk: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.dispatch.sort`."""
    experts = ids_Tk.flatten().tolist()
    if keep_Tk is not None:
        experts = [e if keep else num_experts for e, keep in zip(experts, keep_Tk.flatten().tolist())]
    order = sorted(range(len(experts)), key=experts.__getitem__)
    inverse = [order.index(assignment) for assignment in range(len(experts))]
    counts = [experts.count(e) for e in range(num_experts)]
    order_R, inverse_R, counts_E = (
        torch.tensor(numbers, dtype=torch.int64, device=ids_Tk.device) for numbers in (order, inverse, counts)
    )
    return order_R, inverse_R.view_as(ids_Tk), counts_E


def spread(x_TD: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
    """As `kernels.dispatch.spread`."""
    return x_TD[order_R // inverse_Tk.shape[1]]


def weighted_sum(rows_RD: Tensor, weights_Tk: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
    """As `kernels.dispatch.weighted_sum`."""
    return (rows_RD[inverse_Tk] * weights_Tk[:, :, None]).sum(1).to(rows_RD.dtype)


def run(kind: str, *arguments: Any) -> Any:
    """The function of a kind."""
    return {"sort": sort, "spread": spread, "weighted_sum": weighted_sum}[kind](*arguments)


BACKEND = Backend("reference", run, kinds=("sort", "spread", "weighted_sum"))
