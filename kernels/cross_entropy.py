"""Output head and cross entropy in one op that never holds all logits.

Tokens go through the head in chunks; where a gradient is wanted, each chunk's gradient of the logits is turned into
its share of the gradients of the hidden states and of the head right away, so forward costs the three matrix products
and backward only a scale.

Shapes: T tokens, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

IGNORED = -100
"""Label of a position without a target."""
CHUNK_ELEMENTS = 2**28
"""Logits of one chunk."""

ChunkKernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def chunk_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of a chunk and its gradient by the logits.

    logits: [C, V]; labels: int64 [C]. Computed in float32 (float64 stays); the gradient comes in the logits' type.
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    valid = labels != IGNORED
    target = labels.clamp(min=0)[:, None]
    log_total = wide.logsumexp(-1, keepdim=True)
    losses = (log_total - wide.gather(-1, target)).squeeze(-1)
    hot = torch.arange(logits.shape[-1], device=logits.device) == target
    gradient = (torch.exp(wide - log_total) - hot.to(wide.dtype)) * valid[:, None]
    return torch.where(valid, losses, 0).sum(), gradient.to(logits.dtype)


def linear_cross_entropy(hidden: Tensor, weight: Tensor, labels: Tensor, kernel: ChunkKernel = chunk_loss) -> Tensor:
    """Sum over tokens of the cross entropy of `hidden @ weight.T`.

    hidden: [T, D]; weight: [V, D]; labels: int64 [T], IGNORED where there is no target. Returns a scalar, float32
    (float64 for float64 inputs). Differentiable once.
    """
    if not torch.is_grad_enabled():
        # An autograd.Function would see the parameters' requires_grad and compute gradients that nobody asked for.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, kernel)  # pyright: ignore[reportReturnType]


def chunk_rows(tokens: int, vocab_size: int) -> int:
    """Tokens of a chunk: the tokens halved until the logits fit CHUNK_ELEMENTS, so that chunks are equal."""
    rows = tokens
    while rows > 1 and rows * vocab_size > CHUNK_ELEMENTS:
        rows = -(-rows // 2)
    return rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, kernel: ChunkKernel) -> Tensor:
        kind = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        rows = chunk_rows(hidden.shape[0], weight.shape[0])
        loss = torch.zeros((), dtype=kind, device=hidden.device)
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = None
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            chunk, gradient = kernel(part @ weight.t(), labels[start : start + rows])
            loss += chunk
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[start : start + rows])
            # One chunk keeps its type; several are summed in float32.
            if wants_weight and rows >= hidden.shape[0]:
                d_weight = gradient.t() @ part
            elif wants_weight:
                d_weight = _add_product(d_weight, gradient.t(), part, kind)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (grad,) = grads
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            scaled = torch.empty_like(d_weight, dtype=ctx.weight_dtype)
            d_weight = torch.mul(d_weight, grad.to(d_weight.dtype), out=scaled)
        return d_hidden, d_weight, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """total + a @ b in `kind`, in place; without a total, a new one. One pass where the product can add by itself."""
    if a.device.type == "cuda" and a.dtype != kind == torch.float32:
        if total is None:
            return torch.mm(a, b, out_dtype=kind)  # pyright: ignore[reportCallIssue]
        return torch.addmm(total, a, b, out_dtype=kind, out=total)  # pyright: ignore[reportCallIssue]
    product = a @ b
    return product.to(kind) if total is None else total.add_(product)
