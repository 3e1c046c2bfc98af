"""What follows from a router's decision besides the movement of tokens: counts, figures, the auxiliary losses."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from torchlinearmoe.moe.balance import Balance, count_assignments
from torchlinearmoe.moe.router import Routing
from torchlinearmoe.moe.statistics import LoadStatistics, recomputing
from torchlinearmoe.moe.totals import StepTotals


def account(
    routing: Routing,
    balance: Balance,
    statistics: LoadStatistics,
    *,
    totals: StepTotals | None,
    row_length: int | None,
    keep_Tk: Tensor | None = None,
    counted_T: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None]:
    """Account for one training forward of a layer, once however often it is run again for the backward.

    totals: of the optimizer step, None for no losses; row_length: tokens of a packed sequence; keep_Tk: False where an
    assignment was dropped; counted_T: bool [T], False for padding, which is left out of everything. Returns the loss to
    attach (0-dim) and the assignments to each choice (int64 [E]); None for a loss that is not there, and for counts
    that are not to be counted (again).
    """
    num_choices = routing.probs_TE.shape[1]
    if balance.counting:
        balance.global_counts_E += count_assignments(routing.topk_ids_Tk, num_choices, counted_T)
        return None, None
    if counted_T is not None:
        routing = routing._replace(probs_TE=torch.where(counted_T.unsqueeze(1), routing.probs_TE, 0))
    losses = None if totals is None else balance(routing, totals, row_length, counted_T)
    counts_E = None
    if not recomputing():
        counts_E = statistics.record(routing.topk_ids_Tk, routing.probs_TE, keep_Tk, losses, counted_T)
    parts = [loss for loss in losses or () if loss is not None]
    return functools.reduce(torch.add, parts) if parts else None, counts_E
