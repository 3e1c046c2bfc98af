"""What must not be rounded is computed in float32, or in float64 where that is what comes in."""

from __future__ import annotations

import torch
from torch import Tensor


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """float32 for every type but float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def in_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()
