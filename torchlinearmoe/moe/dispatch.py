"""Moving tokens to their experts and back: the same dispatch / combine pair whatever lies between.

`LocalDispatch` holds all experts. A dispatcher that exchanges rows between ranks has one: it sends the rows of
`dispatch` on by their counts, and undoes its own exchange before calling `combine`.

T tokens, k experts a token, R = T * k rows, D model width, E experts.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from torch import Tensor

from torchlinearmoe.kernels.dispatch import sort, spread, weighted_sum
from torchlinearmoe.moe.router import Routing


class DispatchContext(NamedTuple):
    """What `combine` needs to bring rows home."""

    order_R: Tensor
    inverse_Tk: Tensor
    weights_Tk: Tensor
    padded: bool
    """Whether rows may exceed the counts: dropped assignments, which no expert may touch."""


class Dispatcher(Protocol):
    """What an MoE layer asks of whatever moves its tokens."""

    @property
    def regions(self) -> tuple[str, ...]:
        """Methods that are compiled."""
        ...

    @property
    def stays_here(self) -> bool:
        """All experts are on this rank, so that they may take the tokens themselves."""
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
    stays_here = True

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
        order_R, inverse_Tk, counts_E = sort(routing.topk_ids_Tk, self.num_experts, keep_Tk)
        context = DispatchContext(order_R, inverse_Tk, routing.topk_weights_Tk, keep_Tk is not None)
        return self.spread(x_TD, context), counts_E, context

    def spread(self, x_TD: Tensor, context: DispatchContext) -> Tensor:
        """Another input of the dispatched tokens, in the same rows: [T, D] -> [R, D]."""
        return spread(x_TD, context.order_R, context.inverse_Tk)

    def combine(self, y_RD: Tensor, context: DispatchContext) -> Tensor:
        """Sum each token's expert outputs, weighted in fp32: y_RD [R, D] -> [T, D].

        Rows of dropped assignments must be zero, as `Experts` leaves them.
        """
        return weighted_sum(y_RD, context.weights_Tk, context.order_R, context.inverse_Tk)
