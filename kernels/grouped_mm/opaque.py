"""A pair of functions as operators that the compiler does not look into, with a gradient of any stride."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Tensor, Tensor, Tensor], Tensor]


def as_operator(name: str, product: Product, weight_product: Product) -> Product:
    """`product`, differentiable, as the operator `torchlinearmoe::NAME`.

    product: x [R, M], w [E, M, N], offsets [E] -> [R, N]; weight_product: x [R, M], dy [R, N], offsets [E] -> the
    gradient by w, zero for an empty group.
    """
    multiply = torch.library.custom_op(f"torchlinearmoe::{name}", product, mutates_args=())
    multiply_weight = torch.library.custom_op(f"torchlinearmoe::{name}_weight", weight_product, mutates_args=())

    @multiply.register_fake
    def _(x_RM: Tensor, w_EMN: Tensor, offsets_E: Tensor) -> Tensor:
        return x_RM.new_empty(x_RM.shape[0], w_EMN.shape[-1])

    @multiply_weight.register_fake
    def _(x_RM: Tensor, dy_RN: Tensor, offsets_E: Tensor) -> Tensor:
        return x_RM.new_empty(offsets_E.shape[0], x_RM.shape[1], dy_RN.shape[1])

    def save(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    def backward(ctx: Any, dy_RN: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_RM, w_EMN, offsets_E = ctx.saved_tensors
        dx_RM = multiply(dy_RN, w_EMN.transpose(1, 2), offsets_E) if ctx.needs_input_grad[0] else None
        dw_EMN = multiply_weight(x_RM, dy_RN, offsets_E) if ctx.needs_input_grad[1] else None
        return dx_RM, dw_EMN, None

    multiply.register_autograd(backward, setup_context=save)
    return multiply
