"""Collectives of tensor parallelism, as operators: plain tensors in and out, differentiable, opaque to torch.compile.

    operator        forward                                   backward
    gather_rows     all ranks' rows, one rank after another   the ranks' gradients summed, each gets its rows
    scatter_rows    the ranks' sums, each gets its rows       all ranks' gradients of their rows
    sum_over        the ranks' sum                            the ranks' gradients summed

A gradient is summed where every rank goes on with its own share of the work and has only a part of it. Nothing here
returns before its result is complete: a tensor still on its way loses its gradient when it enters a compiled region.

T tokens of all P ranks of a group together, D width.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.distributed_c10d import _resolve_process_group

# torch 2.13 gave these two new names and warns of the old ones.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


def _ranks(group: str) -> ProcessGroup:
    """The group of this name, which is how an operator can be told of one."""
    return _resolve_process_group(group)  # pyright: ignore[reportArgumentType]


@torch.library.custom_op("torchlinearmoe::gather_rows", mutates_args=())
def gather_rows(x: Tensor, group: str) -> Tensor:
    """[T / P, ...] of each rank -> [T, ...] on every rank; `group` by its name."""
    ranks = _ranks(group)
    y = x.new_empty(x.shape[0] * ranks.size(), *x.shape[1:])
    _all_gather(y, x.contiguous(), group=ranks)
    return y


@torch.library.custom_op("torchlinearmoe::scatter_rows", mutates_args=())
def scatter_rows(x: Tensor, group: str) -> Tensor:
    """[T, ...], a summand on every rank -> this rank's rows of the sum, [T / P, ...]."""
    ranks = _ranks(group)
    y = x.new_empty(x.shape[0] // ranks.size(), *x.shape[1:])
    _reduce_scatter(y, x.contiguous(), group=ranks)
    return y


@torch.library.custom_op("torchlinearmoe::sum_over", mutates_args=())
def sum_over(x: Tensor, group: str) -> Tensor:
    """The sum of the ranks' x, on every rank."""
    y = x.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(y, group=_ranks(group))
    return y


@gather_rows.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0] * _ranks(group).size(), *x.shape[1:])


@scatter_rows.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return x.new_empty(x.shape[0] // _ranks(group).size(), *x.shape[1:])


@sum_over.register_fake
def _(x: Tensor, group: str) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _keep_group(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.group = inputs[1]


gather_rows.register_autograd(lambda ctx, grad: (scatter_rows(grad, ctx.group), None), setup_context=_keep_group)
scatter_rows.register_autograd(lambda ctx, grad: (gather_rows(grad, ctx.group), None), setup_context=_keep_group)
sum_over.register_autograd(lambda ctx, grad: (sum_over(grad, ctx.group), None), setup_context=_keep_group)
