"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864), half-split layout as in the published models."""

from __future__ import annotations

import torch
from torch import Tensor


def rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """Rotate the pairs (x[i], x[i + d/2]) of every head.

    x: [T, H, d]; cosines, sines: [T, d/2]. Computed in float32 (float64 stays), returned in x's type.
    """
    kind = torch.float64 if x.dtype == torch.float64 else torch.float32
    first, second = x.to(kind).chunk(2, dim=-1)
    cosines, sines = cosines.to(kind)[:, None], sines.to(kind)[:, None]
    return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1).to(x.dtype)
