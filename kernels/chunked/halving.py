"""Scores under a decay per channel by halving: safe for any decay, and all matmuls.

The score of query t and key s < t is sum_c q_tc k_sc a_(s+1)c ... a_tc. Pulling the product apart as e^{G_t} e^{-G_s}
overflows. Halving does not: with a border anywhere between s and t it is (border..t) times (s+1..border), both at most
1. So blocks are merged in pairs, of 1, 2, 4, ... tokens, up to the chunk. At each merge the right block's queries carry
their decay since the border, the left block's keys theirs until the border, and one matmul gives all scores between the
two. Going up a level multiplies the right queries by the left block's whole decay and the left keys by the right
block's. Nothing is divided or subtracted: a decay of 0 is exact, in the gradients too.

    8 tokens, blocks of 2 merging:   queries 2 3 | 6 7   against keys 0 1 | 4 5
"""

import torch
from torch import Tensor

from torchlinearmoe.kernels.chunked.blocks import blocks_below
from torchlinearmoe.kernels.chunked.decay import drop_negligible


def halved_scores(
    q: Tensor, k: Tensor, a: Tensor, own: Tensor, matmul_dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Scores of R kinds of queries against W kinds of keys, of every earlier token of the chunk, `own` on the diagonal.

    q: [R, ..., C, K], decayed by its own token already (or not, where a query reads the state before its token);
    k: [W, ..., C, K]; a: [..., C, K], decays in [0, 1]; own: [R, W, ..., C], each query's score against its own token's
    key; C a power of two; all in fp32 or fp64, contiguous. Returns the scores [R, W, ..., C, C] (lower triangular, in
    `matmul_dtype`), the queries decayed since the chunk's start [R, ..., C, K] and the keys decayed until its end
    [W, ..., C, K].
    """
    return _HalvedScores.apply(q, k, a, own, matmul_dtype)  # pyright: ignore[reportReturnType]


class _HalvedScores(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, a, own, matmul_dtype):
        C, K = a.shape[-2:]
        q_in, k_out = (x.clone(memory_format=torch.contiguous_format) for x in (q, k))
        scores = torch.zeros(*own.shape, C, dtype=matmul_dtype, device=q.device)
        scores.diagonal(dim1=-2, dim2=-1).copy_(own)
        total = a.reshape(-1, K)
        saved = []
        size = 1
        while size < C:
            right, left = _halves(q_in, size)[1], _halves(k_out, size)[0]
            before, after = total.view(-1, 2, 1, K).unbind(1)
            q_right, k_left = _stack_kinds(right), _stack_kinds(left)
            saved += [q_right, k_left, before, after]
            blocks = blocks_below(scores, size)
            between = _outer(q_right.to(matmul_dtype), k_left.to(matmul_dtype))
            blocks.copy_(_split_kinds(between, blocks))
            right.mul_(before)
            left.mul_(after)
            total = drop_negligible(before * after)
            size *= 2
        ctx.save_for_backward(*saved)
        return scores, q_in, k_out

    @staticmethod
    def backward(ctx, d_scores, d_q_in, d_k_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        C, K = d_q_in.shape[-2:]
        saved = ctx.saved_tensors
        dq, dk = (x.clone(memory_format=torch.contiguous_format) for x in (d_q_in, d_k_out))
        d_total = None
        size = C // 2
        while size >= 1:
            q_right, k_left, before, after = saved[-4:]
            saved = saved[:-4]
            d_right, d_left = _halves(dq, size)[1], _halves(dk, size)[0]
            d_before = (d_right * _unstack_kinds(q_right, size)).sum((0, 2)).unsqueeze(1)
            d_after = (d_left * _unstack_kinds(k_left, size)).sum((0, 2)).unsqueeze(1)
            if d_total is not None:
                d_total = d_total.view_as(before)
                d_before, d_after = d_before + d_total * after, d_after + d_total * before
            d_total = torch.cat([d_before, d_after], 1).view(-1, 1, K)
            d_block = _join_kinds(blocks_below(d_scores, size))
            d_q_right = _product(d_block, k_left.to(d_block.dtype))
            d_k_left = _product(d_block.transpose(1, 2), q_right.to(d_block.dtype))
            d_right.mul_(before).add_(_unstack_kinds(d_q_right, size))
            d_left.mul_(after).add_(_unstack_kinds(d_k_left, size))
            size //= 2
        d_a = torch.zeros_like(dq[0]) if d_total is None else d_total.view(dq.shape[1:])
        d_own = d_scores.diagonal(dim1=-2, dim2=-1).to(dq.dtype)
        return dq, dk, d_a, d_own, None


def _halves(x: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """The left and right block of every pair: views [R, pairs, size, K] of a contiguous [R, ..., C, K]."""
    left, right = x.view(x.shape[0], -1, 2, size, x.shape[-1]).unbind(2)
    return left, right


def _stack_kinds(x: Tensor) -> Tensor:
    """[R, pairs, size, K] to a contiguous copy [pairs, R size, K]: one matmul for all kinds."""
    return x.transpose(0, 1).clone(memory_format=torch.contiguous_format).flatten(1, 2)


def _unstack_kinds(x: Tensor, size: int) -> Tensor:
    """The inverse of `_stack_kinds`, a view."""
    return x.unflatten(1, (-1, size)).transpose(0, 1)


def _split_kinds(between: Tensor, blocks: Tensor) -> Tensor:
    """[pairs, R size, W size] as a view in the shape of `blocks`, [R, W, ..., pairs of a chunk, size, size]."""
    R, W = blocks.shape[:2]
    size = blocks.shape[-1]
    return between.view(*blocks.shape[2:-2], R, size, W, size).movedim((-4, -2), (0, 1))


def _join_kinds(blocks: Tensor) -> Tensor:
    """The inverse of `_split_kinds`, a copy."""
    R, W, size = *blocks.shape[:2], blocks.shape[-1]
    return blocks.movedim((0, 1), (-4, -2)).reshape(-1, R * size, W * size)


def _outer(q: Tensor, k: Tensor) -> Tensor:
    """q k^T for many small blocks; below 4 tokens a batched matmul costs more than it computes."""
    if q.shape[1] < 4:
        return (q.unsqueeze(2) * k.unsqueeze(1)).sum(-1)
    return torch.bmm(q, k.transpose(1, 2))


def _product(scores: Tensor, x: Tensor) -> Tensor:
    if scores.shape[1] < 4:
        return (scores.unsqueeze(-1) * x.unsqueeze(1)).sum(2)
    return torch.bmm(scores, x)
