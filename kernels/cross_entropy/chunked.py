"""Tokens go through the head in chunks, so that never all logits are held.

Where a gradient is wanted, each chunk's gradient of the logits is turned into its share of the gradients of the hidden
states and of the head right away, so forward costs the three matrix products and backward only a scale.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from torchlinearmoe.kernels.cross_entropy import ChunkKernel
from torchlinearmoe.kernels.operator import Backend
from torchlinearmoe.precision import wide_type

CHUNK_ELEMENTS = 2**28
"""Logits of one chunk."""


def loss(
    hidden: Tensor, weight: Tensor, labels: Tensor, kernel: ChunkKernel, chunk_elements: int | None = None
) -> Tensor:
    """As `linear_cross_entropy`; chunk_elements: CHUNK_ELEMENTS by default."""
    if not torch.is_grad_enabled():
        # An autograd.Function would see the parameters' requires_grad and compute gradients that nobody asked for.
        hidden, weight = hidden.detach(), weight.detach()
    return _LinearCrossEntropy.apply(hidden, weight, labels, kernel, chunk_elements)  # pyright: ignore[reportReturnType]


def chunk_rows(tokens: int, vocab_size: int, elements: int | None = None) -> int:
    """Tokens of a chunk: the tokens halved until the logits fit `elements`, CHUNK_ELEMENTS by default, so that chunks
    are equal."""
    elements = elements or CHUNK_ELEMENTS
    rows = tokens
    while rows > 1 and rows * vocab_size > elements:
        rows = -(-rows // 2)
    return rows


class _LinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, labels: Tensor, kernel: ChunkKernel, chunk_elements: int | None
    ) -> Tensor:
        kind = wide_type(hidden.dtype)
        rows = chunk_rows(hidden.shape[0], weight.shape[0], chunk_elements)
        losses: list[Tensor] = []
        wants_hidden, wants_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.empty_like(hidden) if wants_hidden else None
        d_weight = None
        for start in range(0, hidden.shape[0], rows):
            part = hidden[start : start + rows]
            chunk, gradient = kernel(part @ weight.t(), labels[start : start + rows])
            losses.append(chunk.reshape(-1))
            if d_hidden is not None:
                torch.mm(gradient, weight, out=d_hidden[start : start + rows])
            # One chunk keeps its type; several are summed in float32.
            if wants_weight and rows >= hidden.shape[0]:
                d_weight = gradient.t() @ part
            elif wants_weight:
                d_weight = _add_product(d_weight, gradient.t(), part, kind)
            del gradient  # or it is held beside the next chunk's logits
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        # One sum for all chunks, not two launches a chunk.
        return torch.cat(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        (grad,) = grads
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = d_hidden * grad.to(d_hidden.dtype)
        if d_weight is not None:
            scaled = torch.empty_like(d_weight, dtype=ctx.weight_dtype)
            d_weight = torch.mul(d_weight, grad.to(d_weight.dtype), out=scaled)
        return d_hidden, d_weight, None, None, None


def _add_product(total: Tensor | None, a: Tensor, b: Tensor, kind: torch.dtype) -> Tensor:
    """total + a @ b in `kind`, in place; without a total, a new one. One pass where the product can add by itself."""
    if a.device.type == "cuda" and a.dtype != kind == torch.float32:
        if total is None:
            return torch.mm(a, b, out_dtype=kind)  # pyright: ignore[reportCallIssue]
        return torch.addmm(total, a, b, out_dtype=kind, out=total)  # pyright: ignore[reportCallIssue]
    product = a @ b
    return product.to(kind) if total is None else total.add_(product)


BACKEND = Backend("torch", loss, kinds=("cross_entropy",), order=0)
