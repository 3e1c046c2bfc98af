"""Gradients of several micro-batches, summed in float32 where the weight is bfloat16.

A backward leaves a bfloat16 gradient; adding the next one to it would round every time. While a step accumulates, each
such gradient is moved into a float32 sum as soon as it is complete, and is freed:

    micro-batch   .grad after a parameter's backward      sum
    1             none                                    g1
    2             none                                    g1 + g2
    end           the sum                                 none

A step of one micro-batch keeps its bfloat16 gradients as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchlinearmoe.optim.masters import laid_out_like, local_part, rest_of


class GradientSums:
    """The sums of one model's parameters; made once, before the first backward."""

    def __init__(self, model: nn.Module) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._active = False
        for parameter in model.parameters():
            if rest_of(parameter) is not None and parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(self._collect)

    @contextmanager
    def over(self, micro_batches: int) -> Iterator[None]:
        """The backwards of one step happen inside."""
        self._active = micro_batches > 1
        self._sums.clear()
        try:
            yield
        finally:
            self._active = False
        for parameter, total in self._sums.items():
            parameter.grad = laid_out_like(parameter, total)
        self._sums.clear()

    @torch.no_grad()
    def _collect(self, parameter: Tensor) -> None:
        if not self._active:
            return
        assert parameter.grad is not None
        self._sums[parameter] = _add(self._sums.get(parameter), local_part(parameter.grad))
        parameter.grad = None


def start_sums(model: nn.Module) -> None:
    """Give every parameter with a bfloat16 weight a float32 zero to sum into, for whoever adds to `.grad` itself."""
    for parameter in model.parameters():
        if rest_of(parameter) is not None and parameter.requires_grad:
            zeros = torch.zeros_like(local_part(parameter.detach()), dtype=torch.float32)
            parameter.grad = laid_out_like(parameter, zeros)


def _add(total: Tensor | None, grad: Tensor) -> Tensor:
    if grad.device.type == "cuda" and grad.dtype == torch.bfloat16 and grad.is_contiguous():
        from torchlinearmoe.kernels.optimizer.triton import add_gradient

        return add_gradient(total, grad)
    return grad.float() if total is None else total.add_(grad)
