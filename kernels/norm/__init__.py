"""RMS norm with float32 statistics (Zhang and Sennrich 2019, arXiv 1910.07467), plain or with a gate.

    y = x / sqrt(mean(x^2) + eps) * weight [* activation(gate)]          the mean goes over the last dim

Heads or groups of channels that are normed by themselves are dims of their own.
"""

from __future__ import annotations

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from torchlinearmoe.kernels.choose import choose
from torchlinearmoe.kernels.operator import Budget, Call, Operator

OPERATOR = Operator("norm", ("plain", "gated"))


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    gate: Tensor | None = None,
    activation: Callable[[Tensor], Tensor] = F.silu,
    mean_square: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """x: [..., C]; weight: [C] or what broadcasts to x; gate: as x. Returns [..., C] in the gate's type, else in x's.

    activation: F.silu or torch.sigmoid; mean_square: [..., 1] in float32, where x is only a part of what it goes over.
    Computed in float32 (float64 stays).
    """
    # Of the weight, whose shape the compiler takes for a constant.
    call = Call("plain" if gate is None else "gated", x.device.type, x.dtype, weight.shape[-1])
    return choose(OPERATOR, backend, call).run(x, weight, eps, gate, activation, mean_square)


def budget(elements: int, gated: bool = False, itemsize: int = 2) -> Budget:
    """Of `elements` numbers of `itemsize` bytes; weights and statistics are small beside them."""
    inputs = elements * itemsize * (2 if gated else 1)
    output = elements * itemsize
    return Budget(
        flops=elements * (8.0 if gated else 4.0),
        forward_bytes=inputs + output,
        backward_bytes=2 * inputs + output,
        saved_bytes=inputs,
    )
