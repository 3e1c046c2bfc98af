"""Output head and cross entropy in one: the loss of `hidden @ weight.T`, where possible without all logits.

Shapes: T tokens, D width, V vocabulary, C tokens of a chunk.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator
from torchlinearmoe.precision import in_float32

OPERATOR = Operator("cross_entropy", ("cross_entropy",))

IGNORED = -100
"""Label of a position without a target."""

ChunkKernel = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
"""As `chunk_loss`; the first may be the loss of each token instead of their sum."""


def chunk_loss(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross entropy of a chunk and its gradient by the logits.

    logits: [C, V]; labels: int64 [C]. Computed in float32 (float64 stays); the gradient comes in the logits' type.
    """
    wide = in_float32(logits)
    valid = labels != IGNORED
    target = labels.clamp(min=0)[:, None]
    log_total = wide.logsumexp(-1, keepdim=True)
    losses = (log_total - wide.gather(-1, target)).squeeze(-1)
    hot = torch.arange(logits.shape[-1], device=logits.device) == target
    gradient = (torch.exp(wide - log_total) - hot.to(wide.dtype)) * valid[:, None]
    return torch.where(valid, losses, 0).sum(), gradient.to(logits.dtype)


def chunk_hits(logits: Tensor, labels: Tensor) -> Tensor:
    """How many labels of a chunk are the most probable token. logits: [C, V]; labels: int64 [C], IGNORED never are."""
    return (logits.argmax(-1) == labels).sum()


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    kernel: ChunkKernel = chunk_loss,
    backend: str = "auto",
) -> Tensor:
    """Sum over tokens of the cross entropy of `hidden @ weight.T`.

    hidden: [T, D]; weight: [V, D]; labels: int64 [T], IGNORED where there is no target. Returns a scalar, float32
    (float64 for float64 inputs). Differentiable once.

    kernel: what the backend `torch` does with a chunk of logits, `chunk_loss` as it is or compiled; who means another
    (the vocabulary lies over several ranks) names that backend.
    """
    call = Call("cross_entropy", hidden.device.type, hidden.dtype)
    return choose(OPERATOR, backend, call).run(hidden, weight, labels, kernel)


def budget(tokens: int, width: int, vocab_size: int, itemsize: int = 2) -> Budget:
    """Of the head's three products; the logits need not leave the chip."""
    hidden, weight = tokens * width * itemsize, vocab_size * width * itemsize
    return Budget(
        flops=2.0 * tokens * width * vocab_size,
        forward_bytes=hidden + weight,
        backward_bytes=2 * (hidden + weight),
        saved_bytes=hidden + weight,
    )
