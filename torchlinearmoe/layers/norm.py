"""RMSNorm as a module."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from torchlinearmoe.initialize import ONES, set_initializers
from torchlinearmoe.kernels.norm import rms_norm


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim; `kernels.norm.rms_norm`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES)
        self.mean_square: Callable[[Tensor], Tensor] | None = None
        """[..., width] -> [..., 1], in float32; given where ranks hold parts of the width."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        mean_square = None
        if self.mean_square is not None:
            mean_square = self.mean_square(x if x.dtype == torch.float64 else x.float())
        return rms_norm(x, self.weight, self.eps, mean_square=mean_square)
