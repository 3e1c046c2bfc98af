"""RMSNorm: of whole rows, of heads with a gate, of groups of channels.

Shapes: T tokens, H heads, V value width of a head, C channels.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.initialize import ONES, Constant, set_initializers
from torchlinearmoe.kernels.norm import rms_norm
from torchlinearmoe.module import Module
from torchlinearmoe.precision import in_float32


class RMSNorm(Module):
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dim; `kernels.norm.rms_norm`.

    With an offset of one the weights are about zero, where bfloat16 is fine; they are added in float32.
    """

    def __init__(self, width: int, eps: float, offset: float = 0.0) -> None:
        super().__init__()
        self.eps, self.offset = eps, offset
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=Constant(1.0 - offset))
        self.mean_square: Callable[[Tensor], Tensor] | None = None
        """[..., width] -> [..., 1], in float32; given where ranks hold parts of the width."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., width] -> [..., width]."""
        mean_square = None
        if self.mean_square is not None:
            mean_square = self.mean_square(in_float32(x))
        weight = self.weight if not self.offset else in_float32(self.weight) + self.offset
        return rms_norm(x, weight, self.eps, mean_square=mean_square)


class GatedHeadNorm(Module):
    """RMSNorm(o) * weight * activation(gate) per head; statistics in float32, result in the gate's type."""

    def __init__(self, width: int, eps: float, activation: Callable[[Tensor], Tensor] = F.silu) -> None:
        super().__init__()
        self.eps = eps
        self.activation = activation
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES)

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        """o, gate: [T, H, V] -> [T, H, V]."""
        return rms_norm(o, self.weight, self.eps, gate=gate, activation=self.activation)


class HeadGate(Module):
    """o * activation(gate), in float32, result in the gate's type: `GatedHeadNorm` without the norm."""

    def __init__(self, activation: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.activation = activation

    def forward(self, o: Tensor, gate: Tensor) -> Tensor:
        """o, gate: [T, H, V] -> [T, H, V]."""
        return (in_float32(o) * self.activation(in_float32(gate))).to(gate.dtype)


class GroupedRMSNorm(Module):
    """RMSNorm over each of `groups` equal groups of channels, one weight a channel; statistics in float32."""

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__()
        self.group_width = width // groups
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(width))
        set_initializers(self, weight=ONES)

    def forward(self, x: Tensor) -> Tensor:
        """[..., C] -> [..., C]; the number of groups is read from the shape."""
        x, weight = (y.unflatten(-1, (-1, self.group_width)) for y in (x, self.weight))
        return rms_norm(x, weight, self.eps).flatten(-2)
