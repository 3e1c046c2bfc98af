"""Plain PyTorch: a stable sort and its inverse; both gradients are reads."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend


def sort(ids_Tk: Tensor, num_experts: int, keep_Tk: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """As `kernels.dispatch.sort`."""
    ids_R = ids_Tk.flatten().to(torch.int16)  # a radix sort takes a pass for every byte of the key
    if keep_Tk is not None:
        ids_R = ids_R.masked_fill(~keep_Tk.flatten(), num_experts)
    sorted_R, order_R = ids_R.sort(stable=True)
    inverse_R = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.shape[0], device=ids_Tk.device))
    experts = torch.arange(num_experts + 1, device=ids_Tk.device, dtype=sorted_R.dtype)
    return order_R, inverse_R.view_as(ids_Tk), torch.searchsorted(sorted_R, experts).diff()


class _Spread(torch.autograd.Function):
    """x[order // k]; backward sums the k rows of a token in fp32."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
        ctx.save_for_backward(inverse_Tk)
        return x_TD.index_select(0, order_R // inverse_Tk.shape[1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (grad_RD,) = grads
        (inverse_Tk,) = ctx.saved_tensors
        total_TD = grad_RD.index_select(0, inverse_Tk[:, 0])
        if inverse_Tk.shape[1] > 1:
            total_TD = total_TD.to(torch.promote_types(grad_RD.dtype, torch.float32))
        for rows_T in inverse_Tk.unbind(1)[1:]:
            total_TD = total_TD + grad_RD.index_select(0, rows_T)
        return total_TD.to(grad_RD.dtype), None, None


class _WeightedSum(torch.autograd.Function):
    """y_t = sum_j w[t, j] * rows[inverse[t, j]], products and sum in fp32, always in the order of j."""

    @staticmethod
    def forward(ctx: Any, rows_RD: Tensor, weights_Tk: Tensor, order_R: Tensor, inverse_Tk: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RD, weights_Tk, order_R, inverse_Tk)
        parts = zip(weights_Tk.unbind(1), inverse_Tk.unbind(1))
        weight_T, rows_T = next(parts)
        total_TD = rows_RD.index_select(0, rows_T) * weight_T.unsqueeze(1)
        for weight_T, rows_T in parts:
            total_TD = total_TD + rows_RD.index_select(0, rows_T) * weight_T.unsqueeze(1)
        # Without a conversion to the same type: torch 2.11 would compile a wrong backward.
        return total_TD if total_TD.dtype == rows_RD.dtype else total_TD.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (grad_TD,) = grads
        rows_RD, weights_Tk, order_R, inverse_Tk = ctx.saved_tensors
        k = inverse_Tk.shape[1]
        weight_R1 = weights_Tk.flatten().index_select(0, order_R).unsqueeze(1)
        grad_RD = (grad_TD.index_select(0, order_R // k) * weight_R1).to(rows_RD.dtype)
        wide_TD = grad_TD.to(weights_Tk.dtype)
        grad_Tk = torch.stack([(wide_TD * rows_RD.index_select(0, rows_T)).sum(-1) for rows_T in inverse_Tk.unbind(1)])
        return grad_RD, grad_Tk.transpose(0, 1).to(weights_Tk.dtype), None, None


def run(kind: str, *arguments: Any) -> Any:
    """The function of a kind."""
    return {"sort": sort, "spread": _Spread.apply, "weighted_sum": _WeightedSum.apply}[kind](*arguments)


BACKEND = Backend("torch", run, kinds=("sort", "spread", "weighted_sum"), order=0, fused=True)
