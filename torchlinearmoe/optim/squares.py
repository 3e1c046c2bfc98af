"""Sums of squares over many gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from torchlinearmoe.optim.gradients import KERNEL_TYPES, Parts, for_launch, summed, types_of


@torch.no_grad()
def square_sum(gradients: Sequence[Parts], like: Tensor) -> Tensor:
    """Sum of the squares of all elements, accumulated in the dtype of `like`: 0-dim, always in the same order."""
    if not gradients:
        return torch.zeros_like(like)
    kinds: dict[object, list[Parts]] = {}
    for parts in gradients:
        kinds.setdefault(types_of(parts), []).append(parts)
    known = all(part.dtype in KERNEL_TYPES for parts in gradients for part in parts if part is not None)
    if like.device.type == "cuda" and like.dtype == torch.float32 and known:
        return torch.stack([_in_one_launch(some) for some in kinds.values()]).sum()
    norms = torch._foreach_norm([summed(parts) for parts in gradients], 2.0, dtype=like.dtype)
    return torch.stack(norms).square().sum()


def _in_one_launch(gradients: Sequence[Parts]) -> Tensor:
    from torchlinearmoe.kernels.optimizer import triton
    from torchlinearmoe.kernels.optimizer.blocks import blocks_of

    blocks = blocks_of(tuple(last.numel() for last, _ in gradients), gradients[0][0].device)
    return triton.square_sum(blocks, for_launch(gradients))
