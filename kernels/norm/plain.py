"""Plain PyTorch, which the compiler fuses with what is around it."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.precision import in_float32


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    mean_square: Tensor | None,
) -> Tensor:
    """As `rms_norm`."""
    wide = in_float32(x)
    if mean_square is None:
        mean_square = wide.square().mean(-1, keepdim=True)
    normed = wide * torch.rsqrt(mean_square + eps) * weight.to(wide.dtype)
    return normed.to(x.dtype) if gate is None else (normed * activation(gate.to(wide.dtype))).to(gate.dtype)


BACKEND = Backend("torch", norm, kinds=("plain", "gated"), order=0, fused=True)
