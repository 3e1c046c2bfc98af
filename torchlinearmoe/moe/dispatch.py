"""Moving tokens to their experts and back: the same dispatch / combine pair whatever lies between.

T = 3 tokens, k = 2, ids [[2, 0], [0, 1], [2, 1]]. The assignments, numbered t * k + j, sorted by expert:

    expert       0 0 | 1 1 | 2 2
    order_R      1 2 | 3 5 | 0 4      assignment in each row; its token is order // k
    inverse_Tk   [[4, 0], [1, 2], [5, 3]]   row of each assignment: order[inverse[t, j]] == t * k + j

Dispatch reads `x[order // k]`, combine reads `y[inverse]`. Since one index undoes the other, both backwards are reads
as well: no atomic additions anywhere, hence the same bits on every run, and no host synchronisation.

`LocalDispatch` holds all experts. A dispatcher that exchanges rows between ranks has one: it sends the rows of
`dispatch` on by their counts, and undoes its own exchange before calling `combine`.

T tokens, k experts a token, R = T * k rows, D model width, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from torchlinearmoe.moe.router import Routing


class DispatchContext(NamedTuple):
    """What `combine` needs to bring rows home."""

    order_R: Tensor
    inverse_Tk: Tensor
    weights_Tk: Tensor
    padded: bool
    """Whether rows may exceed the counts: dropped assignments, which no expert may touch."""


class _Spread(torch.autograd.Function):
    """x[order // k]; backward sums the k rows of a token in fp32."""

    @staticmethod
    def forward(ctx, x_TD, order_R, inverse_Tk):
        ctx.save_for_backward(inverse_Tk)
        return x_TD.index_select(0, order_R // inverse_Tk.shape[1])

    @staticmethod
    def backward(ctx, *grads):
        (grad_RD,) = grads
        (inverse_Tk,) = ctx.saved_tensors
        total_TD = grad_RD.index_select(0, inverse_Tk[:, 0])
        if inverse_Tk.shape[1] > 1:
            total_TD = total_TD.to(torch.promote_types(grad_RD.dtype, torch.float32))
        for rows_T in inverse_Tk.unbind(1)[1:]:
            total_TD = total_TD + grad_RD.index_select(0, rows_T)
        return total_TD.to(grad_RD.dtype), None, None


def permute(x_RD: Tensor, order_R: Tensor, inverse_R: Tensor) -> Tensor:
    """x[order], a permutation whose inverse is given, so that its backward is a read as well."""
    return _Spread.apply(x_RD, order_R, inverse_R.unsqueeze(1))  # type: ignore[return-value]


class _WeightedSum(torch.autograd.Function):
    """y_t = sum_j w[t, j] * rows[inverse[t, j]], products and sum in fp32, always in the order of j."""

    @staticmethod
    def forward(ctx, rows_RD, weights_Tk, order_R, inverse_Tk):
        ctx.save_for_backward(rows_RD, weights_Tk, order_R, inverse_Tk)
        parts = zip(weights_Tk.unbind(1), inverse_Tk.unbind(1))
        weight_T, rows_T = next(parts)
        total_TD = rows_RD.index_select(0, rows_T) * weight_T.unsqueeze(1)
        for weight_T, rows_T in parts:
            total_TD = total_TD + rows_RD.index_select(0, rows_T) * weight_T.unsqueeze(1)
        # Without a conversion to the same type: torch 2.11 would compile a wrong backward.
        return total_TD if total_TD.dtype == rows_RD.dtype else total_TD.to(rows_RD.dtype)

    @staticmethod
    def backward(ctx, *grads):
        (grad_TD,) = grads
        rows_RD, weights_Tk, order_R, inverse_Tk = ctx.saved_tensors
        k = inverse_Tk.shape[1]
        weight_R1 = weights_Tk.flatten().index_select(0, order_R).unsqueeze(1)
        grad_RD = (grad_TD.index_select(0, order_R // k) * weight_R1).to(rows_RD.dtype)
        wide_TD = grad_TD.to(weights_Tk.dtype)
        grad_Tk = torch.stack([(wide_TD * rows_RD.index_select(0, rows_T)).sum(-1) for rows_T in inverse_Tk.unbind(1)])
        return grad_RD, grad_Tk.transpose(0, 1).to(weights_Tk.dtype), None, None


class Dispatcher(Protocol):
    """What an MoE layer asks of whatever moves its tokens."""

    @property
    def regions(self) -> tuple[str, ...]:
        """Methods that are compiled."""
        ...

    def dispatch(self, x_TD: Tensor, routing: Routing, keep_Tk: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """Rows sorted by expert, counts of the experts that this rank computes, and a context for `combine`."""
        ...

    def combine(self, y_RD: Tensor, context: Any, /) -> Tensor:
        """Each token's weighted sum, [T, D]."""
        ...


class LocalDispatch:
    """All experts on this rank: a stable sort by expert and its inverse."""

    regions = ("dispatch", "combine")

    def __init__(self, num_experts: int):
        self.num_experts = num_experts

    def dispatch(
        self, x_TD: Tensor, routing: Routing, keep_Tk: Tensor | None = None
    ) -> tuple[Tensor, Tensor, DispatchContext]:
        """Rows sorted by expert, tokens of an expert in their order.

        x_TD: [T, D]; keep_Tk: bool [T, k], False where an assignment is dropped, None when all stay.
        Returns x_RD [R, D], counts_E int64 [E], context. With dropped assignments the counts sum to less than R:
        their rows come last and belong to no expert.
        """
        ids_R = routing.topk_ids_Tk.flatten().to(torch.int16)  # a radix sort takes a pass for every byte of the key
        if keep_Tk is not None:
            ids_R = ids_R.masked_fill(~keep_Tk.flatten(), self.num_experts)
        sorted_R, order_R = ids_R.sort(stable=True)
        inverse_Tk = torch.empty_like(order_R).scatter_(0, order_R, torch.arange(order_R.shape[0], device=x_TD.device))
        inverse_Tk = inverse_Tk.view_as(routing.topk_ids_Tk)
        experts = torch.arange(self.num_experts + 1, device=x_TD.device, dtype=sorted_R.dtype)
        bounds = torch.searchsorted(sorted_R, experts)
        context = DispatchContext(order_R, inverse_Tk, routing.topk_weights_Tk, keep_Tk is not None)
        return self.spread(x_TD, context), bounds.diff(), context

    def spread(self, x_TD: Tensor, context: DispatchContext) -> Tensor:
        """Another input of the dispatched tokens, in the same rows: [T, D] -> [R, D]."""
        return _Spread.apply(x_TD, context.order_R, context.inverse_Tk)  # type: ignore[return-value]

    def combine(self, y_RD: Tensor, context: DispatchContext) -> Tensor:
        """Sum each token's expert outputs, weighted in fp32: y_RD [R, D] -> [T, D].

        Rows of dropped assignments must be zero, as `Experts` leaves them.
        """
        return _WeightedSum.apply(y_RD, context.weights_Tk, context.order_R, context.inverse_Tk)  # type: ignore
