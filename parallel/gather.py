"""An all-gather in two halves, so that computation runs between them, in the backward pass too.

`start_gather` sends and returns at once; `finish_gather` waits. Backward goes the other way: `finish` starts the
reduce-scatter of the gradients, everything that autograd has recorded between the two runs, then `start` waits.
Each collective is counted in `traffic`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable


@dataclass
class Traffic:
    """What this rank has given to collectives of context parallelism."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    """By operation, the whole buffers: an all-gather's output, a reduce-scatter's input, an all-to-all's input."""

    def add(self, operation: str, size: int) -> None:
        self.calls[operation] = self.calls.get(operation, 0) + 1
        self.bytes[operation] = self.bytes.get(operation, 0) + size

    def clear(self) -> None:
        self.calls.clear()
        self.bytes.clear()


traffic = Traffic()


@dataclass(eq=False)
class Pending:
    """A collective under way: what `finish_gather` wants."""

    gathered: Tensor
    """[W, ...], not filled yet."""
    group: dist.ProcessGroup
    work: Any = None
    backward: Any = None
    """(work, gradient) of the reduce-scatter."""


def start_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to gather x [...] of all ranks of `group`."""
    pending = Pending(x, group)
    pending.gathered = _Start.apply(x, pending)  # pyright: ignore[reportAttributeAccessIssue]
    return pending


def finish_gather(pending: Pending) -> Tensor:
    """The gathered [W, ...]."""
    return _Finish.apply(pending.gathered, pending)  # pyright: ignore[reportReturnType]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pending):
        ctx.pending, group = pending, pending.group
        gathered = x.new_empty(dist.get_world_size(group), *x.shape)
        traffic.add("all-gather", gathered.nbytes)
        if x.device.type != "meta":
            pending.work = dist.all_gather_into_tensor(gathered.flatten(), x.contiguous().flatten(), group, True)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        work, grad = ctx.pending.backward
        ctx.pending.backward = None
        if work is not None:
            work.wait()
        return grad, None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathered, pending):
        ctx.pending = pending
        if pending.work is not None:
            pending.work.wait()
            pending.work = None
        return gathered.view_as(gathered)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        grad = grad.contiguous()
        traffic.add("reduce-scatter", grad.nbytes)
        share, work = torch.empty_like(grad[0]), None
        if grad.device.type != "meta":
            work = dist.reduce_scatter_tensor(share.flatten(), grad.flatten(), group=ctx.pending.group, async_op=True)
        ctx.pending.backward = work, share
        return grad, None
