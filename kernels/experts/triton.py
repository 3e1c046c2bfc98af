"""From tokens to their sums in one operator: our Triton kernels around the grouped products.

The routing weight enters where silu(gate) * up is made, since w (h D_e) = (w h) D_e: the way home is then a sum of
rows, and the gradient of w a sum over the row that the backward pass of the gate has at hand.

    forward    sort 2 | gather x | product | gate | product | sum of rows                          7 launches
    backward   gather dy | product | gate's gradients, h again | weight's product | gather x
               | weight's product | product | sum of rows                                          8 launches

Kept for the backward pass are the inputs, the indices and what the first product gave: 2 F numbers a row, against
2 D + 3 F of the steps one by one, whose rows, hidden activations and outputs each wait for a gradient. Bytes of all but
the products, for R rows (indices and what tokens have once left out):

    forward    x written D | gate read 2 F, written F | sum read D                                 2 D + 3 F
    backward   dy written D | gate read 3 F, written 3 F | x written D | sum read D                3 D + 6 F

R = 131072, D = 1024, F = 896, bfloat16: 1.24 and 2.21 GB, 0.29 and 0.52 ms at 4.2 TB/s, beside 2.16 TFLOP of products.

Rows that no expert has (dropped assignments, padding) come last; kernels look up on the device where they begin.

T tokens, k experts a token, R = T * k rows, D model width, F expert width, E experts.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels import grouped_mm
from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.dispatch import triton as dispatch
from torchlinearmoe.kernels.grouped_mm import fused, loop
from torchlinearmoe.kernels.operator import NARROW, Backend
from torchlinearmoe.kernels.swiglu import triton as gates

PRODUCTS: dict[str, ModuleType] = {module.BACKEND.name: module for module in (fused, loop)}
"""Backends of the grouped product, each with `product` and `weight_product`."""


def experts(
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    keep_Tk: Tensor | None,
    products: str,
) -> Tensor:
    """As `routed_experts`."""
    _, hidden, width = down_EFD.shape
    facts = grouped_mm.call(hidden, width, x_TD.device.type, x_TD.dtype)
    name = choose(grouped_mm.OPERATOR, products, facts).name
    return whole(x_TD, ids_Tk, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, name)[0]


@torch.library.custom_op("torchlinearmoe::routed_experts", mutates_args=())
def whole(
    x_TD: Tensor,
    ids_Tk: Tensor,
    weights_Tk: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    keep_Tk: Tensor | None,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """y [T, D]; and for the backward pass gate_up of the rows [R, 2F], order [R], inverse [T, k], offsets [E]."""
    order_R, inverse_Tk, _, offsets_E = dispatch.sorted_rows(ids_Tk, down_EFD.shape[0], keep_Tk)
    limit, product = _limit(offsets_E, keep_Tk), PRODUCTS[products].product
    x_RD = dispatch.spread_tokens(x_TD, inverse_Tk, limit)
    gate_up_RF = product(x_RD, gate_up_EDF, offsets_E)
    del x_RD
    hidden_RF = gates.forward(gate_up_RF, weights_Tk, order_R, limit)
    y_TD = dispatch.gather_sum(product(hidden_RF, down_EFD, offsets_E), None, inverse_Tk, limit)
    return y_TD, gate_up_RF, order_R, inverse_Tk, offsets_E


@torch.library.custom_op("torchlinearmoe::routed_experts_backward", mutates_args=())
def whole_backward(
    x_TD: Tensor,
    weights_Tk: Tensor,
    gate_up_EDF: Tensor,
    down_EFD: Tensor,
    keep_Tk: Tensor | None,
    gate_up_RF: Tensor,
    order_R: Tensor,
    inverse_Tk: Tensor,
    offsets_E: Tensor,
    dy_TD: Tensor,
    products: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The gradients of x, weights, gate_up and down."""
    limit = _limit(offsets_E, keep_Tk)
    product, weight_product = PRODUCTS[products].product, PRODUCTS[products].weight_product
    dy_RD = dispatch.spread_tokens(dy_TD, inverse_Tk, limit)
    dhidden_RF = product(dy_RD, down_EFD.transpose(1, 2), offsets_E)
    dgate_up_RF, hidden_RF, dweights_Tk = gates.backward(gate_up_RF, weights_Tk, order_R, dhidden_RF, limit, again=True)
    assert hidden_RF is not None and dweights_Tk is not None
    del dhidden_RF
    ddown_EFD = weight_product(hidden_RF, dy_RD, offsets_E)
    del hidden_RF, dy_RD
    x_RD = dispatch.spread_tokens(x_TD, inverse_Tk, limit)
    dgate_up_EDF = weight_product(x_RD, dgate_up_RF, offsets_E)
    del x_RD
    dx_RD = product(dgate_up_RF, gate_up_EDF.transpose(1, 2), offsets_E)
    return dispatch.gather_sum(dx_RD, None, inverse_Tk, limit), dweights_Tk, dgate_up_EDF, ddown_EFD


def _limit(offsets_E: Tensor, keep_Tk: Tensor | None) -> Tensor | None:
    """The first row without an expert; None where every row has one."""
    return None if keep_Tk is None else offsets_E[-1:]


@whole.register_fake
def _(x_TD, ids_Tk, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, products):
    R, longs = ids_Tk.numel(), {"dtype": torch.int64}
    return (
        torch.empty_like(x_TD, memory_format=torch.contiguous_format),
        x_TD.new_empty(R, gate_up_EDF.shape[2]),
        ids_Tk.new_empty(R, **longs),
        ids_Tk.new_empty(ids_Tk.shape, **longs),
        ids_Tk.new_empty(down_EFD.shape[0], dtype=torch.int32),
    )


@whole_backward.register_fake
def _(x_TD, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, gate_up_RF, order_R, inverse_Tk, offsets_E, dy_TD, products):
    inputs = (x_TD, weights_Tk, gate_up_EDF, down_EFD)
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, ctx.products = inputs
    _, *made = output
    ctx.mark_non_differentiable(*made)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(x_TD, weights_Tk, gate_up_EDF, down_EFD, keep_Tk, *made)


def _backward(ctx: Any, dy_TD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dy_TD is None:
        return (None,) * 7
    dx_TD, dweights_Tk, dgate_up_EDF, ddown_EFD = whole_backward(*ctx.saved_tensors, dy_TD, ctx.products)
    return dx_TD, None, dweights_Tk, dgate_up_EDF, ddown_EFD, None, None


whole.register_autograd(_backward, setup_context=_save)


BACKEND = Backend(
    "triton",
    experts,
    kinds=("experts",),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
    graphed=True,
)
