"""The definition: the formula in the inputs' own type."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinearmoe.kernels.operator import Backend


def norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    gate: Tensor | None,
    activation: Callable[[Tensor], Tensor],
    mean_square: Tensor | None,
) -> Tensor:
    """As `rms_norm`."""
    if mean_square is None:
        mean_square = (x**2).sum(-1, keepdim=True) / x.shape[-1]
    normed = x / torch.sqrt(mean_square + eps) * weight
    return normed.to(x.dtype) if gate is None else (normed * activation(gate)).to(gate.dtype)


BACKEND = Backend("reference", norm, kinds=("plain", "gated"))
