"""Sums of squares over many tensors."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

_IN_ONE_LAUNCH = (torch.float32, torch.bfloat16)


@torch.no_grad()
def square_sum(pieces: Sequence[Tensor], like: Tensor) -> Tensor:
    """Sum of the squares of all elements, accumulated in the dtype of `like`: 0-dim, always in the same order."""
    if not pieces:
        return torch.zeros_like(like)
    if like.device.type == "cuda" and like.dtype == torch.float32 and all(p.dtype in _IN_ONE_LAUNCH for p in pieces):
        return _in_one_launch(pieces)
    norms = torch._foreach_norm(list(pieces), 2.0, dtype=like.dtype)
    return torch.stack(norms).square().sum()


def _in_one_launch(pieces: Sequence[Tensor]) -> Tensor:
    """One launch a dtype."""
    from torchlinearmoe.kernels.optimizer import triton
    from torchlinearmoe.kernels.optimizer.blocks import addresses, aligned, blocks_of

    device, sums = pieces[0].device, []
    for dtype in _IN_ONE_LAUNCH:
        some = [aligned(piece) for piece in pieces if piece.dtype == dtype]
        if some:
            blocks = blocks_of(tuple(piece.numel() for piece in some), device)
            sums.append(triton.square_sum(blocks, addresses(some, device), dtype == torch.bfloat16))
    return torch.stack(sums).sum()
