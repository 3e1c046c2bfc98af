"""What the RWKV mixers share: initial values that depend on the layer's depth, and a GroupNorm with a head a group.

Shapes: T tokens, D width, H heads, V value width of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from torchlinearmoe.initialize import ZEROS, Constant, Initializer, Rows, set_initializers
from torchlinearmoe.module import Module
from torchlinearmoe.precision import in_float32


@dataclass(frozen=True)
class Depth:
    """Where a layer stands among all layers; the authors' initial values are ramps over channels that depend on it."""

    layer: int
    layers: int

    @property
    def rising(self) -> float:
        """From 0 in the first layer to 1 in the last."""
        return self.layer / max(self.layers - 1, 1)

    @property
    def falling(self) -> float:
        """From 1 in the first layer to almost 0."""
        return 1.0 - self.layer / self.layers

    def norm(self) -> Constant:
        """The GroupNorm's weight, ((layer + 1) / layers)^0.7."""
        return Constant(((self.layer + 1) / self.layers) ** 0.7)

    def ramp(self, width: int, power: float, lift: float = 0.0) -> Rows:
        """A mix with the token before, 1 - ((n / D)^(power * falling) + lift) in channel n."""
        return Rows(lambda rows: 1.0 - ((rows / width) ** (power * self.falling) + lift))


class HeadGroupNorm(Module):
    """GroupNorm with a head a group; statistics and result in float32 (float64 stays)."""

    def __init__(self, heads: int, head_dim: int, eps: float, weight: Initializer) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.eps = eps
        self.weight = nn.Parameter(torch.empty(heads * head_dim))
        self.bias = nn.Parameter(torch.empty(heads * head_dim))
        set_initializers(self, weight=weight, bias=ZEROS)

    def forward(self, o: Tensor) -> Tensor:
        """[T, H, V] -> [T, H V]."""
        wide = in_float32(o)
        unit = F.layer_norm(wide, (self.head_dim,), eps=self.eps).flatten(-2)
        return unit * self.weight.to(wide.dtype) + self.bias.to(wide.dtype)
