"""Heads that stand for several."""

from __future__ import annotations

from typing import Any

from torchlinearmoe.kernels.heads import repeat_heads


def same_heads(*inputs: Any) -> Any:
    """Inputs [T, any divisor of H, ...] with their heads repeated to H, the most that any has; [H] and None pass."""
    heads = max(x.shape[1] for x in inputs if x is not None and x.dim() > 1)
    return tuple(x if x is None or x.dim() == 1 else repeat_heads(x, heads // x.shape[1]) for x in inputs)
