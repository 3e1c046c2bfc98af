"""Heads that others stand for, and the type in which what must not be rounded is computed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from torchlinearmoe.kernels.heads import repeat_heads


def in_float32(x: Tensor) -> Tensor:
    """x in float32; float64 stays."""
    return x if x.dtype == torch.float64 else x.float()


def same_heads(*inputs: Any) -> Any:
    """Inputs [T, any divisor of H, ...] with their heads repeated to H, the most that any has; [H] and None pass."""
    heads = max(x.shape[1] for x in inputs if x is not None and x.dim() > 1)
    return tuple(x if x is None or x.dim() == 1 else repeat_heads(x, heads // x.shape[1]) for x in inputs)
