"""Expert parallelism: whole experts spread over the ranks of `ep`, tokens sent to them and back.

Each rank routes its own tokens and holds E / P experts, a contiguous share. Example: P = 2 ranks, E = 4 experts; rank 0
holds experts 0 and 1, rank 1 holds 2 and 3. A digit is a row, named by its expert:

    rank 0                          rank 1
    sorted      0 0 | 1 | 2 | 3     0 | | 2 2 | 3        counts [2 1 1 1] and [1 0 2 1]
    exchanged   0 0 1 0             2 3 2 2 3            rank after rank, each sorted by expert
    by expert   0 0 0 1             2 2 2 3 3            counts of this rank's experts [3 1] and [3 2]

Counts travel first, because both sides must know how many rows come: the host waits for them, once a layer and forward.
A rank without rows for another, or without any, takes part all the same. At home a token's k results are summed in
float32 in the order of its choices, so nothing depends on which rank computed what.

T tokens, k experts a token, R = T * k rows, N rows received, D model width, E experts, P ranks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard

from torchlinearmoe.kernels.dispatch import permute
from torchlinearmoe.moe.dispatch import DispatchContext, LocalDispatch
from torchlinearmoe.moe.layer import MoE
from torchlinearmoe.moe.router import Routing
from torchlinearmoe.parallel.local import split_tensor


def apply_expert_parallel(model: nn.Module, mesh: DeviceMesh) -> None:
    """Give each rank of `mesh`, [ep], its share of every expert stack of the meta `model`; exchange tokens there."""
    for module in model.modules():
        if isinstance(module, MoE):
            for name, parameter in list(module.experts.named_parameters(recurse=False)):
                setattr(module.experts, name, nn.Parameter(split_tensor(parameter, mesh, Shard(0))))
            module.use(ExchangeDispatch(module.router.num_experts, mesh.get_group()))


class ExchangeContext(NamedTuple):
    """What `combine` needs to send rows home."""

    home: DispatchContext
    sent: list[int]
    """Rows to each rank."""
    received: list[int]
    """Rows from each rank."""
    order_N: Tensor
    """The received row in each place, by expert."""
    inverse_N: Tensor
    padded: bool = False
    """Dropped assignments stay at home."""


class ExchangeDispatch:
    """Rows go to the ranks of `group` that hold their experts: all-to-all with uneven splits."""

    regions = ("local.dispatch", "local.combine")
    stays_here = False

    def __init__(self, num_experts: int, group: ProcessGroup) -> None:
        self.local = LocalDispatch(num_experts)
        self.group = group

    def dispatch(
        self, x_TD: Tensor, routing: Routing, keep_Tk: Tensor | None = None
    ) -> tuple[Tensor, Tensor, ExchangeContext]:
        """Rows of all ranks for this rank's experts, sorted by expert, then rank, then token.

        Arguments as in `LocalDispatch`. Returns x_ND [N, D], their counts int64 [E / P], context.
        """
        x_RD, counts_E, home = self.local.dispatch(x_TD, routing, keep_Tk)
        mine_PE = counts_E.view(self.group.size(), -1)
        theirs_PE = torch.empty_like(mine_PE)
        dist.all_to_all_single(theirs_PE, mine_PE, group=self.group)
        sent, received = torch.stack((mine_PE.sum(1), theirs_PE.sum(1))).tolist()
        x_ND = exchange(x_RD[: sum(sent)], sent, received, self.group)
        order_N, inverse_N = by_expert(theirs_PE, sum(received))
        x_ND = permute(x_ND, order_N, inverse_N)
        torch._dynamo.maybe_mark_dynamic(x_ND, 0)
        return x_ND, theirs_PE.sum(0), ExchangeContext(home, sent, received, order_N, inverse_N)

    def combine(self, y_ND: Tensor, context: ExchangeContext) -> Tensor:
        """Send results home and sum each token's, weighted in float32: [N, D] -> [T, D]."""
        y_ND = permute(y_ND, context.inverse_N, context.order_N)
        y_RD = exchange(y_ND, context.received, context.sent, self.group)
        dropped = context.home.order_R.shape[0] - y_RD.shape[0]
        return self.local.combine(F.pad(y_RD, (0, 0, 0, dropped)) if dropped else y_RD, context.home)


def by_expert(counts_PE: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """The order that sorts rows, laid out rank after rank with these counts, by expert first; and its inverse.

    counts [[2, 1], [1, 0]]: rows 0 1 are rank 0's for the first expert, 2 for the second, 3 is rank 1's for the first

        order [0 1 3 2]     inverse [0 1 3 2]
    """
    lengths_PE = counts_PE.t().reshape(-1)
    ends_PE = counts_PE.reshape(-1).cumsum(0).view_as(counts_PE)
    starts_PE = (ends_PE - counts_PE).t().reshape(-1)
    # Row i of a segment lies at (its start before) - (its start after) + i; output_size spares a wait for the device.
    shift_N = torch.repeat_interleave(starts_PE - (lengths_PE.cumsum(0) - lengths_PE), lengths_PE, output_size=rows)
    places_N = torch.arange(rows, device=counts_PE.device)
    order_N = shift_N + places_N
    return order_N, torch.empty_like(order_N).scatter_(0, order_N, places_N)


def exchange(x_RD: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    """All-to-all: the first `sent[0]` rows go to rank 0, and so on; `received[p]` rows come from rank p, in order."""
    return _Exchange.apply(x_RD, sent, received, group)  # pyright: ignore[reportReturnType]


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _all_to_all(x_RD, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _all_to_all(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _all_to_all(x_RD: Tensor, sent: list[int], received: list[int], group: ProcessGroup) -> Tensor:
    y_RD = x_RD.new_empty(sum(received), x_RD.shape[1])
    dist.all_to_all_single(y_RD, x_RD.contiguous(), received, sent, group=group)
    return y_RD
