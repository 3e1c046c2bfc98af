"""Gradients of several micro-batches, summed in float32 where the weight is bfloat16.

A backward leaves a bfloat16 gradient; adding the next one to it would round every time. While a step accumulates, such
gradients are moved out of `.grad` before the next ones come. Of M = 4 micro-batches, of a large parameter:

    micro-batch   .grad after it    beside it
    1             none              g1                     bfloat16, as it is
    2             none              g1 + g2                float32
    3             none              g1 + g2 + g3
    4             g4                g1 + g2 + g3           norm and update add both as they read them

A large gradient is moved as soon as it is complete and freed; all small ones together when the micro-batch is over,
the last ones too, so that theirs is one float32 `.grad` in the end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from torchlinearmoe.optim.gradients import for_launch, set_earlier
from torchlinearmoe.optim.masters import laid_out_like, local_part, rest_of

LARGE = 2**22
"""Elements from which a gradient is worth a launch of its own, so that it can be freed before the others are there."""


class GradientSums:
    """The sums of one model's parameters; made once, before the first backward."""

    def __init__(self, model: nn.Module) -> None:
        self._sums: dict[Tensor, Tensor] = {}
        self._left = 0
        self._small: list[Tensor] = []
        self._large: list[Tensor] = []
        for parameter in model.parameters():
            if rest_of(parameter) is None or not parameter.requires_grad:
                continue
            if local_part(parameter.detach()).numel() >= LARGE:
                parameter.register_post_accumulate_grad_hook(self._collect_large)
                self._large.append(parameter)
            else:
                self._small.append(parameter)

    @contextmanager
    def over(self, micro_batches: int) -> Iterator[None]:
        """The backwards of one step happen inside, a `collect` after each."""
        self._left = micro_batches if micro_batches > 1 else 0
        for parameter in self._large:
            set_earlier(parameter, None)
        try:
            yield
            for parameter, total in self._sums.items():
                if parameter.grad is None:
                    parameter.grad = laid_out_like(parameter, total)
                else:
                    set_earlier(parameter, total)
        finally:
            self._left = 0
            self._sums.clear()

    def collect(self) -> None:
        """A micro-batch is over."""
        if self._left:
            self._collect([parameter for parameter in self._small if parameter.grad is not None])
            self._left -= 1

    def _collect_large(self, parameter: Tensor) -> None:
        if self._left > 1:  # the last one stays
            self._collect([parameter])

    @torch.no_grad()
    def _collect(self, parameters: Sequence[Tensor]) -> None:
        """Move gradients into the sums."""
        together: dict[torch.dtype, list[tuple[Tensor, Tensor, Tensor]]] = {}
        for parameter in parameters:
            assert parameter.grad is not None
            grad, earlier = local_part(parameter.grad), self._sums.get(parameter)
            parameter.grad = None
            if earlier is None:
                self._sums[parameter] = grad
            else:
                together.setdefault(earlier.dtype, []).append((parameter, earlier, grad))
        for dtype, members in together.items():
            pairs = [(grad, earlier) for _, earlier, grad in members]
            totals = [e if dtype == torch.float32 else torch.empty_like(e, dtype=torch.float32) for _, e in pairs]
            add_parts(totals, pairs)
            for (parameter, *_), total in zip(members, totals):
                self._sums[parameter] = total


def held_bytes(parameter: Tensor, micro_batches: int, in_parts: bool) -> int:
    """Bytes of the gradient of a parameter with a bfloat16 weight when a step's last backward is over.

    in_parts: `GradientSums` collects them; else they are summed where they lie (`start_sums`).
    """
    elements = local_part(parameter.detach()).numel()
    if micro_batches == 1:
        return 2 * elements
    if in_parts and elements >= LARGE:
        return (4 if micro_batches == 2 else 6) * elements
    return 4 * elements


def start_sums(model: nn.Module) -> None:
    """Give every parameter with a bfloat16 weight a float32 zero to sum into, for whoever adds to `.grad` itself."""
    for parameter in model.parameters():
        if rest_of(parameter) is not None and parameter.requires_grad:
            zeros = torch.zeros_like(local_part(parameter.detach()), dtype=torch.float32)
            parameter.grad = laid_out_like(parameter, zeros)


def add_parts(totals: Sequence[Tensor], pairs: Sequence[tuple[Tensor, Tensor]]) -> None:
    """totals = last + earlier of each pair, which may be the total itself."""
    if totals[0].device.type == "cuda" and all(grad.dtype == torch.bfloat16 for grad, _ in pairs):
        from torchlinearmoe.kernels.optimizer import triton
        from torchlinearmoe.kernels.optimizer.blocks import addresses, blocks_of

        blocks = blocks_of(tuple(total.numel() for total in totals), totals[0].device)
        triton.add_gradients(blocks, addresses(totals, totals[0].device), for_launch(pairs))
        return
    for total, (grad, earlier) in zip(totals, pairs):
        torch.add(earlier.float(), grad, out=total)
