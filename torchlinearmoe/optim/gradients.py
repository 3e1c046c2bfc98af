"""A parameter's gradient, which may come in two parts.

`.grad` is what autograd gave last. While micro-batches are summed, what the earlier ones gave may lie beside it
(`sums.GradientSums`): the gradient is the sum of both, added up by whoever reads it next.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from torchlinearmoe.optim.masters import local_part

if TYPE_CHECKING:
    from torchlinearmoe.kernels.optimizer.triton import Gradients

KERNEL_TYPES = (torch.float32, torch.bfloat16)
"""What launches over many gradients take."""

Parts = tuple[Tensor, Tensor | None]
"""The last part and the earlier one."""


def set_earlier(parameter: Tensor, earlier: Tensor | None) -> None:
    """Lay the local, earlier part of a parameter's gradient beside `.grad`; None for nothing."""
    if earlier is None:
        vars(parameter).pop("earlier_gradient", None)
    else:
        parameter.earlier_gradient = earlier  # pyright: ignore[reportAttributeAccessIssue]


def clear_gradients(parameters: Iterable[Tensor]) -> None:
    """Forget the gradients, all parts of them."""
    for parameter in parameters:
        parameter.grad = None
        set_earlier(parameter, None)


def gradient_parts(parameter: Tensor) -> Parts | None:
    """This rank's parts of a parameter's gradient; None where there is none."""
    if parameter.grad is None:
        return None
    if isinstance(parameter.grad, DTensor):
        assert isinstance(parameter, DTensor) and parameter.grad.placements == parameter.placements, (
            f"a gradient is laid out as {parameter.grad.placements}, its parameter otherwise: it was not reduced"
        )
    return local_part(parameter.grad), vars(parameter).get("earlier_gradient")


def types_of(parts: Parts) -> tuple[torch.dtype, torch.dtype | None]:
    """The types of the last and of the earlier part."""
    last, earlier = parts
    return last.dtype, None if earlier is None else earlier.dtype


def summed(parts: Parts) -> Tensor:
    """The gradient as one tensor: float32 where it was two."""
    last, earlier = parts
    return last if earlier is None else earlier.float() + last


def for_launch(gradients: Sequence[Parts]) -> Gradients:
    """The gradients, alike in their types, as kernels read them."""
    from torchlinearmoe.kernels.optimizer.blocks import addresses, aligned
    from torchlinearmoe.kernels.optimizer.triton import Gradients

    dtype, earlier_dtype = types_of(gradients[0])
    device = gradients[0][0].device
    last = [aligned(part) for part, _ in gradients]
    earlier = [aligned(part) for _, part in gradients if part is not None]
    found = addresses(last, device)
    before = addresses(earlier, device) if earlier else found
    return Gradients(found, dtype, before, earlier_dtype, (*last, *earlier))
