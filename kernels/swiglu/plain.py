"""Plain PyTorch that saves nothing but its input and writes its gradient in one piece."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        ctx.save_for_backward(gate_up)
        gate, up = gate_up.chunk(2, -1)
        return F.silu(gate) * up  # not in place: torch 2.11 would compile a wrong backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        (gate_up,) = ctx.saved_tensors
        gate, up = gate_up.chunk(2, -1)
        return torch.cat((torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)), -1)


def swiglu(gate_up: Tensor) -> Tensor:
    """As `kernels.swiglu.swiglu`."""
    return _SwiGLU.apply(gate_up)  # pyright: ignore[reportReturnType]


BACKEND = Backend("torch", swiglu, kinds=("swiglu",), order=0, fused=True)
