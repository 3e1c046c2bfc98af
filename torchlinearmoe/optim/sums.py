"""Gradients of several micro-batches, summed in float32 where the weight is bfloat16.

A backward leaves a bfloat16 gradient; adding the next one to it would round every time. While a step accumulates, such
gradients are moved into float32 sums and freed: a large one as soon as it is complete, all small ones in one launch
when the micro-batch is over.

    micro-batch   .grad after it      sum
    1             none                g1
    2             none                g1 + g2
    end           the sum             none

A step of one micro-batch keeps its bfloat16 gradients as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchlinearmoe.optim.masters import laid_out_like, local_part, rest_of

LARGE = 2**22
"""Elements from which a gradient is worth a launch of its own, so that it can be freed before the others are there."""


class GradientSums:
    """The sums of one model's parameters; made once, before the first backward."""

    def __init__(self, model: nn.Module) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._active = False
        self._small: list[Tensor] = []
        for parameter in model.parameters():
            if rest_of(parameter) is None or not parameter.requires_grad:
                continue
            if local_part(parameter.detach()).numel() >= LARGE:
                parameter.register_post_accumulate_grad_hook(self._collect_large)
            else:
                self._small.append(parameter)

    @contextmanager
    def over(self, micro_batches: int) -> Iterator[None]:
        """The backwards of one step happen inside, a `collect` after each."""
        self._active = micro_batches > 1
        self._sums.clear()
        try:
            yield
        finally:
            self._active = False
        for parameter, total in self._sums.items():
            parameter.grad = laid_out_like(parameter, total)
        self._sums.clear()

    def collect(self) -> None:
        """A micro-batch is over."""
        if self._active:
            self._collect([parameter for parameter in self._small if parameter.grad is not None])

    def _collect_large(self, parameter: Tensor) -> None:
        if self._active:
            self._collect([parameter])

    @torch.no_grad()
    def _collect(self, parameters: Sequence[Tensor]) -> None:
        known = [parameter for parameter in parameters if parameter in self._sums]
        fresh = [parameter for parameter in parameters if parameter not in self._sums]
        for some, is_fresh in ((known, False), (fresh, True)):
            grads = [local_part(parameter.grad) for parameter in some if parameter.grad is not None]
            if not grads:
                continue
            for parameter, grad in zip(some, grads, strict=True):
                if is_fresh:
                    self._sums[parameter] = torch.empty_like(grad, dtype=torch.float32)
                parameter.grad = None
            _add([self._sums[parameter] for parameter in some], grads, is_fresh)


def start_sums(model: nn.Module) -> None:
    """Give every parameter with a bfloat16 weight a float32 zero to sum into, for whoever adds to `.grad` itself."""
    for parameter in model.parameters():
        if rest_of(parameter) is not None and parameter.requires_grad:
            zeros = torch.zeros_like(local_part(parameter.detach()), dtype=torch.float32)
            parameter.grad = laid_out_like(parameter, zeros)


def _add(totals: Sequence[Tensor], grads: Sequence[Tensor], fresh: bool) -> None:
    """totals += grads, or totals = grads where they are fresh."""
    if grads[0].device.type == "cuda":
        from torchlinearmoe.kernels.optimizer import triton
        from torchlinearmoe.kernels.optimizer.blocks import addresses, aligned, blocks_of

        grads = [aligned(grad) for grad in grads]
        device = grads[0].device
        blocks = blocks_of(tuple(grad.numel() for grad in grads), device)
        triton.add_gradients(blocks, addresses(totals, device), addresses(grads, device), fresh)
        return
    for total, grad in zip(totals, grads):
        if fresh:
            total.copy_(grad)
        else:
            total += grad
