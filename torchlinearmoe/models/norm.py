"""RMSNorm with float32 statistics (Zhang and Sennrich 2019, arXiv 1910.07467)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from torchlinearmoe.initialize import ONES, set_initializers


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight over the last dim.

    Statistics in float32 (float64 stays), result in x's type.
    """

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES)

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        wide = x if x.dtype == torch.float64 else x.float()
        scale = torch.rsqrt(self.mean_square(wide) + self.eps)
        return (wide * scale * self.weight.to(wide.dtype)).to(x.dtype)

    def mean_square(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., 1]; replaced where ranks hold parts of the width."""
        return x.square().mean(-1, keepdim=True)
