"""Dense feed-forwards: SwiGLU (Shazeer 2020, arXiv 2002.05202) and squared ReLU (So et al. 2021, arXiv 2109.08668).

Shapes: D model width, F hidden width.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor
from torch.distributed.tensor import Placement, Shard

from torchlinearmoe.initialize import linear
from torchlinearmoe.module import Module


class FeedForward(Module):
    """D -> F -> D, hidden channels split by tensor parallelism; `hidden_layers` matrices make channels of tokens."""

    hidden_layers: int = 1
    float8 = ("gate_proj", "up_proj", "down_proj")

    def __init__(self, width: int, hidden: int, std: float, out_std: float) -> None:
        super().__init__()
        self.up_proj = linear(width, hidden, std)
        self.down_proj = linear(hidden, width, out_std)

    def tensor_parallel(self) -> dict[str, Placement]:
        """Hidden channels are split."""
        return {"up_proj.weight": Shard(0), "down_proj.weight": Shard(1)}


class SwiGLU(FeedForward):
    """down(silu(gate(x)) * up(x)), D -> F -> D."""

    hidden_layers = 2

    def __init__(self, width: int, hidden: int, std: float, out_std: float) -> None:
        Module.__init__(self)
        self.gate_proj = linear(width, hidden, std)
        self.up_proj = linear(width, hidden, std)
        self.down_proj = linear(hidden, width, out_std)

    def tensor_parallel(self) -> dict[str, Placement]:
        """Hidden channels are split."""
        return {"gate_proj.weight": Shard(0), **super().tensor_parallel()}

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class SquaredReLU(FeedForward):
    """down(relu(up(x))^2), D -> F -> D."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., D] -> [..., D]."""
        return self.down_proj(F.relu(self.up_proj(x)).square())


class NoFeedForward(Module):
    """In the place of a feed-forward in layers that have none; never called."""


FEED_FORWARDS = {"swiglu": SwiGLU, "relu2": SquaredReLU}
"""By `model.activation`."""
