"""Our Triton kernels: what torch.compile fuses too, for eager calls; and a weight a row, for `kernels.experts`.

Bytes for R rows of hidden width F: forward reads 2 R F and writes R F; backward reads 3 and writes 2, or 3 where it
makes the hidden activations again. The compiler does not: it keeps them, since a product reads them in the backward.

R rows, F hidden width.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import NARROW, Backend

TILE = 2048
"""Elements of a tile, in 128 threads."""
WIDEST = 512
"""Columns of a tile."""


def swiglu(gate_up: Tensor) -> Tensor:
    """As `kernels.swiglu.swiglu`."""
    return gated(gate_up.flatten(0, -2)).unflatten(0, gate_up.shape[:-1])


@torch.library.custom_op("torchlinearmoe::swiglu", mutates_args=())
def gated(gate_up: Tensor) -> Tensor:
    """[R, 2F] -> [R, F]."""
    return forward(gate_up, None, None)


@torch.library.custom_op("torchlinearmoe::swiglu_backward", mutates_args=())
def gated_backward(gate_up: Tensor, dh: Tensor) -> Tensor:
    """The gradient of gate_up."""
    return backward(gate_up, None, None, dh)[0]


def forward(gate_up: Tensor, weights_Tk: Tensor | None, order_R: Tensor | None, limit: Tensor | None = None) -> Tensor:
    """[w] silu(gate) up, [R, 2F] -> [R, F]; row r has the weight of assignment order[r].

    limit: int32 [1], the first row that is not wanted and left as it is.
    """
    gate_up, R, F = gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
    h, B = gate_up.new_empty(R, F), columns(F)
    _kernels().swiglu_forward[-(-R // (TILE // B)), -(-F // B)](
        gate_up, _given(weights_Tk, gate_up), _given(order_R, gate_up), _given(limit, gate_up), h, R, F,
        WEIGHTED=weights_Tk is not None, LIMITED=limit is not None, ROWS=TILE // B, B=B, num_warps=4,
    )  # fmt: skip
    return h


def backward(
    gate_up: Tensor,
    weights_Tk: Tensor | None,
    order_R: Tensor | None,
    dh: Tensor,
    limit: Tensor | None = None,
    again: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """The gradient of gate_up; `again`, what `forward` gave; the gradient of the weights, where there are weights."""
    gate_up, R, F = gate_up.contiguous(), gate_up.shape[0], gate_up.shape[1] // 2
    dh = dh if dh.stride(1) == 1 else dh.contiguous()
    dgate_up, B = torch.empty_like(gate_up), columns(F)
    h = gate_up.new_empty(R, F) if again else None
    dweights_Tk = None if weights_Tk is None else torch.empty_like(weights_Tk, memory_format=torch.contiguous_format)
    _kernels().swiglu_backward[(-(-R // (TILE // B)),)](
        gate_up, _given(weights_Tk, gate_up), _given(order_R, gate_up), _given(limit, gate_up), dh, dgate_up,
        _given(h, gate_up), _given(dweights_Tk, gate_up), R, F, dh.stride(0),
        WEIGHTED=weights_Tk is not None, LIMITED=limit is not None, AGAIN=again, ROWS=TILE // B, B=B, num_warps=4,
    )  # fmt: skip
    return dgate_up, h, dweights_Tk


def columns(width: int) -> int:
    """Of a tile: the widest power of 2 that wastes none, at least 64, or all in one."""
    whole = 1 << max(width - 1, 0).bit_length()
    divides = width & -width
    return min(WIDEST, divides if divides >= 64 else whole)


def _given(x: Tensor | None, other: Tensor) -> Tensor:
    """A kernel's pointer; one that it does not use where there is none."""
    return other if x is None else x.contiguous()


@functools.cache
def _kernels() -> Any:  # Triton turns numbers into its own constants
    return importlib.import_module("torchlinearmoe.kernels.swiglu.triton_kernels")


@gated.register_fake
def _(gate_up):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


@gated_backward.register_fake
def _(gate_up, dh):
    return torch.empty_like(gate_up, memory_format=torch.contiguous_format)


gated.register_autograd(
    lambda ctx, dh: gated_backward(*ctx.saved_tensors, dh),
    setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs),
)


BACKEND = Backend(
    "triton",
    swiglu,
    kinds=("swiglu",),
    order=10,
    dtypes=NARROW,
    devices=frozenset(("cuda",)),
    needs=("triton",),
    install="pip install triton",
)
