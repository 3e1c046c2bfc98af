"""Grouped heads."""

from torch import Tensor


def repeat_heads(x: Tensor, times: int) -> Tensor:
    """Each head of dim 1 `times` times in a row, [T, G, ...] -> [T, G times, ...]; one head becomes a view.

    Heads 0 1 twice: 0 0 1 1, so that query head h reads key-value head h // times.
    """
    if times == 1:
        return x
    return x.unsqueeze(2).expand(-1, -1, times, *x.shape[2:]).flatten(1, 2)
