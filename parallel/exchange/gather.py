"""The collectives of context parallelism, each counted in `traffic`.

An all-gather comes in two halves, so that computation runs between them, in the backward pass too: `start_gather` sends
and returns at once, `finish_gather` waits. Backward goes the other way: `finish` starts the reduce-scatter of the
gradients, what autograd has recorded between the two runs, then `start` waits.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

collectives = torch.ops._c10d_functional


@dataclass
class Traffic:
    """What this rank has given to collectives of context parallelism."""

    calls: dict[str, int] = field(default_factory=dict)
    bytes: dict[str, int] = field(default_factory=dict)
    """By operation, the whole buffers: an all-gather's output, a reduce-scatter's input, what an all-to-all moves."""

    def add(self, operation: str, size: int) -> None:
        """Count a collective over `size` bytes."""
        self.calls[operation] = self.calls.get(operation, 0) + 1
        self.bytes[operation] = self.bytes.get(operation, 0) + size

    def clear(self) -> None:
        """Forget everything."""
        self.calls.clear()
        self.bytes.clear()


traffic = Traffic()


@dataclass(eq=False)
class Pending:
    """A gather under way: what `finish_gather` wants."""

    gathered: Tensor
    """All ranks' tensors one after the other along dim 0, not filled yet."""
    group: dist.ProcessGroup
    share: Tensor | None = None
    """In the backward pass, this rank's share of the gradient, not filled yet."""


def start_gather(x: Tensor, group: dist.ProcessGroup) -> Pending:
    """Begin to gather x [...] of all ranks of `group`."""
    pending = Pending(x, group)
    pending.gathered = _Start.apply(x, pending)  # pyright: ignore[reportAttributeAccessIssue]
    return pending


def finish_gather(pending: Pending) -> Tensor:
    """The gathered [W, ...]."""
    return _Finish.apply(pending.gathered, pending)  # pyright: ignore[reportReturnType]


def all_to_all(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """x [W, ...], one part for each rank of `group`, to the parts that they have for this one, [W, ...]."""
    return _AllToAll.apply(x, group)  # pyright: ignore[reportReturnType]


class _Start(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, pending):
        ctx.pending = pending
        size = dist.get_world_size(pending.group)
        gathered = collectives.all_gather_into_tensor(x.contiguous(), size, pending.group.group_name)
        traffic.add("all-gather, forward", gathered.nbytes)
        return gathered

    @staticmethod
    @once_differentiable
    def backward(ctx, _):  # pyright: ignore[reportIncompatibleMethodOverride]
        share, ctx.pending.share = ctx.pending.share, None
        return collectives.wait_tensor(share), None


class _Finish(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gathered, pending):
        ctx.pending = pending
        return collectives.wait_tensor(gathered).unflatten(0, (dist.get_world_size(pending.group), -1))

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        pending, size = ctx.pending, grad.shape[0]
        traffic.add("reduce-scatter, backward", grad.nbytes)
        whole = grad.contiguous().flatten(0, 1)
        share = collectives.reduce_scatter_tensor(whole, "sum", size, pending.group.group_name)
        pending.share = share
        return whole, None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return _exchanged(x, group, "forward")

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):  # pyright: ignore[reportIncompatibleMethodOverride]
        return _exchanged(grad, ctx.group, "backward"), None


def _exchanged(x: Tensor, group: dist.ProcessGroup, way: str) -> Tensor:
    traffic.add(f"all-to-all, {way}", x.nbytes)
    ones = [1] * x.shape[0]
    return collectives.wait_tensor(collectives.all_to_all_single(x.contiguous(), ones, ones, group.group_name))
