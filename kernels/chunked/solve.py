"""Unit lower triangular systems, batched over chunks: an explicit inverse, merged from small blocks by matmuls.

    [ T1        ]             inverse of   [ L1      ]
    [ -T2 L21 T1   T2 ]                    [ L21  L2 ]

Only blocks of 16 are solved by substitution. The inverse also gives the backward pass, which then solves nothing.
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.blocks import blocks_below, diagonal_blocks

BASE = 16


def solve_unit_lower(lower: Tensor, right: Tensor) -> Tensor:
    """x with (I + strictly lower part of `lower`) x = right.

    lower: [..., C, C], C a power of two, the diagonal and what is above it ignored; right: [..., C, X].
    """
    return _SolveUnitLower.apply(lower, right)  # pyright: ignore[reportReturnType]


class _SolveUnitLower(torch.autograd.Function):
    @staticmethod
    def forward(ctx, lower, right):
        inverse = _inverse(lower)
        solution = torch.matmul(inverse, right)
        ctx.save_for_backward(inverse, solution)
        return solution

    @staticmethod
    def backward(ctx, d_solution):  # pyright: ignore[reportIncompatibleMethodOverride]
        inverse, solution = ctx.saved_tensors
        d_right = torch.matmul(inverse.transpose(-1, -2), d_solution)
        d_lower = torch.matmul(d_right, solution.transpose(-1, -2)).neg_().tril_(-1)
        return d_lower, d_right


def _inverse(lower: Tensor) -> Tensor:
    C = lower.shape[-1]
    size = min(BASE, C)
    blocks = diagonal_blocks(lower, size).contiguous()
    identity = torch.eye(size, dtype=lower.dtype, device=lower.device).expand_as(blocks)
    inverse = torch.linalg.solve_triangular(blocks, identity, upper=False, unitriangular=True)
    while size < C:
        first, second = inverse.unflatten(-3, (-1, 2)).unbind(-3)
        merged = inverse.new_zeros(*first.shape[:-2], 2 * size, 2 * size)
        merged[..., :size, :size] = first
        merged[..., size:, size:] = second
        merged[..., size:, :size] = torch.matmul(second, torch.matmul(blocks_below(lower, size), first)).neg_()
        inverse = merged
        size *= 2
    return inverse.squeeze(-3)
