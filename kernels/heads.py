"""Grouped heads."""

from typing import Any

from torch import Tensor


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Each head of dim 1 `times` times in a row, [T, G, ...] -> [T, G times, ...]; one head becomes a view.

    Heads 0 1 twice: 0 0 1 1, so that query head h reads key-value head h // times.
    """
    if times == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, times, *x.shape[2:]).flatten(1, 2)


def same_heads(*inputs: Any) -> Any:
    """Inputs [T, any divisor of H, ...] with their heads repeated to H, the most that any has; [H] and None pass."""
    heads = max(x.shape[1] for x in inputs if x is not None and x.dim() > 1)
    return tuple(x if x is None or x.dim() == 1 else repeat_heads(x, heads // x.shape[1]) for x in inputs)
