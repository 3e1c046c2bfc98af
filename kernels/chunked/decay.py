"""Products of decays, as exponentials of sums that are never positive.

A product of decays over tokens s+1..t is exp(G_t - G_s) with the running sum G. Dividing by a decay product overflows,
and subtracting two large sums loses the digits that matter: after one decay of e^-500, G_t - G_s = -500.01 + 500 keeps
four digits in fp32. So G is summed in fp64 (a number per token and head: cheap), and split into a whole part, exact in
fp32, and a rest of at most 1/2. Differences of whole parts are exact, and a difference near zero, the only kind whose
exponential is not negligible, is as exact as fp32 can be.

A product below e^-40 (fp64: e^-300) is negligible, far below one rounding error: it becomes 0, or e^-40 inside a chunk.
Smaller numbers would make subnormal ones, with which a CPU multiplies ten times and exponentiates a hundred times
slower.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

FLOOR = -1000.0
"""Log decays are clamped here: e^-1000 is zero in fp64 too, and sums over a chunk stay finite (-inf would not)."""


def running_sum(log_decay: Tensor, dim: int) -> Tensor:
    """The inclusive running sum of log decays (clamped to FLOOR) over `dim`, in fp64."""
    return log_decay.double().clamp(min=FLOOR).cumsum(dim)


def decay_factor(log: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(log) in `dtype`, 0 where negligible."""
    return drop_negligible(log.to(dtype).clamp(min=_lowest(dtype)).exp())


def drop_negligible(decay: Tensor) -> Tensor:
    """Products of decays with 0 in place of negligible ones."""
    return F.threshold(decay, math.exp(0.99 * _lowest(decay.dtype)), 0.0)


def shrink_negligible(transition: Tensor) -> Tensor:
    """A dense transition with 0 in place of negligible entries of either sign."""
    return F.hardshrink(transition, math.exp(_lowest(transition.dtype)))


@torch.no_grad()
def decay_matrix(to: Tensor, since: Tensor, mask: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(to_t - since_s), or e^-40 where that is less, times `mask`; `decayed` brings the gradient.

    to: [..., t]; since: [..., s], running sums in fp64; mask: 0 or 1, broadcasts to [..., t, s], and selects only
    differences <= 0. Returns [..., t, s] in `dtype`.
    """
    whole_to, whole_since = to.round(), since.round()
    rest_to, rest_since = (to - whole_to).to(dtype), (since - whole_since).to(dtype)
    matrix = whole_to.to(dtype).unsqueeze(-1) - whole_since.to(dtype).unsqueeze(-2)
    matrix = matrix.add_(rest_to.unsqueeze(-1)).sub_(rest_since.unsqueeze(-2))
    return matrix.clamp_(_lowest(dtype), 0.0).exp_() * mask.to(dtype)


def decayed(scores: Tensor, matrix: Tensor, to: Tensor, since: Tensor | None = None) -> Tensor:
    """scores * matrix in scores' dtype, where matrix = decay_matrix(to, since, ...), differentiable in to and since.

    `since` None stands for `to`. One pass forward and two backward, where exp, its argument and the product would take
    three times as many.
    """
    return _Decayed.apply(scores, matrix, to, since)  # pyright: ignore[reportReturnType]


class _Decayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, scores, matrix, to, since):
        out = scores * matrix
        # torch 2.11 compiles a wrong backward for a function that ends with an operation that returns its own input.
        out = out if out.dtype == scores.dtype else out.to(scores.dtype)
        ctx.save_for_backward(matrix, out)
        ctx.to_shape, ctx.since_shape = to.shape, None if since is None else since.shape
        return out

    @staticmethod
    def backward(ctx, d_out):  # pyright: ignore[reportIncompatibleMethodOverride]
        matrix, out = ctx.saved_tensors
        d_scores = (d_out * matrix).to(d_out.dtype)
        d_log = d_out.to(matrix.dtype) * out
        d_to, d_since = d_log.sum(-1), d_log.sum(-2)
        if ctx.since_shape is None:
            return d_scores, None, (d_to - d_since).sum_to_size(ctx.to_shape).double(), None
        d_to, d_since = d_to.sum_to_size(ctx.to_shape), d_since.sum_to_size(ctx.since_shape)
        return d_scores, None, d_to.double(), -d_since.double()


def causal_mask(size: int, device: torch.device, diagonal: int = 0) -> Tensor:
    """[size, size] bool: row t sees column s <= t + diagonal."""
    return torch.ones(size, size, dtype=torch.bool, device=device).tril(diagonal)


def _lowest(dtype: torch.dtype) -> float:
    return -300.0 if dtype == torch.float64 else -40.0
